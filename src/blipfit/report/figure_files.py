"""Write figures of matplotlib to files."""

from pathlib import Path
from typing import Any

from blipfit.file_writes import replacing
from blipfit.report import terminal


def save_figure(figure: Any, file: Path, dpi: int) -> None:
    """Write a figure as a whole file, in the format of its suffix; `dpi`: pixels per inch.

    Names of runs and models are written as they are: `$` begins no formula, and control characters become escapes.
    """
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)
        text.set_text(terminal.escape_controls(text.get_text()))
    with replacing(file) as temporary:
        figure.savefig(temporary, dpi=dpi)
