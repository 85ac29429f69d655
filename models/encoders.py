"""The encoders by name: from a JSON config or a folder, and back into a folder that AutoModel loads. What stands on an
encoder lies beside it in heads.safetensors."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
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


def config_file_of(name: str) -> Path:
    """The shipped config of an encoder."""
    return Path(__file__).parent / f"{name}_config.json"


def name_in_config(path: Path) -> str:
    """Which encoder a JSON config describes.

    Raises: UserError when it is none.
    """
    names = {kind.model_type: name for name, (kind, _) in ENCODERS.items()}
    return names[read_model_json(path, *names)["model_type"]]


def read_encoder_config(path: Path, name: str, num_tokens: int) -> PreTrainedConfig:
    """An encoder's config from JSON, its vocabulary as large as its tokenizer's.

    Raises: UserError for an unknown key or a value that no model can have.
    """
    kind = ENCODERS[name][0]
    values = read_model_json(path, kind.model_type)
    known = set(kind().to_dict()) | set(kind.attribute_map) | {"model_type"}
    for key in values:
        if key not in known:
            raise UserError(f"--config_file {path}: unknown key {key!r}{nearest(key, known)}")
    try:
        return kind(**values | {"vocab_size": num_tokens})
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


def load_heads(folder: str) -> dict[str, torch.Tensor]:
    """The weights beside an encoder, by their names; none where the folder has none or is a hub name.

    Raises: UserError when the file is damaged.
    """
    path = Path(folder) / HEADS
    if not path.is_file():
        return {}
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be loaded ({first_line(error)})") from None


def set_dropout(encoder: PreTrainedModel, rate: float) -> None:
    """One rate everywhere, in the config and in the modules that were built from it."""
    encoder.config.dropout_prob = rate
    for module in encoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = rate


def export_encoder(
    folder: Path,
    encoder: PreTrainedModel,
    state: dict[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerFast,
    card: str,
    heads: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write a folder that `AutoModel` and `AutoTokenizer` load, whole or not at all.

    Args: state: the encoder's weights by its own names, shared ones once. heads: what stands on it.
    """
    with torch.device("meta"):
        whole = AutoModel.from_config(encoder.config)
    missing, unexpected = whole.load_state_dict(state, strict=False, assign=True)
    whole.tie_weights()
    if unexpected or any(parameter.is_meta for parameter in whole.parameters()):
        raise RuntimeError(f"weights do not match the encoder: missing {missing}, unexpected {unexpected}")
    save_folder(folder, whole, tokenizer, card, {HEADS: heads} if heads else {})
