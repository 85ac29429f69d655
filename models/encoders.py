"""The encoders by name: from a JSON config or a folder, and back into a folder that AutoModel loads. What stands on an
encoder lies beside it in heads.safetensors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from kozero.errors import UserError, first_line, nearest, require
from models.encoder_config import EncoderConfig
from models.language_model import read_model_json, save_folder
from models.loading import build_or_refuse, load_any_config, load_checked
from models.mix_lm import MixLmConfig, MixLmEncoder
from models.transformer import TransformerConfig, TransformerEncoder

ENCODERS: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {
    "transformer": (TransformerConfig, TransformerEncoder),
    "mix_lm": (MixLmConfig, MixLmEncoder),
}

WRITTEN = ("architectures", "dtype", "transformers_version")  # by transformers, into any config.json
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


def read_encoder_config(
    path: Path, name: str, tokenizer: PreTrainedTokenizerFast, say: Callable[[str], Any] = print
) -> PreTrainedConfig:
    """An encoder's config from JSON, with the size of its tokenizer's vocabulary and its padding token.

    Args: say: gets a line about each of the two that the file gives another value: shipped sizes go with any tokenizer.

    Raises: UserError for a key that is unknown or has no effect, or a value that no model can have.
    """
    kind = ENCODERS[name][0]
    values = read_model_json(path, kind.model_type)
    check_config_keys(path, values, kind)
    for key, value in (("vocab_size", len(tokenizer)), ("pad_token_id", padding_of(tokenizer))):
        if values.get(key, value) != value:
            say(f"{path}: {key} {values[key]}: the tokenizer's {value} is used")
        values[key] = value
    try:
        config = kind(**values)
    except Exception as error:  # its own UserError, or those of the libraries that check types
        wrong = error if isinstance(error, UserError) else first_line(error)
        raise UserError(f"--config_file {path}: {wrong}") from None
    config.name_or_path = str(path)  # for messages; it is not written
    return config


def check_config_keys(path: Path, values: dict[str, Any], kind: type[PreTrainedConfig]) -> None:
    """Every key has an effect, but for what transformers writes into each file."""
    default, inherited = kind().to_dict(), PreTrainedConfig().to_dict().keys() - {"model_type"}
    for key, value in values.items():
        if key not in default.keys() | kind.attribute_map.keys():
            raise UserError(f"--config_file {path}: unknown key {key!r}{nearest(key, default)}")
        if key in inherited - set(WRITTEN) and value != default[key]:
            raise UserError(f"--config_file {path}: {key} {value!r}: has no effect on this model; leave it out")
        other = kind.attribute_map.get(key)
        if other in values and values[other] != value:
            raise UserError(f"--config_file {path}: {key} {value!r} and {other} {values[other]!r} are one setting")


def padding_of(tokenizer: PreTrainedTokenizerFast) -> int:
    """The id of the padding token. Its vector never trains, so it must not be a token that means something."""
    pad, name = tokenizer.pad_token_id, f"--tokenizer_name_or_path {tokenizer.name_or_path}"
    advice = "give another tokenizer (scripts/train_tokenizer.py makes one)"
    if pad is None:
        raise UserError(f"{name}: no padding token, which an encoder needs; {advice}")
    roles = ("cls_token_id", "sep_token_id", "bos_token_id", "eos_token_id", "mask_token_id", "unk_token_id")
    if pad in [getattr(tokenizer, role) for role in roles]:
        raise UserError(f"{name}: pads with {tokenizer.pad_token}, which has another role too; {advice}")
    return pad


def build_encoder(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """Random weights in 32 bit, the same on every rank for one seed.

    Raises: UserError when there is no memory for them.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build_or_refuse(lambda: AutoModel.from_config(config, dtype=torch.float32), config, config.name_or_path)


def load_encoder(folder: str, flag: str = "--model_name_or_path") -> PreTrainedModel:
    """An encoder that `export_encoder` wrote, in 32 bit.

    Args: flag: what the user named the folder with.

    Raises: UserError when the folder holds something else or is damaged.
    """
    config = load_any_config(folder, flag)
    needed = f"model_type {config.model_type!r}; an encoder of {', '.join(ENCODERS)} is needed here"
    require(isinstance(config, EncoderConfig), f"{flag} {folder}: {needed}")
    encoder = load_checked(AutoModel, config, folder, flag, is_ours=bool)  # each weight of the file belongs to it
    check_shared(encoder, folder, flag)
    return encoder


def check_shared(encoder: PreTrainedModel, folder: str, flag: str) -> None:
    """Refuse layers with weights of their own where the config says that all share: of equal names the last would win.
    Before one group of all layers shared attention and norms too, exports had such weights."""
    names = {name for name, _ in encoder.named_parameters()}
    for path in Path(folder).glob("model*.safetensors"):
        with safe_open(path, "pt") as file:
            own = sorted(set(file.keys()) - names)
        if own:
            shares = f"layer_group {encoder.config.layer_group} shares all weights of its layers, and the file has"
            old = "(exported when feed-forwards alone were shared); train it anew"
            raise UserError(f"{flag} {folder}: {shares} {own[0]} besides {old}")


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
        found, wanted = tuple(saved[name].shape), tuple(own[name].shape)
        require(found == wanted, f"{path}: {name} has the shape {found}, this encoder needs {wanted}")
        with torch.no_grad():
            own[name].copy_(saved[name])
    return sorted(own.keys() - saved.keys())


def export_encoder(
    folder: Path, module: nn.Module, state: dict[str, torch.Tensor] | None, tokenizer: PreTrainedTokenizerFast,
    card: str,
) -> None:  # fmt: skip
    """Fill a folder that `AutoModel` and `AutoTokenizer` load, and the heads in it.

    Args:
        module: has the encoder as `encoder`; the rest of it is heads.
        state: all weights by the names of `module`, shared ones once; None: the folder without them.
    """
    with torch.device("meta"):
        whole = AutoModel.from_config(module.encoder.config)
    if state is None:
        return save_folder(folder, whole, tokenizer, card, None)
    own = {name.removeprefix(ENCODER): tensor for name, tensor in state.items() if name.startswith(ENCODER)}
    heads = {name: tensor.contiguous() for name, tensor in state.items() if not name.startswith(ENCODER)}
    missing, unexpected = whole.load_state_dict(own, strict=False, assign=True)
    whole.tie_weights()
    if unexpected or any(parameter.is_meta for parameter in whole.parameters()):
        raise RuntimeError(f"weights do not match the encoder: missing {missing}, unexpected {unexpected}")
    save_folder(folder, whole, tokenizer, card, {HEADS: heads} if heads else {})
