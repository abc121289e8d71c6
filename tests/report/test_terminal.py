"""What a line says of an experiment."""

import pytest
from rich.console import Console
from rich.table import Table

from blipfit.recipe import AdapterConfig
from blipfit.report import terminal


@pytest.mark.parametrize(
    ("adapter", "told"),
    [
        (AdapterConfig(qformer="full", llm=("attn",)), "QF full · LLM attn"),
        (AdapterConfig(method="adalora", qformer=("ffn",)), "QF ffn · AdaLoRA"),
        (
            AdapterConfig(method="ia3", llm=("attn", "ffn"), llm_layers=(0, 1, 3)),
            "LLM attn+ffn in blocks 0–1, 3 · (IA)³",
        ),
        (AdapterConfig(), "only what is always trained"),
    ],
)
def test_a_placement_names_its_method(adapter, told):
    assert terminal.format_placement(adapter) == terminal.format_placement(adapter.model_dump()) == told


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a/x.png", "b/y.png"], ["x.png", "y.png"]),
        (["a/1/image.png", "a/2/image.png", "c/3.png"], ["1/image.png", "2/image.png", "3.png"]),
        (["a/1/image.png", "b/1/image.png"], ["a/1/image.png", "b/1/image.png"]),
        (["image.png", "a/image.png"], ["image.png", "a/image.png"]),
        (["tiny-t5"], ["tiny-t5"]),
    ],
)
def test_equal_names_are_told_apart_by_their_folders(paths, names):
    assert terminal.distinct_names(paths) == names


def test_only_methods_with_a_rank_show_one():
    def row(**adapter):
        record = {"dataset": "own", "experiment": "1", "metrics": {}, "best_epoch": 1, "epochs": 2, "seconds": 3.0}
        record |= {"trained_parameters": 4, "trained_share": 0.5, "recipe": {"adapter": adapter}}
        return [next(iter(column.cells)) for column in terminal.results_table([record]).columns]

    assert row(qformer=("ffn",), llm=(), rank=4)[2:4] == ["QF ffn", "4"]  # as runs before there were methods
    assert row(qformer=("ffn",), llm=(), rank=4, method="dora")[2:4] == ["QF ffn · DoRA", "4"]
    assert row(qformer=("ffn",), llm=(), rank=8, method="ia3")[2:4] == ["QF ffn · (IA)³", "–"]


def test_a_narrow_terminal_cuts_no_number(monkeypatch, capsys):
    table = Table("id", "trained parameters", "accuracy")
    table.add_row("60", "187,262,464", "88.3 [84.2–91.5]")
    monkeypatch.setattr(terminal, "console", lambda: Console(width=24))
    terminal.print_record({}, False, lambda record: table)
    printed = capsys.readouterr().out
    assert "…" not in printed
    lines = [line.split("│")[1:-1] for line in printed.splitlines() if line.startswith("│")]
    assert ["".join(cells).replace(" ", "") for cells in zip(*lines, strict=True)] == [
        "60",
        "187,262,464",
        "88.3[84.2–91.5]",
    ]
