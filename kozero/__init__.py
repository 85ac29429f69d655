"""KoZeRO: ZeRO-sharded training of Korean language models, with pause tokens."""

import sys
from pathlib import Path
from types import TracebackType

__version__ = "0.1.0"
_ENTRIES = {Path(__file__).resolve().parents[1] / name for name in ("finetune", "pretrain", "scripts")}


def _tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Ctrl-C while the libraries are still being imported, which takes seconds, is a word and no traceback."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


if Path(getattr(sys.modules["__main__"], "__file__", None) or "").resolve().parent in _ENTRIES:
    sys.excepthook = _tell  # of a program of this project; one that imports a part of it keeps its own
