"""Hostile adapter folders: an adapter is read with finite tensors, or refused with a UserError."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from safetensors import safe_open

import checkpoints
from blipfit.adapters import open_model, peft_format
from blipfit.adapters.bank import Bank
from blipfit.adapters.peft_format import LORA_FILE, TRAINED_FILE
from blipfit.model.backbone import Backbone
from blipfit.recipe import AdapterConfig, ModelConfig
from hostile_inputs import changed, changed_bytes, is_user_error, json_files, texts

ADAPTERS = {
    "lora": AdapterConfig(qformer=("self_attn",), llm=("attn",), rank=2),
    "full": AdapterConfig(qformer="full", llm=("ffn",), rank=2),
    "adalora": AdapterConfig(method="adalora", llm=("attn",), rank=2),
    "ia3": AdapterConfig(method="ia3", llm=("attn",)),
}
CONFIG_FILE = "adapter_config.json"


@pytest.fixture(scope="module")
def model(small) -> Backbone:
    return checkpoints.load(small["t5"])


@pytest.fixture(params=ADAPTERS)
def folder(request, model, small, tmp_path) -> Path:
    """The folder of a trained adapter, by each way to train."""
    adapter = ADAPTERS[request.param]
    bank = Bank(model, [adapter], [0])
    bank.values.add_(0.01)
    state = bank.state(0)
    bank.remove()
    peft_format.save(tmp_path / "adapter", adapter, state, peft_format.BaseModel.of(model))
    return tmp_path / "adapter"


def header(content: bytes) -> dict[str, Any]:
    """The header of a safetensors file."""
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def with_header(content: bytes, text: bytes, length: int | None = None) -> bytes:
    """A safetensors file with another header; `length`: the header's length by the file's first bytes."""
    tensors = content[8 + int.from_bytes(content[:8], "little") :]
    return (len(text) if length is None else length).to_bytes(8, "little") + text + tensors


@st.composite
def safetensors_files(draw: st.DrawFn, valid: bytes) -> bytes:
    """A safetensors file with faults in its header, in its metadata, or anywhere in its bytes."""
    match draw(st.sampled_from(["header", "metadata", "adapter", "length", "bytes", "tail"])):
        case "header":
            return with_header(valid, draw(json_files(header(valid))))
        case "metadata":
            values = header(valid)
            values["__metadata__"] = draw(changed(values.get("__metadata__", {"format": "pt"})))
            return with_header(valid, json.dumps(values).encode())
        case "adapter":
            values = header(valid)
            metadata = values.get("__metadata__", {})
            key = draw(st.sampled_from(sorted(metadata) or ["format"]))
            is_json = metadata.get(key, "").startswith("{")
            changes = changed(json.loads(metadata[key])).map(json.dumps) if is_json else texts()
            values["__metadata__"] = {**metadata, key: draw(changes)}
            return with_header(valid, json.dumps(values).encode())
        case "length":
            length = draw(st.sampled_from([0, 1, 2, 7, 2**31, 2**40, 2**63, 2**64 - 1]))
            return with_header(valid, json.dumps(header(valid)).encode(), length)
        case "bytes":
            return draw(changed_bytes(valid, max_position=1000))
    return draw(changed_bytes(valid))


def check(model: Backbone, folder: Path) -> None:
    """Read, locate and install an adapter; the model is without it afterwards."""
    base = ModelConfig(name=model.name)
    is_user_error(partial(peft_format.read_saved, folder))
    is_user_error(partial(open_model.locate_adapter, folder))
    is_user_error(partial(open_model.locate_adapter, folder, base))
    before = {name: tensor.clone() for name, tensor in list(model.hf.state_dict().items())[:5]}
    if not is_user_error(partial(peft_format.read, folder)):
        _, state = peft_format.read(folder)
        assert all(tensor.isfinite().all() for tensor in state.values() if tensor.is_floating_point())
    banks: list[Bank] = []
    if not is_user_error(lambda: banks.append(peft_format.install(model, folder)[0])):
        banks[0].remove()
    after = model.hf.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_damaged_adapter_is_refused(for_all, model, folder):
    names = [name for name in (TRAINED_FILE, LORA_FILE, CONFIG_FILE) if (folder / name).exists()]
    valid = {name: (folder / name).read_bytes() for name in names}

    def files(name: str) -> st.SearchStrategy[tuple[str, bytes]]:
        is_config = name == CONFIG_FILE
        content = json_files(json.loads(valid[name])) if is_config else safetensors_files(valid[name])
        return st.tuples(st.just(name), content)

    def check_file(change: tuple[str, bytes]) -> None:
        name, content = change
        (folder / name).write_bytes(content)
        check(model, folder)
        (folder / name).write_bytes(valid[name])

    for_all(15, check_file, st.sampled_from(names).flatmap(files))
    check(model, folder)
    assert not is_user_error(partial(peft_format.read, folder))


def test_files_of_two_adapters_do_not_fit_each_other(model, folder, tmp_path):
    """The files of one adapter beside those of another."""
    other = tmp_path / "other"
    adapter = AdapterConfig(qformer=("ffn",), rank=3)
    bank = Bank(model, [adapter], [0])
    peft_format.save(other, adapter, bank.state(0), model.name)
    bank.remove()
    for name in (TRAINED_FILE, LORA_FILE):
        shutil.copytree(folder, tmp_path / name)
        shutil.copyfile(other / name, tmp_path / name / name)
        assert is_user_error(partial(peft_format.install, model, tmp_path / name))


def change_header(folder: Path, key: str, change: Callable[[Any], None]) -> None:
    """Change the value of a key, which is JSON, in the metadata of the trained tensors."""
    content = (folder / TRAINED_FILE).read_bytes()
    values = header(content)
    value = json.loads(values["__metadata__"][key])
    change(value)
    values["__metadata__"][key] = json.dumps(value)
    (folder / TRAINED_FILE).write_bytes(with_header(content, json.dumps(values).encode()))


@pytest.mark.parametrize("rank", [1, 3, 2**14, 2**40])
def test_the_rank_must_be_that_of_the_tensors(folder, rank):
    """Before a bank of that rank is made, which takes memory; AdaLoRA pads tensors of lower ranks."""
    can_be_padded = peft_format.read(folder)[0].method == "adalora" and rank in (3, 2**14)
    change_header(folder, "adapter", lambda adapter: adapter.update(rank=rank))
    assert is_user_error(partial(peft_format.read, folder)) != can_be_padded


@pytest.mark.parametrize("folder", ["adalora"], indirect=True)
@pytest.mark.parametrize("size", [-1, 0, 2**40, 1.5, "1", None])
def test_impossible_sizes_of_layers_are_refused(folder, size):
    change_header(folder, "layers", lambda layers: layers[min(layers)].__setitem__(0, size))
    assert is_user_error(partial(peft_format.read, folder))


def test_the_valid_folder_is_read(folder):
    with safe_open(folder / TRAINED_FILE, "pt") as file:
        assert AdapterConfig.model_validate_json(file.metadata()["adapter"]) == peft_format.read(folder)[0]
