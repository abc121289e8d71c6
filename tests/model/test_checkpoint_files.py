"""What is read of a checkpoint before a model is built: configuration, names, shapes, digest."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoints
from blipfit.errors import UserError
from blipfit.model import checkpoint_files, clip, loading, tiny
from blipfit.recipe import ModelConfig


@pytest.fixture
def folder(small, tmp_path) -> Path:
    return Path(shutil.copytree(small["t5"], tmp_path / "copy"))


def change_config(folder: Path, section: str, field: str, value: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (config[section] if section else config)[field] = value
    (folder / "config.json").write_text(json.dumps(config))


def digest(folder: Path) -> str:
    return checkpoint_files.digest(checkpoint_files.weight_files(folder, "x"))


@pytest.mark.parametrize(
    ("section", "field", "value", "message"),
    [
        ("", "num_query_tokens", True, "not a whole number"),
        ("", "vision_config", [], "vision_config in config.json is"),
        ("", "text_config", None, "config.json"),
        ("", "dtype", [1, 2], "not the name of a dtype"),
        ("vision_config", "image_size", "224", "vision_config.image_size in config.json is '224'"),
        ("vision_config", "num_hidden_layers", 10**30, "vision_config.num_hidden_layers"),
        ("vision_config", "num_attention_heads", 5, "config.json cannot be used"),
        ("vision_config", "hidden_act", "no such", "config.json cannot be used"),
        ("qformer_config", "vocab_size", 10**9, "qformer_config.vocab_size"),
        ("qformer_config", "hidden_dropout_prob", 2, "qformer_config.hidden_dropout_prob"),
        ("qformer_config", "intermediate_size", 128, "but config.json asks for"),
        ("text_config", "d_model", 0.5, "text_config.d_model"),
        ("text_config", "decoder_start_token_id", 10**6, "text_config.decoder_start_token_id"),
        ("text_config", "model_type", 3, "config.json cannot be used"),
        ("text_config", "model_type", "bert", "is not supported"),
    ],
)
def test_an_impossible_configuration_is_one_sentence(folder, section, field, value, message):
    change_config(folder, section, field, value)
    with pytest.raises(UserError, match=message) as error:
        checkpoints.load(folder)
    assert len(str(error.value)) < 700
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["[]", "null", "3", '"x"', "", "[" * 5000])
def test_a_configuration_that_is_no_object_is_one_sentence(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match="cannot be loaded"):
        checkpoints.load(folder)


@pytest.mark.parametrize(
    ("section", "field"),
    [
        ("vision_config", "num_hidden_layers"),
        ("qformer_config", "num_hidden_layers"),
        ("text_config", "num_layers"),
        ("text_config", "num_decoder_layers"),
    ],
)
def test_fewer_layers_than_the_weights_are_refused(folder, section, field):
    change_config(folder, section, field, 1)
    with pytest.raises(UserError, match=r"for which config\.json has no layer"):
        checkpoints.load(folder)


@pytest.mark.parametrize("section", ["", "vision_config", "qformer_config", "text_config"])
def test_a_kernel_of_the_hub_is_refused(folder, section):
    change_config(folder, section, "_attn_implementation", "someone/kernel")
    with pytest.raises(UserError, match="runs no code from the hub"):
        checkpoints.load(folder)


@pytest.mark.parametrize(
    "config",
    [
        {"attn_implementation": "someone/kernel"},
        {"text_config": {"_attn_implementation": "someone/kernel@main:f"}},
        {"attn_implementation": {"vision_config": "sdpa", "text_config": "someone/kernel"}},
        {"model_type": "clip", "vision_config": {"encoder": {"_attn_implementation_internal": "someone/kernel"}}},
    ],
)
def test_a_kernel_is_found_in_any_section_of_any_model(config):
    with pytest.raises(UserError, match="runs no code from the hub"):
        checkpoint_files.refuse_kernels(config, "model")
    checkpoint_files.refuse_kernels(json.loads(json.dumps(config).replace("someone/", "")), "model")


def test_a_clip_with_a_kernel_of_the_hub_is_refused(tmp_path):
    copy = shutil.copytree(tiny.clip_folder(), tmp_path / "clip")
    change_config(copy, "text_config", "_attn_implementation", "someone/kernel")
    with pytest.raises(UserError, match=r"text_config\._attn_implementation .* runs no code from the hub"):
        clip.load(str(copy))


def test_the_digest_is_of_the_content_and_not_of_the_files(folder, small):
    """One file or shards, in any order: the same tensors have the same digest."""
    expected = digest(small["t5"])
    assert digest(folder) == expected
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors, reverse=True)
    (folder / "model.safetensors").unlink()
    for number, part in enumerate((names[:7], names[7:])):
        save_file({name: tensors[name] for name in part}, folder / f"part{number}.safetensors", {"format": "pt"})
    weight_map = {name: f"part{int(name not in names[:7])}.safetensors" for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert digest(folder) == expected
    assert checkpoints.load(folder).base_sha256 == expected
    (folder / "part1.safetensors").unlink()
    with pytest.raises(UserError, match=r"part1.safetensors is missing"):
        checkpoints.load(folder)


def test_the_digest_depends_on_every_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    digests = {digest(folder)}
    for number, name in enumerate(sorted(tensors)[::9]):
        tensors[name].view(-1)[-1] += 1
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        digests.add(digest(folder))
        assert len(digests) == number + 2, name
    save_file({f"{name}x": tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    assert digest(folder) not in digests


def test_the_digest_does_not_depend_on_precision(small):
    exact, low = (checkpoints.load(small["t5"], precision=precision) for precision in ("fp32", "bf16"))
    assert exact.base_sha256 == low.base_sha256 == loading.base_sha256(ModelConfig(name=str(small["t5"])))


@pytest.mark.parametrize(
    "index", ["{", "[]", '{"weight_map": {}}', '{"weight_map": {"a": "../x"}}', '{"weight_map": {"a": 1}}']
)
def test_a_damaged_index_is_one_sentence(folder, index):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match="is damaged"):
        checkpoints.load(folder)


def test_non_finite_values_are_found_in_any_place():
    tensors = {"whole": torch.arange(3), "empty": torch.empty(0), "good": torch.ones(3, 4)}
    assert checkpoint_files.find_non_finite(tensors) is None
    for value in (float("nan"), float("inf"), float("-inf")):
        spoiled = torch.ones(3, 4, dtype=torch.bfloat16)
        spoiled[1, 2] = value
        assert checkpoint_files.find_non_finite(tensors | {"spoiled": spoiled}) == "spoiled"
