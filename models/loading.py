"""A pre-trained model from a folder or the hub, or a new one of a config's sizes, with one line about what is wrong."""

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.utils import find_adapter_config_file
from transformers.utils import logging as transformers_logging

from kozero.errors import UserError, first_line, require
from kozero.json_files import read_json_object

OFFLINE = "Offline? Give a local folder, or random weights with --config_file, see models/*_config.json"
OBJECTS = ("config", "generation_config", "tokenizer", "tokenizer_config", "special_tokens_map", "added_tokens")
MOST_LAYERS = 1000  # no published model has more
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of v2 and v1

Model = TypeVar("Model", bound=PreTrainedModel)


def require_folder(name: str, flag: str) -> None:
    """Tell a folder that is not there from a hub name: a hub name is `owner/name`. JSON in a folder must hold objects,
    whose keys its readers look up."""
    path = Path(name)
    looks_local = path.is_absolute() or name.startswith((".", "~")) or len(path.parts) > 2 or name.endswith("/")
    require(not looks_local or path.is_dir(), f"{flag} {name}: no such folder")
    for file in filter(Path.is_file, (path / f"{stem}.json" for stem in OBJECTS)):
        read_json_object(file)


def require_model(name: str, flag: str) -> None:
    """Tell a run's folder, or a step of it, from the model that the run has exported."""
    path = Path(name)
    if not path.is_dir() or (path / "config.json").is_file():
        return
    run = next((place.parent for place in (path, path.parent) if place.name == "checkpoints"), path)
    found = run / "model" if (run / "model" / "config.json").is_file() else "RUN/model"
    raise UserError(f"{flag} {name}: has no config.json; give the exported model of a run, {found}")


def load_any_config(name: str, flag: str) -> PreTrainedConfig:
    """The config of a folder or hub name. Asked for first: when the hub cannot be reached, one file's retries tell."""
    require_folder(name, flag)
    require_model(name, flag)
    try:
        values, _ = PreTrainedConfig.get_config_dict(name)
        with quiet():  # it would warn of ids of special tokens, which are the tokenizer's here
            config = own_config(values)
    except Exception as error:  # UserError of our own configs, OSError, ValueError, hub errors
        raise cannot_load(name, flag, error) from None
    config.name_or_path = name  # for messages; it is not written
    quantized = values.get("quantization_config")
    require(not quantized, f"{flag} {name}: quantized weights, by its config.json; give those in full precision")
    adapter = find_adapter_config_file(name)
    require(not adapter, f"{flag} {name}: holds an adapter (adapter_config.json); merge it into its model")
    return config


def own_config(values: dict[str, Any]) -> PreTrainedConfig:
    """The config of a file's values that its architecture defines, and pauses. Whatever else a file says would choose
    code (or a kernel to download), files, precision or what is returned, none of which belongs to the weights."""
    known = values.get("model_type") in CONFIG_MAPPING
    require(known, f"model_type {values.get('model_type')!r}: none that transformers knows")
    kind = CONFIG_MAPPING[values["model_type"]]
    kinds = kind.__mro__[: kind.__mro__.index(PreTrainedConfig)]
    own = {key for one in kinds for key in inspect.get_annotations(one)} | {"pause", *kind.attribute_map}
    return kind(**{key: value for key, value in values.items() if key in own - {"use_cache"}})


