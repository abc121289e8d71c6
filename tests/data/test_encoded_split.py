"""A split is loaded with prompts and tokens; invalid data and unknown prompts are errors."""

import json
import shutil
from pathlib import Path

import pytest

from blipfit.data import encoded_split
from blipfit.errors import UserError
from blipfit.recipe import DataConfig

CONFIG = DataConfig(name="iconqa", prompt="iconqa-v1")


def test_a_split_is_ready_for_the_model(backbone, iconqa):
    split = encoded_split.load(backbone.text, CONFIG, iconqa, "train")
    assert len(split) == len(split.questions) == len(split.prompted) == len(split.encoded) == 12
    first = split.prompted[0]
    assert first.prompt.startswith("<Image> Question: Which")
    assert first.target == first.candidates[split.questions[0].answer_index]
    assert split.encoded[0] == backbone.text.encode([first])[0]


def test_a_limit_keeps_the_first_questions(backbone, iconqa):
    complete = encoded_split.load(backbone.text, CONFIG, iconqa, "val")
    limited = encoded_split.load(backbone.text, CONFIG.model_copy(update={"limit": 2}), iconqa, "val")
    assert limited.questions == complete.questions[:2]


def test_an_unknown_prompt_is_an_error(backbone, iconqa):
    with pytest.raises(UserError, match=r"unknown prompt 'iconqa-v2'; did you mean 'iconqa-v1'"):
        encoded_split.load(backbone.text, DataConfig(name="iconqa", prompt="iconqa-v2"), iconqa, "val")


def test_an_answer_outside_the_choices_is_an_error(backbone, iconqa, tmp_path):
    data = Path(shutil.copytree(iconqa, tmp_path / "data"))
    file = data / "annotations" / "val.json"
    entries = json.loads(file.read_text())
    entries[1]["answer"] = 9
    file.write_text(json.dumps(entries))
    with pytest.raises(UserError, match="entry 2: 'answer' is 9 but there are"):
        encoded_split.load(backbone.text, CONFIG, data, "val")
