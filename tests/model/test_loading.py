"""Loading refuses checkpoints that would give silently wrong results, and its messages name the fix."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import InstructBlipForConditionalGeneration

import checkpoints
import reference
from blipfit.adapters.bank import Bank
from blipfit.errors import UserError
from blipfit.model import cost, loading, tiny
from blipfit.model.backbone import fingerprint, head
from blipfit.pretraining.evaluation import sample_questions
from blipfit.pretraining.pretrain_vision_tower import render_pixels
from blipfit.pretraining.texts import format_multiple_choice
from blipfit.recipe import AdapterConfig, ModelConfig


@pytest.fixture
def copy(small: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """Copy a small checkpoint, so that the test can damage it."""
    return lambda family: Path(shutil.copytree(small[family], tmp_path / "copy"))


def _set_values(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def _change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_a_loaded_model_is_frozen_and_in_eval_mode(small, family, capfd):
    backbone = checkpoints.load(small[family])
    assert backbone.family == family
    assert backbone.name == str(small[family])
    assert backbone.experiments == 1
    assert not any(module.training for module in backbone.hf.modules())
    assert not any(p.requires_grad for p in backbone.hf.parameters())
    assert {p.dtype for p in backbone.hf.parameters()} == {torch.float32}
    assert isinstance(backbone.hf, InstructBlipForConditionalGeneration)
    assert capfd.readouterr() == ("", "")  # loading prints nothing


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_saved_model_has_the_architecture_of_the_published_ones(small, family, tmp_path, precision):
    """Other programs choose the model class by `architectures`; weights and dtypes survive saving and loading."""
    hf = checkpoints.load(small[family], precision=precision).hf
    hf.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["architectures"] == ["InstructBlipForConditionalGeneration"]
    tiny.save(hf, tmp_path / "small")
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["architectures"] == ["InstructBlipForConditionalGeneration"]
    with loading.quiet():
        saved = InstructBlipForConditionalGeneration.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    for name, tensor in hf.state_dict().items():
        assert torch.equal(saved.state_dict()[name], tensor.float()), name


def test_transformers_class_is_not_changed_by_loading(small):
    checkpoints.load(small["t5"], precision="bf16")
    assert not InstructBlipForConditionalGeneration._keep_in_fp32_modules_strict


def test_the_weights_are_those_of_the_file(small, family):
    backbone = checkpoints.load(small[family])
    loaded = backbone.hf.state_dict()
    for name, tensor in load_file(small[family] / "model.safetensors").items():
        assert torch.equal(loaded[name], tensor.float()), name


def test_16_bit_is_for_the_frozen_parts_only(small, family):
    """Trainable parts keep their fp32 values; the language model and the ViT's linear layers take half the memory."""
    exact, low = checkpoints.load(small[family]).hf, checkpoints.load(small[family], precision="bf16").hf
    for name, parameter in low.named_parameters():
        if name.startswith("language_model."):
            assert parameter.dtype == torch.bfloat16, name
        elif re.search(r"^vision_model\.encoder\.layers\.\d+\.(self_attn|mlp)\.", name):
            assert parameter.dtype == torch.float16, name
            assert torch.equal(parameter, exact.get_parameter(name).half()), name  # rounded once, from fp32
        else:
            assert parameter.dtype == torch.float32, name
            assert torch.equal(parameter, exact.get_parameter(name)), name


def test_16_bit_trains_and_scores_close_to_fp32(small, family):
    losses, scores = [], []
    for precision in ("fp32", "bf16"):
        backbone = checkpoints.load(small[family], precision=precision)
        encoded, pixels = reference.ask(backbone), reference.pictures(backbone, 4)
        bank = Bank(backbone, [AdapterConfig(qformer=("ffn",), llm=("attn", "ffn"), rank=2)] * 2, [0, 1])
        batch, candidates = backbone.text.targets(encoded), backbone.text.candidates(encoded)
        loss_K = backbone.losses(backbone.query(backbone.see(pixels), batch), batch)
        bank.backward(loss_K.sum())
        assert bank.grads.dtype == torch.float32
        assert bool(torch.isfinite(bank.grads).all())
        moved = [n for n in bank.tensor_names(1) if n.endswith("lora_B") and "layer.1.output" not in n]
        assert len(moved) > 10
        assert all(bank.tensor(1, n, bank.grads).any() for n in moved if "layer.1.intermediate.dense" not in n)
        losses.append(loss_K.detach())
        with torch.no_grad():
            scores.append(
                backbone.score_candidates(backbone.query(backbone.see(pixels), candidates), candidates).sums_KM
            )
    torch.testing.assert_close(losses[1], losses[0], rtol=0.03, atol=0)
    torch.testing.assert_close(scores[1], scores[0], rtol=0.05, atol=0)
    assert not torch.equal(losses[1], losses[0])


