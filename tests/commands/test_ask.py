"""Asking, describing and searching from the command line: records, and a sheet of what was found."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from blipfit.commands import ask, caption, search
from blipfit.data import icons
from blipfit.errors import UserError


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


@pytest.fixture
def mixed(folder, tmp_path):
    """Two images, a cut one, a web page, and files that are passed over."""
    place = tmp_path / "photos"
    (place / ".thumbnails").mkdir(parents=True)
    for number in range(2):
        (place / f"{number}.png").write_bytes((folder / f"{number}.png").read_bytes())
    (place / "cut.png").write_bytes((folder / "0.png").read_bytes()[:100])
    (place / "page.jpg").write_text("<html></html>")
    (place / "._0.png").write_bytes(b"\0\5\x16\7")
    (place / ".thumbnails" / "0.png").write_bytes((folder / "2.png").read_bytes())
    return place


def test_bad_files_are_named_and_left_out_of_a_search(model, mixed, tmp_path, capsys):
    record = search.run(model, mixed, "a red star", 9, tmp_path / "sheet.png")
    assert sorted(Path(entry["image"]).name for entry in record["found"]) == ["0.png", "1.png"]
    assert [Path(entry["image"]).name for entry in record["left_out"]] == ["cut.png", "page.jpg"]
    errors = capsys.readouterr().err.splitlines()[:2]  # then: features are computed
    assert [line.startswith("left out: ") for line in errors] == [True, True]
    assert record["left_out"][1]["reason"] in errors[1]


def test_bad_files_are_named_and_left_out_of_captions(model, mixed, capsys):
    records = caption.run(model, [mixed, mixed / "none.png"], "caption")
    by_name = {Path(record["image"]).name: record for record in records}
    assert list(by_name) == ["0.png", "1.png", "cut.png", "page.jpg", "none.png"]
    assert by_name["1.png"]["caption"] == model.caption(mixed / "1.png")
    assert by_name["cut.png"]["caption"] is None
    assert "is a web page" in by_name["page.jpg"]["reason"]
    assert len(caption.render(records)) == 2
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_only_bad_files_are_an_error(model, mixed, tmp_path):
    with pytest.raises(UserError, match=r"^\S*page\.jpg is a web page"):
        caption.run(model, [mixed / "page.jpg"], "caption")
    with pytest.raises(UserError, match="none of 2 images can be used; the first: "):
        caption.run(model, [mixed / "page.jpg", mixed / "cut.png"], "caption")
    for number in range(2):
        (mixed / f"{number}.png").unlink()
    with pytest.raises(UserError, match="none of 2 images can be used"):
        search.run(model, mixed, "a red star", 9, tmp_path / "sheet.png")


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
