"""The table and the heat map of AdaLoRA's ranks, from a run folder alone."""

import json
from pathlib import Path

import pytest
from PIL import Image

from blipfit import grid, run
from blipfit.errors import UserError
from blipfit.report import ranks, terminal
from blipfit.run import Run

HISTORY = {
    "layers": [
        "qformer.encoder.layer.0.attention.attention.query",
        "qformer.encoder.layer.3.attention.attention.query",
        "language_model.encoder.block.1.layer.0.SelfAttention.q",
        "language_model.decoder.block.0.layer.1.EncDecAttention.v",
    ],
    "start_rank": 3,
    "budget": 8,
    "steps": [10, 20],
    "ranks": [[3, 3, 3, 2], [3, 3, 2, 0]],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    recipe = grid.recipe("icons", 30, "tiny").override(["adapter.method=adalora"])
    mine = Run.of(tmp_path, recipe)
    mine.claim(recipe, "questions")
    run.write_json(mine.ranks_file, HISTORY)
    run.write_json(mine.result_file, {})
    return mine.folder


def test_ranks_are_summed_by_sublayer(folder):
    record = ranks.examine(folder)
    assert record["sublayers"] == {
        "qformer self_attn": {"layers": 2, "start": 6, "kept": 6, "empty": 0, "over_training": [6, 6]},
        "llm attn": {"layers": 2, "start": 6, "kept": 2, "empty": 1, "over_training": [5, 2]},
    }
    assert sum(record["ranks"].values()) == record["budget"]
    assert json.loads(json.dumps(record)) == record
    with Image.open(record["picture"]) as picture:
        assert picture.width > 500


def test_ranks_are_shown_by_layer(folder, capsys):
    record = ranks.examine(folder)
    assert ranks.by_depth(record["ranks"])["qformer.encoder.layer.*.attention.attention.query"] == {0: 3, 3: 3}
    assert ranks.by_depth(record["ranks"])["language_model.encoder.block.*.layer.0.SelfAttention.q"] == {1: 2}
    first, second, last = ranks.table(record)
    assert [column.header for column in second.columns] == ["module", "0", "1", "3"]
    assert list(first.columns[3].cells) == ["6", "2", "8"]
    assert last.endswith("ranks.png")
    terminal.console().print(first, second)


def test_other_runs_have_no_ranks_to_show(tmp_path):
    recipe = grid.recipe("icons", 30, "tiny")
    mine = Run.of(tmp_path, recipe)
    mine.claim(recipe, "questions")
    with pytest.raises(UserError, match="was trained with lora"):
        ranks.examine(mine.folder)


def test_an_unfinished_run_is_told(folder):
    Run(folder).result_file.unlink()
    with pytest.raises(UserError, match="is not finished"):
        ranks.examine(folder)
