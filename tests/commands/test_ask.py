"""Asking, describing and searching from the command line: records, and a sheet of what was found."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from blipfit.commands import ask, caption, search
from blipfit.data import icons


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    found = tmp_path_factory.mktemp("pictures")
    for index in range(6):
        icons.draw(icons.make_scene(31, index)).save(found / f"{index}.png")
    return found


@pytest.fixture(scope="module")
def model():
    return ask.load_model("tiny", None, "cpu")


def test_asking(model, folder):
    record = ask.run(model, folder / "0.png", "How many shapes are there?", [], None, "short-answer")
    assert record["answer"] == model.ask(folder / "0.png", "How many shapes are there?")
    assert ask.render(record) == [record["answer"]]
    ranked = ask.run(model, folder / "0.png", "How many shapes are there?", ["1", "2"], "iconqa-v1", "short-answer")
    assert ranked["answer"] == ranked["choices"][0]["choice"]
    assert len(ask.render(ranked)) == 2
    assert ask.render(ranked)[0].endswith(ranked["answer"])


def test_describing(model, folder):
    images = sorted(folder.glob("*.png"))
    records = caption.run(model, images, "caption")
    assert [record["image"] for record in records] == [str(image) for image in images]
    assert records[2]["caption"] == model.caption(images[2])


def test_searching_draws_a_sheet(model, folder, tmp_path):
    sheet = tmp_path / "new" / "sheet.png"
    record = search.run(model, folder, "a red star", 4, sheet)
    with Image.open(sheet) as drawn:
        assert drawn.size == (3 * 248 + 24, drawn.height)
        assert len(np.unique(np.asarray(drawn))) > 4
    lines = search.render(record)
    assert len(record["found"]) == 4
    assert all(one["image"] in line for one, line in zip(record["found"], lines, strict=False))
    assert str(sheet) in lines[-1]
    assert list(sheet.parent.iterdir()) == [sheet]