def test_fp16_needs_a_gpu(small):
    with pytest.raises(UserError, match="fp16 needs a GPU; on a CPU use fp32 or bf16"):
        checkpoints.load(small["t5"], precision="fp16")


def test_tie_weights_leaves_the_head_alone(small):
    """Some launchers call `tie_weights`; it would overwrite Flan-T5's head with the input embedding."""
    hf = checkpoints.load(small["t5"]).hf
    before = fingerprint(head(hf))
    assert before != fingerprint(hf.language_model.shared.weight)
    for part in (hf, hf.language_model, hf.language_model.encoder, hf.language_model.decoder):
        part.tie_weights()
    assert fingerprint(head(hf)) == before
    assert head(hf) is hf.language_model.lm_head.weight


def test_without_the_check_tie_weights_overwrites_the_head(small):
    with loading.quiet():
        hf = InstructBlipForConditionalGeneration.from_pretrained(small["t5"])
        for config in (hf.config.text_config, hf.language_model.config):
            config.tie_word_embeddings = True  # transformers' default where the hub's configuration has no value
        hf.language_model.tie_weights()
    assert torch.equal(hf.language_model.lm_head.weight, hf.language_model.shared.weight)


def test_a_tied_t5_head_is_refused(copy):
    folder = copy("t5")
    _change_weights(
        folder, lambda t: t.update({"language_model.lm_head.weight": t["language_model.shared.weight"].clone()})
    )
    with pytest.raises(UserError, match=r"head is tied to its input embedding.*get a fresh copy"):
        checkpoints.load(folder)


@pytest.mark.parametrize("tied", [True, False])
def test_a_t5_without_its_head_is_refused(copy, tied):
    folder = copy("t5")
    _change_weights(folder, lambda t: t.pop("language_model.lm_head.weight"))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["tie_word_embeddings"] = tied
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"lm_head.weight.*get a (fresh|complete) copy"):
        checkpoints.load(folder)


@pytest.mark.parametrize("value", [0.0, 0.02])
def test_identical_query_tokens_are_refused(copy, family, value):
    folder = copy(family)
    _change_weights(folder, lambda t: t["query_tokens"].fill_(value))
    with pytest.raises(UserError, match="all 4 query tokens are identical"):
        checkpoints.load(folder)


def test_another_number_of_query_tokens_is_refused(copy):
    folder = copy("vicuna")
    _set_values(folder / "config.json", num_query_tokens=8)
    with pytest.raises(UserError, match=r"query_tokens is \(1, 4, 32\) but config.json asks for \(1, 8, 32\)"):
        checkpoints.load(folder)


def test_missing_weights_are_refused(copy):
    folder = copy("vicuna")
    _change_weights(folder, lambda t: t.pop("language_projection.bias"))
    with pytest.raises(UserError, match=r"1 weights are missing, e.g. language_projection.bias; get a complete copy"):
        checkpoints.load(folder)


def _write_lfs_pointer(name: str) -> Callable[[Path], object]:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 6340416\n"
    return lambda folder: (folder / name).write_text(pointer)


