"""The notebooks run top to bottom on the miniature, as they are, and hold no code that belongs in the package."""

import ast
import json
from pathlib import Path

import matplotlib
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
LONGEST = 20


def _cells(file: Path) -> list[str]:
    read = json.loads(file.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in read["cells"] if cell["cell_type"] == "code"]


def test_there_are_three():
    assert [file.stem for file in NOTEBOOKS] == ["evaluation", "finetuning_lora", "mme"]


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_cells_are_short_and_define_nothing(file):
    read = json.loads(file.read_text(encoding="utf-8"))
    assert (read["nbformat"], read["cells"][0]["cell_type"]) == (4, "markdown")
    assert not [cell for cell in read["cells"] if cell.get("outputs") or cell.get("execution_count")]
    for cell in _cells(file):
        assert len(cell.splitlines()) <= LONGEST
        assert not [n for n in ast.walk(ast.parse(cell)) if isinstance(n, ast.FunctionDef | ast.ClassDef)], cell
    assert _cells(file)[0].startswith("MODEL = ")


TRAINING = ("evaluation", "finetuning_lora")


@pytest.mark.parametrize(
    "file",
    [pytest.param(f, marks=[pytest.mark.slow] * (f.stem in TRAINING), id=f.stem) for f in NOTEBOOKS],
)
def test_it_runs(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    there: dict = {}
    for cell in _cells(file):
        exec(compile(cell, file.name, "exec"), there)
    drawn = plt.get_fignums()
    plt.close("all")
    assert len(drawn) >= 3
    if file.stem == "evaluation":
        assert there["record"]["difference"]["rougeL"]["interval"][0] > 0
    if file.stem == "mme":
        assert there["mme_scores"]["perception"] == there["record"]["base"]["perception"] > 400
    if file.stem == "finetuning_lora":
        assert there["metrics_by_variant"]["tuned"]["questions"] == 160