def check_size(
    build: Callable[[], PreTrainedModel], config: PreTrainedConfig, where: str, held: int | None = None
) -> None:
    """Refuse a model that is too large for this machine's memory, before anything of it is made.

    Args: held: bytes of all its weights' files, of which each weight takes one at least.
    """
    layers, memory = config.num_hidden_layers, machine_memory()
    require(layers <= MOST_LAYERS, f"{where}: {layers:,} layers; must be at most {MOST_LAYERS:,}")
    # Fewer than any model of this shape has: layers, modules on any device, take time to make.
    least = -(-layers // getattr(config, "layer_group", 1)) * config.hidden_size**2
    if least <= min(memory, held or memory):
        try:
            with quiet(), torch.device("meta"):
                least = sum(weight.numel() for weight in build().parameters())
        except Exception as error:  # what PyTorch and transformers do not like in a number
            raise UserError(f"{where}: no model of these sizes can be built ({first_line(error)})") from None
    if held and least > held:
        raise UserError(f"{where}: its config.json describes {least:,} weights, its files have {held:,} bytes")
    sizes = f"{4 * least / 2**30:,.0f} GiB of weights in 32 bit, this machine has {memory / 2**30:,.0f}"
    require(4 * least <= memory, f"{where}: no model of these sizes can be built ({sizes})")


def machine_memory() -> int:
    """Bytes of this machine's memory, or of what a container may use of it."""
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in CGROUP_LIMITS:
        with suppress(OSError, ValueError):  # not there, or without a limit
            found.append(int(Path(path).read_text()))
    return min(found)


def bytes_of_weights(name: str) -> int | None:
    """Of the files of a folder; None for a hub name, or where there are none."""
    files = Path(name).iterdir() if Path(name).is_dir() else ()
    return sum(path.stat().st_size for path in files if path.suffix in (".safetensors", ".bin")) or None


def is_whole(weight: torch.Tensor) -> bool:
    """Whether a tensor holds whole numbers alone, and not only zeros. The first numbers tell nearly always."""
    return not (weight.flatten()[:1000] % 1).any() and bool(weight.any()) and not (weight % 1).any()


def load_checked(auto: Any, config: PreTrainedConfig, name: str, flag: str, is_ours: Callable[[str], Any]) -> Any:
    """A pre-trained model in 32 bit that is whole, finite and of its config's sizes. Code of the repository is never
    run; an older one may hold a .bin file, which transformers reads with weights_only=True.

    Args:
        auto: the class of transformers that loads it.
        is_ours: of a weight's name that the model does not have: whether that is a mistake.
    """
    check_size(lambda: auto.from_config(config), config, f"{flag} {name}", bytes_of_weights(name))
    try:
        with quiet():
            model, loading = auto.from_pretrained(
                name, config=config, dtype=torch.float32, trust_remote_code=False, output_loading_info=True,
                ignore_mismatched_sizes=True,
            )  # fmt: skip
    except Exception as error:  # OSError, ValueError, SafetensorError, hub errors
        raise cannot_load(name, flag, error) from None
    whole = {name for name, weight in model.named_parameters() if weight.dim() > 1 and is_whole(weight)}
    for wrong, what in (
        (loading["missing_keys"], "are missing"),
        ({str(key[0]) for key in loading["mismatched_keys"]}, "have another shape than its config.json says"),
        (set(filter(is_ours, loading["unexpected_keys"])), "are of layers that its config.json does not have"),
        ({k for k, tensor in model.state_dict().items() if not torch.isfinite(tensor).all()}, "are not finite"),
        (whole, "are whole numbers, as of int8 without its scales"),
    ):
        require(not wrong, f"{flag} {name}: {len(wrong)} weights {what}, the first is {min(wrong, default=None)}")
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of transformers, tables of many lines about what is told here in one."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def cannot_load(name: str, flag: str, error: Exception) -> UserError:
    """What to say when a model's folder or the hub does not give what it should."""
    if isinstance(error, UserError):
        return UserError(f"{flag} {name}: config.json: {error}")
    if Path(name).is_dir():
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = f"{type(error).__name__}: {' '.join(lines[:2])}"[:250]
        return UserError(f"{flag} {name}: cannot be loaded ({reason})")
    way_out = "Give the exported model of a run, RUN/model" if flag == "--checkpoint" else OFFLINE
    return UserError(f"{flag} {name}: no such folder, nor can it be had from the hub ({first_line(error)}). {way_out}")


def build_or_refuse(build: Callable[[], Model], config: PreTrainedConfig, path: str) -> Model:
    """A model of a config file's sizes, where memory and PyTorch allow them."""
    check_size(build, config, f"--config_file {path}")
    return build()