def _truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "cannot be loaded"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "cannot be loaded"),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            r"pytorch_model.bin, a pickle.*torch",
        ),
        (lambda f: (f / "model.safetensors").unlink(), "no file named model.safetensors"),
        (_write_lfs_pointer("model.safetensors"), "is a Git LFS pointer.*git lfs pull"),
        (_write_lfs_pointer("config.json"), "is a Git LFS pointer.*git lfs pull"),
        (lambda f: _set_values(f / "config.json", num_query_tokens="4"), "num_query_tokens in config.json is '4', not"),
        (lambda f: (f / "config.json").write_text("{"), "cannot be loaded"),
        (lambda f: _set_values(f / "config.json", model_type="clip"), "is a model of type 'clip'"),
        (lambda f: shutil.rmtree(f / "qformer_tokenizer"), "tokenizer in qformer_tokenizer/ cannot be loaded"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "its tokenizer cannot be loaded"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "its tokenizer cannot be loaded"),
        (lambda f: (f / "tokenizer.json").unlink(), "does not know plain English"),
        (lambda f: (f / "config.json").unlink(), "is not a model folder: it has no config.json"),
    ],
)
def test_a_damaged_folder_is_an_error_of_one_line(copy, damage, message):
    folder = copy("t5")
    damage(folder)
    with pytest.raises(UserError, match=message) as error:
        checkpoints.load(folder)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)


def test_other_models_are_refused():
    with pytest.raises(UserError, match="is a model of type 'clip'"):
        checkpoints.load(tiny.clip_folder())
    with pytest.raises(UserError, match=r"unknown model 'tinyt5'.*tiny-t5, tiny-vicuna"):
        loading.load(ModelConfig(name="tinyt5"))
    with pytest.raises(UserError, match="is not a model folder"):
        loading.load(ModelConfig(name="./no/such/folder"))


@pytest.mark.parametrize("name", ["tiny-t5/..", "a//b", "a/b/c", "-a/b", "a/b.git", "x" * 5000, "a\0b", "~nobody/x"])
def test_a_name_of_no_model_is_one_sentence(name):
    with pytest.raises(UserError) as error:
        loading.load(ModelConfig(name=name))
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("weight", ["language_projection.weight", "vision_model.embeddings.position_embedding"])
def test_a_weight_that_is_not_finite_is_refused(copy, weight, value):
    folder = copy("t5")
    _change_weights(folder, lambda t: t[weight].view(-1)[-1:].fill_(value))
    with pytest.raises(UserError, match=f"the weight {weight} is not finite"):
        checkpoints.load(folder)


def test_an_unknown_precision_is_refused(small):
    with pytest.raises(UserError, match=r"precision 'half' does not exist; known: auto, fp32"):
        checkpoints.load(small["t5"], precision="half")


def test_vicuna_with_bos_s_is_refused(copy):
    folder = copy("vicuna")
    _set_values(folder / "tokenizer_config.json", bos_token="<s>")
    with pytest.raises(UserError, match="BOS is '<s>', the InstructBLIP Vicuna checkpoints use '</s>'"):
        checkpoints.load(folder)


def test_a_tokenizer_without_pad_is_refused(copy):
    folder = copy("vicuna")
    _set_values(folder / "tokenizer_config.json", pad_token=None)
    with pytest.raises(UserError, match="language model's tokenizer has no usable pad token"):
        checkpoints.load(folder)


def test_a_larger_tokenizer_than_the_embedding_is_refused(small, tmp_path):
    def shrink_embedding(model) -> None:
        model.qformer.embeddings.word_embeddings = torch.nn.Embedding(50, checkpoints.WIDTH)
        model.config.qformer_config.vocab_size = 50

    folder = checkpoints.write(tmp_path / "x", "vicuna", checkpoints.own_tokenizers("vicuna"), shrink_embedding)
    with pytest.raises(UserError, match="Q-Former's tokenizer has ids beyond its 50 embeddings"):
        checkpoints.load(folder)


def test_prompts_longer_than_the_q_former_reads_are_refused(small):
    with pytest.raises(UserError, match=r"reads at most 160 tokens; lower training.max_text_tokens=161"):
        checkpoints.load(small["t5"], max_text=161)


