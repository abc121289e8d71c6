"""Asking, describing and searching from the command line: records, and a sheet of what was found."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from blipfit.commands import ask as using
from blipfit.data import icons


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    found = tmp_path_factory.mktemp("pictures")
    for index in range(6):
        icons.draw(icons.scene(31, index)).save(found / f"{index}.png")
    return found


@pytest.fixture(scope="module")
def model():
    return using.loaded("tiny", None, "cpu")


def test_asking(model, folder):
    record = using.ask(model, folder / "0.png", "How many shapes are there?", [], None, "short-answer")
    assert record["answer"] == model.ask(folder / "0.png", "How many shapes are there?")
    assert using.answered(record) == [record["answer"]]
    ranked = using.ask(model, folder / "0.png", "How many shapes are there?", ["1", "2"], "iconqa-v1", "short-answer")
    assert ranked["answer"] == ranked["choices"][0]["choice"]
    assert len(using.answered(ranked)) == 2
    assert using.answered(ranked)[0].endswith(ranked["answer"])


def test_describing(model, folder):
    images = sorted(folder.glob("*.png"))
    records = using.caption(model, images, "caption")
    assert [record["image"] for record in records] == [str(image) for image in images]
    assert records[2]["caption"] == model.caption(images[2])


def test_searching_draws_a_sheet(model, folder, tmp_path):
    sheet = tmp_path / "new" / "sheet.png"
    record = using.search(model, folder, "a red star", 4, sheet)
    with Image.open(sheet) as drawn:
        assert drawn.size == (3 * 248 + 24, drawn.height)
        assert len(np.unique(np.asarray(drawn))) > 4
    lines = using.results(record)
    assert len(record["found"]) == 4
    assert all(one["image"] in line for one, line in zip(record["found"], lines, strict=False))
    assert str(sheet) in lines[-1]
    assert list(sheet.parent.iterdir()) == [sheet]
