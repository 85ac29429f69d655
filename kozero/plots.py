"""Figures in files, with a font that has Hangul where there is one."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

HANGUL_FONTS = ("NanumGothic", "Noto Sans CJK KR", "Noto Sans KR", "Malgun Gothic", "Apple SD Gothic Neo", "UnDotum")


def save_figure(path: Path, draw: Callable[[Any], None], size: tuple[float, float]) -> None:
    """Draw a figure of `size` inches into a PNG."""
    import matplotlib as mpl  # imported here: it takes a second, and few need it
    from matplotlib.figure import Figure

    with mpl.rc_context({"font.family": fonts()}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(path, dpi=110, metadata={"Software": None})


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
