"""Prepared folders: images from outside the source, for every data set that is read from a folder."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from blipfit.commands import prepare
from blipfit.data import iconqa, mme, rewardbench, scienceqa
from blipfit.errors import UserError


@pytest.fixture
def mme_folder(tmp_path: Path, draw: Callable[..., Path]) -> Path:
    draw(tmp_path / "mme" / "color" / "a.png")
    (tmp_path / "mme" / "color" / "a.txt").write_text("Is it red?\tYes\nIs it blue?\tNo\n")
    return tmp_path / "mme"


@pytest.fixture
def pairs_folder(tmp_path: Path, draw: Callable[..., Path]) -> Path:
    pairs = []
    for number in range(10):
        draw(tmp_path / "pairs" / f"{number}.png", number)
        pair = {"id": f"VLFeedback-{number}", "query": "What?", "response": ["a", "b"], "human_ranking": [0, 1]}
        pairs.append(json.dumps(pair | {"image": f"{number}.png"}))
    (tmp_path / "pairs" / "test.jsonl").write_text("\n".join(pairs))
    return tmp_path / "pairs"


@pytest.mark.parametrize("name", ["scienceqa", "iconqa", "mme", "rewardbench"])
def test_linked_images_from_outside_need_a_permission(request: pytest.FixtureRequest, tmp_path: Path, name: str):
    fixture = {"mme": "mme_folder", "rewardbench": "pairs_folder"}.get(name, f"official_{name}")
    source: Path = request.getfixturevalue(fixture)
    module = {"scienceqa": scienceqa, "iconqa": iconqa, "mme": mme, "rewardbench": rewardbench}[name]
    image = next(source.rglob("*.png"))
    outside = tmp_path / "private.png"
    image.rename(outside)
    image.symlink_to(outside)
    with pytest.raises(UserError, match=r"is outside the data folder .*private\.png.*--allow-outside"):
        module.prepare(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report = module.prepare(source, tmp_path / "out", allow_outside=True)
    assert report.images["copied from outside the data folder"] == 1
    assert outside.stat().st_nlink == 1
    assert not any(file.is_symlink() for file in (tmp_path / "out").rglob("*"))


def test_a_data_folder_may_be_reached_by_a_link(mme_folder: Path, tmp_path: Path):
    (tmp_path / "link").symlink_to(mme_folder)
    assert mme.prepare(tmp_path / "link", tmp_path / "out").images == {"linked": 1}


@pytest.mark.parametrize(
    ("dataset", "source", "options", "message"),
    [
        ("mme", "folder", {"skip_bad": True}, "--skip-bad is for own data"),
        ("icons", None, {"skip_bad": True}, "--skip-bad is for own data"),
        ("icons", None, {"allow_outside": True}, "--allow-outside is for data that is read from a folder"),
        ("mme", "icons", {"allow_outside": True}, "--allow-outside is for data that is read from a folder"),
    ],
)
def test_options_that_do_not_fit(tmp_path: Path, dataset: str, source: str | None, options: dict, message: str):
    with pytest.raises(UserError, match=message):
        prepare.run(dataset, source, tmp_path / "out", **options)


def test_published_data_sets_drop_transparency(
    official_scienceqa: Path, official_iconqa: Path, mme_folder: Path, tmp_path: Path
):
    scienceqa.prepare(official_scienceqa, tmp_path / "s")
    iconqa.prepare(official_iconqa, tmp_path / "i")
    loaded = [scienceqa.load(tmp_path / "s", "test"), iconqa.load(tmp_path / "i", "test"), mme.load(mme_folder, "test")]
    assert {question.transparency for questions in loaded for question in questions} == {"dropped"}
