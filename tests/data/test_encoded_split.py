"""Questions become prompts and tokens; what cannot be right is refused."""

import json
import shutil
from pathlib import Path

import pytest

from blipfit.data import encoded_split
from blipfit.errors import UserError
from blipfit.recipe import DataConfig

PART = DataConfig(name="iconqa", prompt="iconqa-v1")


def test_a_split_is_ready_for_the_model(backbone, iconqa):
    read = encoded_split.load(backbone.text, PART, iconqa, "train")
    assert len(read) == len(read.questions) == len(read.prompted) == len(read.encoded) == 12
    first = read.prompted[0]
    assert first.prompt.startswith("<Image> Question: Which")
    assert first.target == first.candidates[read.questions[0].answer_index]
    assert read.encoded[0] == backbone.text.encode([first])[0]


def test_a_limit_keeps_the_first(backbone, iconqa):
    whole = encoded_split.load(backbone.text, PART, iconqa, "val")
    part = encoded_split.load(backbone.text, PART.model_copy(update={"limit": 2}), iconqa, "val")
    assert part.questions == whole.questions[:2]


def test_an_unknown_prompt_is_told(backbone, iconqa):
    with pytest.raises(UserError, match=r"unknown prompt 'iconqa-v2'; did you mean 'iconqa-v1'"):
        encoded_split.load(backbone.text, DataConfig(name="iconqa", prompt="iconqa-v2"), iconqa, "val")


def test_an_answer_outside_the_choices_is_told(backbone, iconqa, tmp_path):
    data = Path(shutil.copytree(iconqa, tmp_path / "data"))
    file = data / "annotations" / "val.json"
    entries = json.loads(file.read_text())
    entries[1]["answer"] = 9
    file.write_text(json.dumps(entries))
    with pytest.raises(UserError, match="entry 2: 'answer' is 9 but there are"):
        encoded_split.load(backbone.text, PART, data, "val")