@pytest.mark.parametrize(
    ("family", "where", "kind"), [("t5", "", "t5"), ("vicuna", "", "vicuna"), ("t5", "qformer_tokenizer", "bert")]
)
def test_a_tokenizer_of_another_class_is_refused(hub_like, tmp_path, family, where, kind):
    """The vocabulary is right, but texts are split in another way: ids are in range, and wrong."""
    folder = Path(shutil.copytree(hub_like[family], tmp_path / "copy"))
    file = folder / where / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["pre_tokenizer"] = {"type": "Split", "pattern": {"String": "l"}, "behavior": "Isolated", "invert": False}
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    file.write_text(json.dumps(tokenizer))
    _set_values(folder / where / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    with pytest.raises(UserError, match=rf"the {kind} tokenizer (gives other ids|does not know plain English)"):
        checkpoints.load(folder)


def test_the_real_tokenizers_pass(hub_like, family):
    backbone = checkpoints.load(hub_like[family])
    assert backbone.text.llm_tokenizer.vocab_size == {"t5": 32100, "vicuna": 32000}[family]
    assert backbone.text.qformer_tokenizer.vocab_size == 30522


_OFFLINE = """
import sys, time
from blipfit.errors import UserError
from blipfit.model import loading
from blipfit.recipe import ModelConfig
import torch, transformers
for name in ("Salesforce/instructblip-flan-t5-xl", "someone/small"):
    start = time.perf_counter()
    try:
        print("loaded", loading.load(ModelConfig(name=name)).name)
    except UserError as error:
        print(error)
    print(time.perf_counter() - start)
"""


def test_offline_is_reported_at_once_and_the_cache_works(small, tmp_path):
    hub = tmp_path / "hub" / "models--someone--small"
    (hub / "refs").mkdir(parents=True)
    (hub / "refs" / "main").write_text("0123")
    shutil.copytree(small["t5"], hub / "snapshots" / "0123")
    environment = {k: v for k, v in os.environ.items() if "proxy" not in k.lower() and not k.startswith("HF_")}
    no_hub = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    start = time.perf_counter()
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", _OFFLINE],
        env=environment | no_hub | {"HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert time.perf_counter() - start < 60
    assert process.stderr == ""
    message, seconds, loaded, _ = process.stdout.splitlines()
    assert message == (
        "offline: `Salesforce/instructblip-flan-t5-xl` is not in the local cache; "
        "give a folder with --model, or --model tiny"
    )
    assert float(seconds) < 10
    assert loaded == "loaded someone/small"


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_variables_are_respected(monkeypatch, tmp_path, variable):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    if variable == "HF_HUB_OFFLINE":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # the hub reads the variable at import
    else:
        monkeypatch.setenv(variable, "1")
    with pytest.raises(UserError, match="offline: `someone/small` is not in the local cache"):
        loading.load(ModelConfig(name="someone/small"))


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_a_quantized_language_model_gives_similar_losses_and_gradients(family, quantization, capfd):
    name = tiny.NAMES[family]
    plain, packed = (
        loading.load(ModelConfig(name=name, quantization=value))  # type: ignore[arg-type]
        for value in ("none", quantization)
    )
    assert cost.parameters(packed.hf) == cost.parameters(plain.hf)
    assert sum(cost.weight_bytes(packed.hf).values()) < 0.9 * sum(cost.weight_bytes(plain.hf).values())
    unchanged = {name for name, module in packed.hf.named_modules() if type(module) is torch.nn.Linear}
    changed = {name for name, module in packed.hf.named_modules() if isinstance(module, torch.nn.Linear)} - unchanged
    assert changed
    assert all(name.startswith("language_model.") and "lm_head" not in name for name in changed)
    assert torch.equal(head(packed.hf), head(plain.hf))
    questions = sample_questions(1, ["color"], 8)
    batch = plain.text.targets(plain.text.encode([format_multiple_choice(question) for _, question in questions]))
    features = plain.see(render_pixels([scene for scene, _ in questions]))
    visual = plain.query(features, batch).detach().requires_grad_()
    results = []
    for backbone in (plain, packed):
        loss = backbone.losses(visual, batch)
        (gradient,) = torch.autograd.grad(loss.sum(), visual)
        results.append((loss, gradient.flatten()))
    assert torch.allclose(results[0][0], results[1][0], rtol=0.5)
    assert torch.cosine_similarity(results[0][1], results[1][1], dim=0) > 0.7
    assert capfd.readouterr() == ("", "")


def test_without_bitsandbytes_the_message_names_the_package(monkeypatch):
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"blipfit\[quant\]"):
        loading.load(ModelConfig(name="tiny-t5", quantization="8bit"))
