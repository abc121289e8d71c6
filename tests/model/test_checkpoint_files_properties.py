"""Hostile checkpoint folders: the model is loaded, or refused with a UserError before memory is taken for it."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
from hypothesis import strategies as st

from blipfit.errors import UserError
from blipfit.model import checkpoint_files, loading
from blipfit.recipe import ModelConfig
from hostile_inputs import changed_bytes, is_user_error, json_files, texts, values

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def folder(small, family, tmp_path) -> Path:
    return Path(shutil.copytree(small[family], tmp_path / "model"))


def check(folder: Path) -> None:
    """What is checked of a folder before the model is built, and what identifies it."""
    is_user_error(partial(checkpoint_files.check, folder, "x", loading.build_on_meta))
    is_user_error(partial(loading.base_sha256, ModelConfig(name=str(folder))))


def test_a_changed_configuration_is_used_or_refused(for_all, folder):
    valid = (folder / CONFIG).read_bytes()
    config = json.loads(valid)
    sections = [name for name, value in config.items() if isinstance(value, dict)]
    fields = [(None, name) for name in config] + [(part, name) for part in sections for name in config[part]]

    def check_content(content: bytes) -> None:
        (folder / CONFIG).write_bytes(content)
        check(folder)

    def check_field(field: tuple[str | None, str], value: object) -> None:
        section, name = field
        changed_config = json.loads(valid)
        (changed_config[section] if section else changed_config)[name] = value
        check_content(json.dumps(changed_config).encode())

    for_all(15, check_content, json_files(config))
    for_all(25, check_field, st.sampled_from(fields), values())


def test_damaged_weights_are_refused(for_all, folder):
    valid = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(valid[:8], "little")
    header = json.loads(valid[8 : 8 + length])

    def check_start(start: bytes, end: int) -> None:
        (folder / WEIGHTS).write_bytes(start + valid[end:])
        check(folder)

    headers = json_files(header).map(lambda text: len(text).to_bytes(8, "little") + text)
    lengths = st.sampled_from([0, 1, 2**31, 2**40, 2**63, 2**64 - 1]).map(lambda number: number.to_bytes(8, "little"))
    for_all(10, check_start, headers, st.just(8 + length))
    for_all(6, check_start, lengths, st.just(8))
    for_all(10, check_start, changed_bytes(valid[:2000], 2), st.just(2000))


def test_the_digest_of_damaged_weights_is_one_sentence(folder):
    (folder / WEIGHTS).write_bytes(b"\x02\0\0\0\0\0\0\0{]")
    with pytest.raises(UserError, match="is damaged"):
        loading.base_sha256(ModelConfig(name=str(folder)))


def test_a_changed_index_is_refused(for_all, folder):
    (folder / WEIGHTS).unlink()

    def check_content(content: bytes) -> None:
        (folder / INDEX).write_bytes(content)
        check(folder)

    for_all(25, check_content, json_files({"metadata": {"total_size": 1}, "weight_map": {"a": "x.safetensors"}}))


def test_changed_files_of_the_tokenizers_are_used_or_refused(for_all, folder):
    """The whole way to a loaded model, also with a changed configuration of the tokenizers."""
    files = [path for path in folder.rglob("*.json") if "tokenizer" in path.name or path.name == CONFIG]
    valid = {file: file.read_bytes() for file in files}

    def contents(file: Path) -> st.SearchStrategy[tuple[Path, bytes]]:
        return st.tuples(st.just(file), json_files(json.loads(valid[file])))

    def check_load(change: tuple[Path, bytes]) -> None:
        file, content = change
        file.write_bytes(content)
        is_user_error(partial(loading.load, ModelConfig(name=str(folder))))
        file.write_bytes(valid[file])

    for_all(6, check_load, st.sampled_from(files).flatmap(contents))


def test_any_name_of_a_model_is_located_or_refused(for_all, monkeypatch):
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "1")
    names = texts() | st.text("tiny-5/.~\\\0é ", max_size=12)

    def check_name(name: str) -> None:
        is_user_error(lambda: loading.locate_checkpoint(ModelConfig(name=name)))

    for_all(60, check_name, names)
