"""Figures in files, with a font that has Hangul where there is one."""

import functools
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

from kozero.errors import first_line
from kozero.folder import write_bytes

HANGUL_FONTS = ("NanumGothic", "Noto Sans CJK KR", "Noto Sans KR", "Malgun Gothic", "Apple SD Gothic Neo", "UnDotum")


def save_figure(path: Path, draw: Callable[[Any], None], size: tuple[float, float]) -> bool:
    """Draw a figure of `size` inches into a PNG. One that cannot be drawn is told in a line and ends nothing, since its
    numbers are kept elsewhere.

    Returns: whether the file was written.
    """
    try:
        import matplotlib as mpl  # imported here: it takes a second, and few need it
        from matplotlib.figure import Figure

        png = BytesIO()
        with mpl.rc_context({"font.family": fonts(), "text.parse_math": False}):  # a $ in a path is a character
            figure = Figure(figsize=size, layout="constrained")
            draw(figure)
            figure.savefig(png, dpi=110, metadata={"Software": None})
        write_bytes(path, png.getvalue())
    except Exception as error:
        print(f"warning: {path}: could not be drawn ({first_line(error)})", file=sys.stderr)
        return False
    return True


@functools.cache
def fonts() -> list[str]:
    """The usual font, then one for Hangul if the machine has any."""
    from matplotlib import font_manager

    known = {font.name for font in font_manager.fontManager.ttflist}
    return ["DejaVu Sans", *[name for name in HANGUL_FONTS if name in known][:1]]


def whole_numbers(axes: Any) -> None:
    """Ticks of the x axis at whole numbers alone."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
