"""The encoders by name: from a JSON config or a folder, and back into a folder that AutoModel loads. What stands on an
encoder lies beside it in heads.safetensors."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from kozero.errors import UserError, nearest
from models.language_model import first_line, read_model_json, require_folder, save_folder
from models.mix_lm import MixLmConfig, MixLmEncoder
from models.transformer import TransformerConfig, TransformerEncoder

ENCODERS: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {
    "transformer": (TransformerConfig, TransformerEncoder),
    "mix_lm": (MixLmConfig, MixLmEncoder),
}

HEADS = "heads.safetensors"
ENCODER = "encoder."  # what the names of its weights begin with in a module that has heads


def config_file_of(name: str) -> Path:
    """The shipped config of an encoder."""
    return Path(__file__).parent / f"{name}_config.json"


def name_in_config(path: Path) -> str:
    """Which encoder a JSON config describes.

    Raises: UserError when it is none.
    """
    names = {kind.model_type: name for name, (kind, _) in ENCODERS.items()}
    return names[read_model_json(path, *names)["model_type"]]


def read_encoder_config(path: Path, name: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    """An encoder's config from JSON, with the size of its tokenizer's vocabulary and its padding token.

    Raises: UserError for an unknown key or a value that no model can have.
    """
    kind = ENCODERS[name][0]
    values = read_model_json(path, kind.model_type)
    known = set(kind().to_dict()) | set(kind.attribute_map) | {"model_type"}
    for key in values:
        if key not in known:
            raise UserError(f"--config_file {path}: unknown key {key!r}{nearest(key, known)}")
    values["vocab_size"] = len(tokenizer)
    if tokenizer.pad_token_id is not None:
        values["pad_token_id"] = tokenizer.pad_token_id
    try:
        return kind(**values)
    except UserError as error:
        raise UserError(f"--config_file {path}: {error}") from None
    except Exception as error:  # the config checks types by several libraries' errors
        raise UserError(f"--config_file {path}: {first_line(error)}") from None


def build_encoder(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """Random weights, the same on every rank for one seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModel.from_config(config)


def load_encoder(folder: str) -> PreTrainedModel:
    """An encoder that `export_encoder` wrote, in 32 bit.

    Raises: UserError when the folder holds something else or is damaged.
    """
    require_folder(folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if not isinstance(config, tuple(kind for kind, _ in ENCODERS.values())):
            raise UserError(
                f"{folder}: model_type {config.model_type!r}; an encoder of {', '.join(ENCODERS)} is needed here"
            )
        encoder, loading = AutoModel.from_pretrained(
            folder, config=config, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot be loaded ({first_line(error)})") from None
    if missing := sorted(loading["missing_keys"]):
        raise UserError(f"{folder}: {len(missing)} weights are missing, the first is {missing[0]}")
    return encoder


def load_heads(module: nn.Module, folder: str) -> list[str]:
    """Fill what stands on the encoder of `module` with what lies beside it in a folder; a hub name has nothing.

    Returns: the names of what is not there, in their order.

    Raises: UserError when the file is damaged or of another shape.
    """
    path = Path(folder) / HEADS
    try:
        saved = load_file(path) if path.is_file() else {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be loaded ({first_line(error)})") from None
    own = {name: p for name, p in module.named_parameters() if not name.startswith(ENCODER)}
    for name in own.keys() & saved.keys():
        if own[name].shape != saved[name].shape:
            found, wanted = tuple(saved[name].shape), tuple(own[name].shape)
            raise UserError(f"{path}: {name} has the shape {found}, this encoder needs {wanted}")
        with torch.no_grad():
            own[name].copy_(saved[name])
    return sorted(own.keys() - saved.keys())


def set_dropout(encoder: PreTrainedModel, rate: float) -> None:
    """One rate everywhere, in the config and in the modules that were built from it."""
    encoder.config.dropout_prob = rate
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = rate


def export_encoder(
    folder: Path, module: nn.Module, state: dict[str, torch.Tensor], tokenizer: PreTrainedTokenizerFast, card: str
) -> None:
    """Write a folder that `AutoModel` and `AutoTokenizer` load, and the heads beside it, whole or not at all.

    Args:
        module: has the encoder as `encoder`; the rest of it is heads.
        state: all weights by the names of `module`, shared ones once.
    """
    own = {name.removeprefix(ENCODER): tensor for name, tensor in state.items() if name.startswith(ENCODER)}
    heads = {name: tensor.contiguous() for name, tensor in state.items() if not name.startswith(ENCODER)}
    with torch.device("meta"):
        whole = AutoModel.from_config(module.encoder.config)
    missing, unexpected = whole.load_state_dict(own, strict=False, assign=True)
    whole.tie_weights()
    if unexpected or any(parameter.is_meta for parameter in whole.parameters()):
        raise RuntimeError(f"weights do not match the encoder: missing {missing}, unexpected {unexpected}")
    save_folder(folder, whole, tokenizer, card, {HEADS: heads} if heads else {})
