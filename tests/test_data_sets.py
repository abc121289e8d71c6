"""A module and a line in the table are all that a new data set takes."""

import subprocess
import sys
from pathlib import Path


def test_a_new_data_set_is_a_module_and_a_line(tmp_path: Path):
    code = f"""
import sys, types
from pathlib import Path
from blipfit import data_sets
module = types.ModuleType("blipfit.data.mine")
module.load = lambda folder, split: [(folder.name, split)]
module.prepare = lambda source, to: (source, to)
sys.modules[module.__name__] = module
data_sets.DATA_SETS["mine"] = data_sets.DataSet("mine", "vqa-v1", open=True)
from blipfit import data, grid
print(data.load("mine", Path({str(tmp_path)!r}), "val"), data.prepare("mine", 1, 2))
recipe = grid.recipe("mine", 28)
print(recipe.data.prompt, recipe.data.images, recipe.evaluation.method)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"[({tmp_path.name!r}, 'val')] (1, 2)", "vqa-v1 shared generation"]
