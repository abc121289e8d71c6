"""The table and the heat map of AdaLoRA's ranks, from a run folder alone."""

import json
from pathlib import Path

import pytest
from PIL import Image

from blipfit import grid, run_folder
from blipfit.adapters.placement import component_of
from blipfit.commands import ranks
from blipfit.errors import UserError
from blipfit.report import terminal
from blipfit.run_folder import Inputs, Run
from blipfit.training import loop
from blipfit.training.model_cache import ModelCache

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
    mine.claim(recipe, Inputs("questions"))
    run_folder.write_json(mine.ranks_file, HISTORY)
    run_folder.write_json(mine.result_file, {})
    return mine.folder


def test_ranks_are_summed_by_sublayer(folder):
    (record,) = ranks.run([folder])
    assert record["sublayers"] == {
        "qformer self_attn": {"layers": 2, "start": 6, "kept": 6, "empty": 0, "over_training": [6, 6]},
        "llm attn": {"layers": 2, "start": 6, "kept": 2, "empty": 1, "over_training": [5, 2]},
    }
    assert sum(record["ranks"].values()) == record["budget"]
    assert json.loads(json.dumps(record)) == record
    with Image.open(record["picture"]) as picture:
        assert picture.width > 500


def test_ranks_are_shown_by_layer(folder, capsys):
    (record,) = ranks.run([folder])
    assert ranks.ranks_by_block(record["ranks"])["qformer.encoder.layer.*.attention.attention.query"] == {0: 3, 3: 3}
    assert ranks.ranks_by_block(record["ranks"])["language_model.encoder.block.*.layer.0.SelfAttention.q"] == {1: 2}
    first, second, last = ranks.run_tables(record)
    assert [column.header for column in second.columns] == ["module", "0", "1", "3"]
    assert list(first.columns[3].cells) == ["6", "2", "8"]
    assert last.endswith("ranks.png")
    terminal.console().print(first, second)


def test_other_runs_have_no_ranks_to_show(tmp_path):
    recipe = grid.recipe("icons", 30, "tiny")
    mine = Run.of(tmp_path, recipe)
    mine.claim(recipe, Inputs("questions"))
    with pytest.raises(UserError, match="was trained with lora"):
        ranks.run([mine.folder])


def test_an_unfinished_run_is_told(folder):
    Run(folder).result_file.unlink()
    with pytest.raises(UserError, match="is not finished"):
        ranks.run([folder])


def test_several_runs_stand_side_by_side(iconqa, tmp_path, small, capsys):
    """Of two trainings, one of which has no rank in the Q-Former."""
    own = ["adapter.method=adalora", "adapter.adalora.delta_t=2", "training.batch_size=2", "training.max_epochs=3"]
    made = [grid.recipe("iconqa", n, str(small["t5"])).override(own) for n in (30, 2)]
    made[1] = made[1].override(["adapter.qformer=[]", "training.learning_rate=5e-4"])
    done = loop.train(made, iconqa, tmp_path, model_cache=ModelCache("cpu", store=tmp_path / "features"))
    records = ranks.run([run.folder for run in done])
    assert [record["title"] for record in records] == ["iconqa/30", "iconqa/2"]
    table, *pictures = ranks.render(records)
    assert [picture.rpartition("/")[2] for picture in pictures] == ["ranks.png", "ranks.png"]
    terminal.console().print(table)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    found = {row[0]: row[1:] for row in rows if len(row) == 3}
    for number, one in enumerate(done):
        kept = one.result()["ranks"]
        assert found["ranks in all"][number] == str(sum(kept.values())) == str(records[number]["budget"])
        assert found["rank of a layer, start → end"][number] == f"3 → {sum(kept.values()) / len(kept):.2f}"
        for part in ("llm attn", "llm ffn", "qformer ffn"):
            mine = [rank for layer, rank in kept.items() if component_of(layer) == part]
            cell = found[part][number]
            if mine:
                assert cell.split()[:2] == [
                    f"{sum(mine) / len(mine):.2f}",
                    f"{100 * sum(mine) / sum(kept.values()):.0f}",
                ]
            else:
                assert cell == "–"
    assert found["llm attn"][1] == found["qformer ffn"][1] == "–"
    assert len(ranks.render(records[:1])) == 3
