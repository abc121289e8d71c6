"""Figures are written with any name of a run or model in them."""

import pytest
from matplotlib.figure import Figure

from blipfit.report import figure_files
from hostile_inputs import TEXTS


@pytest.mark.parametrize("suffix", [".svg", ".png", ".pdf"])
@pytest.mark.filterwarnings("ignore:Glyph:UserWarning")  # the font lacks some characters
def test_names_are_no_formulas(tmp_path, suffix):
    figure = Figure()
    axes = figure.subplots()
    for number, name in enumerate(name for name in TEXTS if len(name) < 400):
        axes.plot([number], [number], label=f"x{name} $x^{{2 $")
    axes.legend()
    axes.set_title("$\\frac{ $ \x1b[31m")
    file = tmp_path / f"figure{suffix}"
    figure_files.save_figure(figure, file, 50)
    assert file.stat().st_size > 1000
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
