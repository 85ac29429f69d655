"""KoZeRO: ZeRO-sharded training of Korean language models, with pause tokens."""

import sys
from types import TracebackType

__version__ = "0.1.0"


def _tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Ctrl-C while the libraries are still being imported, which takes seconds, is a word and no traceback."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _tell
