"""A tokenizer has the ids of the published one, from whichever files it is made."""

import json
import random
import shutil
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer, LlamaTokenizer

import checkpoints
from blipfit.errors import UserError
from blipfit.model import tokenizer_files

MODEL = checkpoints.TOKENIZERS / "llama" / "tokenizer.model"


@pytest.fixture
def only_sentencepiece(hub_like, tmp_path) -> Path:
    """A Vicuna checkpoint whose language model has a `tokenizer.model` and no `tokenizer.json`."""
    folder = tmp_path / "copy"
    checkpoints.write(folder, "vicuna", checkpoints.real_tokenizers("vicuna"))
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(MODEL.read_bytes())
    return folder


def random_texts(count: int) -> list[str]:
    draws = random.Random(0)
    words = ["of", "the", "are", "Context:", "7.5", "café", "中文", "😀", "\n", "\t", "(a)", "photosynthesis", "–"]
    return [
        "".join(draws.choice(words) + " " * draws.choice([0, 1, 1, 2, 3, 9]) for _ in range(12)) for _ in range(count)
    ]


def test_a_folder_with_only_a_sentencepiece_file_gives_its_ids(only_sentencepiece):
    language = checkpoints.load(only_sentencepiece).text.llm_tokenizer
    expected = SentencePieceProcessor(model_file=str(MODEL))
    assert language("of the  are", add_special_tokens=False).input_ids == [310, 278, 29871, 526]
    for text in [*random_texts(500), "  two spaces first", "", " "]:
        assert language(text, add_special_tokens=False).input_ids == expected.encode(text), text


def test_transformers_derives_other_ids():
    """What the correction is for; if this fails, transformers has been corrected."""
    stop = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "</s>")
    derived = LlamaTokenizer.from_pretrained(MODEL.parent, **stop)
    assert derived("of the  are", add_special_tokens=False).input_ids == [310, 278, 259, 598]


def test_a_tokenizer_json_derived_by_transformers_is_refused(hub_like, tmp_path):
    stop = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "</s>")
    derived = LlamaTokenizer.from_pretrained(MODEL.parent, **stop, pad_token="[PAD]")
    derived.add_tokens(["<image>"], special_tokens=True)
    qformer = checkpoints.real_tokenizers("vicuna")[1]
    folder = checkpoints.write(tmp_path / "x", "vicuna", (derived, qformer))
    with pytest.raises(UserError, match="gives other ids than the original for the text 'of the  are'"):
        checkpoints.load(folder)


def test_the_test_checkpoints_have_the_published_ids(hub_like):
    language = AutoTokenizer.from_pretrained(hub_like["vicuna"])
    assert language("of the  are", add_special_tokens=False).input_ids == [310, 278, 29871, 526]


def test_a_damaged_sentencepiece_file_is_one_sentence(only_sentencepiece):
    (only_sentencepiece / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(UserError, match="its tokenizer"):
        tokenizer_files.load_tokenizers(str(only_sentencepiece))


def test_code_in_a_tokenizer_folder_is_not_run(small, tmp_path):
    folder = Path(shutil.copytree(small["t5"], tmp_path / "copy"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\nclass Mine: pass\n")
    tokenizer_files.load_tokenizers(str(folder))
    assert not (tmp_path / "run").exists()
