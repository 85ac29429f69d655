"""A pre-trained model from a folder or the hub, or a new one of a config's sizes, with one line about what is wrong."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from kozero.errors import UserError, first_line

OFFLINE = "Offline? Give a local folder, or random weights with --config_file, see models/*_config.json"

Model = TypeVar("Model", bound=PreTrainedModel)


def require_folder(name: str, flag: str) -> None:
    """Tell a folder that is not there from a hub name: a hub name is `owner/name`."""
    path = Path(name)
    looks_local = path.is_absolute() or name.startswith((".", "~")) or len(path.parts) > 2 or name.endswith("/")
    if looks_local and not path.is_dir():
        raise UserError(f"{flag} {name}: no such folder")


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
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # UserError of our own configs, OSError, ValueError, hub errors
        raise cannot_load(name, flag, error) from None


def load_checked(auto: Any, config: PreTrainedConfig, name: str, flag: str, is_ours: Callable[[str], Any]) -> Any:
    """A pre-trained model in 32 bit that is whole, finite and of its config's sizes. Code of the repository is never
    run; an older one may hold a .bin file, which transformers reads with weights_only=True.

    Args:
        auto: the class of transformers that loads it.
        is_ours: of a weight's name that the model does not have: whether that is a mistake.
    """
    try:
        with quiet():
            model, loading = auto.from_pretrained(
                name, config=config, dtype=torch.float32, trust_remote_code=False, output_loading_info=True,
                ignore_mismatched_sizes=True,
            )  # fmt: skip
    except Exception as error:  # OSError, ValueError, SafetensorError, hub errors
        raise cannot_load(name, flag, error) from None
    for wrong, what in (
        (loading["missing_keys"], "are missing"),
        ({str(key[0]) for key in loading["mismatched_keys"]}, "have another shape than its config.json says"),
        (set(filter(is_ours, loading["unexpected_keys"])), "are of layers that its config.json does not have"),
        ({k for k, tensor in model.state_dict().items() if not torch.isfinite(tensor).all()}, "are not finite"),
    ):
        if wrong:
            raise UserError(f"{flag} {name}: {len(wrong)} weights {what}, the first is {min(wrong)}")
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


def build_or_refuse(build: Callable[[], Model], path: str) -> Model:
    """A model of a config file's sizes, where memory and PyTorch allow them."""
    try:
        return build()
    except (RuntimeError, MemoryError, OverflowError, TypeError) as error:
        raise UserError(f"--config_file {path}: no model of these sizes can be built ({first_line(error)})") from None
