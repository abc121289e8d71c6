"""Every sublayer's pattern finds layers, and a line in the table is all that a new placement takes."""

import re
import subprocess
import sys

import pytest
from torch import nn

from blipfit import grid, sublayers
from blipfit.model import shapes


@pytest.mark.parametrize("family", ["t5", "vicuna"])
def test_every_pattern_finds_layers_of_the_published_model(family):
    modules = shapes.on_meta(grid.MODELS[family]).named_modules()
    names = [name for name, module in modules if isinstance(module, nn.Linear)]
    patterns = [*sublayers.QFORMER.values(), *(one[family] for one in sublayers.LANGUAGE.values())]
    found = [[name for name in names if re.fullmatch(pattern, name)] for pattern in patterns]
    assert all(found)
    assert len(set().union(*found)) == sum(map(len, found)), "no layer is of two sublayers"


def test_a_new_placement_is_a_line():
    """Resolved, counted under its name, and the published grid is what it was."""
    code = """
from blipfit import sublayers
sublayers.QFORMER["self_output"] = r"qformer\\.encoder\\.layer\\.\\d+\\.attention\\.output\\.dense"
from blipfit import grid
from blipfit.adapters import parameter_counts
from blipfit.model import shapes
recipe = grid.recipe("scienceqa", 28).override(["adapter.qformer=self_output"])
counts = parameter_counts.trained_parameters(shapes.on_meta(recipe.model.name), "t5", recipe.adapter)
print(counts["qformer self_output"])
print(grid.recipe("scienceqa", 28).adapter.qformer)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    trained, placed = done.stdout.splitlines()
    assert int(trained) == 12 * 8 * (768 + 768)
    assert placed == str(grid.recipe("scienceqa", 28).adapter.qformer)
