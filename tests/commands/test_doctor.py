"""`blipfit doctor --data` recognizes a data set by its files, and names what is wrong with that one."""

import json
from pathlib import Path

import pytest
from PIL import Image

from blipfit import data
from blipfit.commands import doctor
from blipfit.data import icons
from blipfit.errors import UserError


def check_data(folder: Path) -> dict[str, str]:
    return next(check for check in doctor.run(None, folder)["checks"] if check["check"] == f"data {folder}")


def test_every_prepared_folder_is_recognized(iconqa, tmp_path):
    icons.prepare(tmp_path / "icons", train=4, val=3, test=3)
    data.prepare_drawn("mme", tmp_path / "mme", 2)
    data.prepare_drawn("rewardbench", tmp_path / "rewardbench", 40)
    (tmp_path / "scienceqa").mkdir()
    (tmp_path / "scienceqa" / "scienceqa_val.json").write_text("[]")
    for number in range(3):
        Image.new("RGB", (8, 8), (90 * number, 0, 0)).save(tmp_path / f"{number}.png")
    lines = [json.dumps({"image": f"{number}.png", "question": "q", "answer": "a"}) for number in range(3)]
    (tmp_path / "own.jsonl").write_text("\n".join(lines))
    data.prepare("own", tmp_path / "own.jsonl", tmp_path / "own")
    assert data.detect(iconqa) == "iconqa"
    for name in ("icons", "mme", "rewardbench", "scienceqa", "own"):
        assert data.detect(tmp_path / name) == name
    results = {name: check_data(tmp_path / name) for name in ("mme", "scienceqa")}
    assert (results["mme"]["state"], results["mme"]["found"]) == ("ok", "mme: 16 test")
    assert results["scienceqa"]["state"] == "wrong"
    assert "scienceqa_train.json is missing" in results["scienceqa"]["found"]


def test_other_folders_are_no_data(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    for folder, reason in ((tmp_path, "holds no data set that blipfit reads"), (tmp_path / "none", "is not a folder")):
        with pytest.raises(UserError, match=reason):
            data.detect(folder)
