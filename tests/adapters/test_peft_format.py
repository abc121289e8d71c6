"""Adapters on disk: peft loads them, blipfit restores them completely, and unsuitable ones are refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import checkpoints
import reference
from blipfit.adapters import load_adapter, peft_format, placement
from blipfit.adapters.bank import Bank
from blipfit.errors import UserError
from blipfit.recipe import AdaLoRAConfig, AdapterConfig

LORA = AdapterConfig(qformer=("self_attn", "ffn"), llm=("attn",), rank=3, alpha=6)
FULL = AdapterConfig(qformer="full", llm=("ffn",), rank=2)


def _trained_state(backbone, adapter: AdapterConfig, seed: int = 3) -> dict[str, torch.Tensor]:
    """An experiment's tensors as training would leave them: all differ from the start."""
    bank = Bank(backbone, [adapter], [seed])
    bank.values.add_(torch.randn(bank.values.shape, generator=torch.Generator().manual_seed(seed)), alpha=0.05)
    state = bank.state(0)
    bank.remove()
    return state


@torch.no_grad()
def _loss(backbone) -> float:
    batch = backbone.text.targets(reference.ask(backbone))
    return backbone.losses(backbone.query(backbone.see(reference.pictures(backbone, 4)), batch), batch).item()


@pytest.fixture
def adapter_folder(backbone, tmp_path: Path) -> Path:
    peft_format.save(tmp_path / "adapter", LORA, _trained_state(backbone, LORA), backbone.name, seed=3)
    return tmp_path / "adapter"


@pytest.mark.parametrize("adapter", [LORA, FULL, AdapterConfig()], ids=["LoRA", "full", "always-trained tensors only"])
def test_a_saved_adapter_is_read_and_installed_unchanged(backbone, tmp_path, adapter):
    state = _trained_state(backbone, adapter)
    digest = peft_format.save(tmp_path / "adapter", adapter, state, backbone.name)
    read_adapter, tensors = peft_format.read(tmp_path / "adapter")
    assert read_adapter == adapter
    assert tensors.keys() == state.keys()
    assert all(torch.equal(tensors[name], state[name]) for name in state)
    bank, installed_digest = peft_format.install(backbone, tmp_path / "adapter")
    assert installed_digest == digest == peft_format.digest(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in bank.state(0).items())
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]  # no temporary folder is left


def test_an_installed_adapter_computes_as_in_memory(backbone, small, adapter_folder):
    base_loss = _loss(backbone)
    bank = Bank(backbone, [LORA], [0])
    bank.load_state(0, _trained_state(checkpoints.load(small[backbone.family]), LORA))
    memory_loss = _loss(backbone)
    bank.remove()
    peft_format.install(backbone, adapter_folder)
    assert _loss(backbone) == memory_loss
    assert abs(memory_loss - base_loss) > 0.1


def test_the_hash_depends_on_the_tensors_and_not_on_their_order(backbone):
    state = _trained_state(backbone, LORA)
    assert peft_format.digest(dict(reversed(state.items()))) == peft_format.digest(state)
    name = next(iter(state))
    assert peft_format.digest(state | {name: state[name] + 1e-6}) != peft_format.digest(state)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft reads it in transformers
@pytest.mark.parametrize("adapter", [LORA, FULL], ids=["LoRA", "full"])
def test_peft_loads_a_saved_adapter(backbone, small, tmp_path, adapter):
    """`PeftModel.from_pretrained` wraps exactly these layers; with the other tensors its logits equal blipfit's."""
    from peft import PeftModel

    state = _trained_state(backbone, adapter)
    peft_format.save(tmp_path / "adapter", adapter, state, backbone.name)
    bank, _ = peft_format.install(backbone, tmp_path / "adapter")
    encoded, pixels = reference.ask(backbone), reference.pictures(backbone, 4)
    batch = backbone.text.targets(encoded)
    with torch.no_grad():
        logits = backbone.target_logits(backbone.query(backbone.see(pixels), batch), batch)[0]
    bank.remove()

    new_backbone = checkpoints.load(small[backbone.family])
    hf = new_backbone.hf
    with pytest.warns(UserWarning, match=load_adapter.NOTICE):
        PeftModel.from_pretrained(hf, str(tmp_path / "adapter"))
    wrapped_names = {
        name.removesuffix(".lora_A.default") for name, _ in hf.named_modules() if name.endswith(".lora_A.default")
    }
    assert wrapped_names == set(placement.resolve(backbone.hf, backbone.family, adapter).lora)
    rows = [(e.qformer, e.training_prompt, e.target) for e in encoded]
    with torch.no_grad():
        incomplete_logits = torch.cat(reference.forward(hf, new_backbone, pixels, rows)[1])
    peft_logits = reference.with_trained(new_backbone, tmp_path / "adapter" / "trained.safetensors", encoded, pixels)
    torch.testing.assert_close(logits, peft_logits, atol=1e-5, rtol=1e-5)
    # peft's format alone cannot hold the always-trained tensors, such as the query tokens
    assert (incomplete_logits - peft_logits).abs().max() > 1e-2


def test_the_configuration_is_in_pefts_format(adapter_folder, backbone):
    config = json.loads((adapter_folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["lora_dropout"]) == ("LORA", 3, 6, 0.0)
    assert config["base_model_name_or_path"] == backbone.name
    assert set(config["target_modules"]) == set(placement.resolve(backbone.hf, backbone.family, LORA).lora)
    with safe_open(adapter_folder / "trained.safetensors", "pt") as file:
        header = file.metadata()
        assert set(file.keys()) >= {"query_tokens", "language_projection.bias"}
    assert AdapterConfig.model_validate_json(header["adapter"]) == LORA
    assert (header["base"], header["seed"]) == (backbone.name, "3")


_NEW_PROCESS = """
import sys
import torch
import checkpoints, reference
from pathlib import Path
from blipfit.adapters import peft_format
backbone = checkpoints.load(Path(sys.argv[1]))
bank, digest = peft_format.install(backbone, Path(sys.argv[2]))
batch = backbone.text.candidates(reference.ask(backbone))
with torch.no_grad():
    scores = backbone.score_candidates(backbone.query(backbone.see(reference.pictures(backbone, 4)), batch), batch)
print(digest)
print(scores.sums_KM[0].tolist())
"""


def test_a_new_process_computes_the_same_scores(small, tmp_path):
    backbone, folder = checkpoints.load(small["t5"]), tmp_path / "adapter"
    peft_format.save(folder, LORA, _trained_state(backbone, LORA), backbone.name)
    _, digest = peft_format.install(backbone, folder)
    batch = backbone.text.candidates(reference.ask(backbone))
    with torch.no_grad():
        scores = backbone.score_candidates(backbone.query(backbone.see(reference.pictures(backbone, 4)), batch), batch)
    process = subprocess.run(
        [sys.executable, "-c", _NEW_PROCESS, backbone.name, str(folder)],
        env={"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True,
        text=True,
        check=True,
    )
    printed_digest, printed_scores = process.stdout.splitlines()
    assert printed_digest == digest
    assert json.loads(printed_scores) == pytest.approx(scores.sums_KM[0].tolist(), abs=1e-5)


def _assert_refused(backbone, folder: Path, message: str) -> None:
    modules = {id(module) for module in backbone.hf.modules()}
    with pytest.raises(UserError, match=message) as error:
        peft_format.install(backbone, folder)
    assert "\n" not in str(error.value)
    assert {id(module) for module in backbone.hf.modules()} == modules
    assert backbone.experiments == 1


def test_an_adapter_of_the_other_family_is_refused(small, tmp_path):
    vicuna = checkpoints.load(small["vicuna"])
    peft_format.save(tmp_path / "a", LORA, _trained_state(vicuna, LORA), vicuna.name)
    _assert_refused(checkpoints.load(small["t5"]), tmp_path / "a", "was not trained on")


def test_an_adapter_of_another_size_is_refused(backbone, tmp_path):
    state = _trained_state(backbone, LORA)
    name = "language_projection.weight"
    peft_format.save(tmp_path / "a", LORA, state | {name: state[name][:, :16]}, "larger")
    _assert_refused(
        backbone, tmp_path / "a", r"was not trained on .* language_projection.weight is \(32, 16\), expected \(32, 32\)"
    )


def test_an_untrained_adapter_is_refused(backbone, tmp_path):
    bank = Bank(backbone, [LORA], [0])
    state = bank.state(0)
    bank.remove()
    peft_format.save(tmp_path / "a", LORA, state, backbone.name)
    _assert_refused(backbone, tmp_path / "a", "changes nothing of .* saved untrained")


@pytest.mark.parametrize("suffix", ["query_tokens", "language_projection.bias", "lora_B"])
def test_a_single_changed_tensor_is_a_change(backbone, suffix):
    bank = Bank(backbone, [LORA], [0])
    before = bank.state(0)
    after = bank.state(0)
    assert not peft_format.changes(LORA, before, after)
    after[next(name for name in after if name.endswith(suffix))].flatten()[0] += 1e-3
    assert peft_format.changes(LORA, before, after)
    other_A = {n: t + 1 if n.endswith("lora_A") else t for n, t in before.items()}
    assert not peft_format.changes(LORA, before, other_A)  # while B is zero, A has no effect


def test_a_missing_folder_is_refused(backbone, tmp_path):
    _assert_refused(backbone, tmp_path / "none", "is not an adapter folder of blipfit")
    (tmp_path / "file").write_text("x")
    _assert_refused(backbone, tmp_path / "file", "is not an adapter folder of blipfit")


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


def _write_header(folder: Path, adapter: str) -> None:
    from safetensors.torch import save_file

    save_file(load_file(folder / "trained.safetensors"), folder / "trained.safetensors", {"adapter": adapter})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: _truncate(f / "trained.safetensors"), "is damaged"),
        (lambda f: _truncate(f / "adapter_model.safetensors"), "is damaged"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "it has no adapter_model.safetensors"),
        (lambda f: _write_header(f, "{"), "is damaged"),
        (lambda f: _write_header(f, '{"rank": 0}'), "is damaged"),
        (lambda f: shutil.copy(f / "adapter_model.safetensors", f / "trained.safetensors"), "is damaged"),
    ],
)
def test_a_damaged_folder_is_refused(backbone, adapter_folder, damage, message):
    damage(adapter_folder)
    _assert_refused(backbone, adapter_folder, message)


def test_saving_again_replaces_the_whole_folder(backbone, adapter_folder):
    peft_format.save(adapter_folder, AdapterConfig(), _trained_state(backbone, AdapterConfig()), backbone.name)
    expected = ["README.md", "load_adapter.py", "trained.safetensors"]
    assert sorted(p.name for p in adapter_folder.iterdir()) == expected
    assert [p.name for p in adapter_folder.parent.iterdir()] == ["adapter"]


ADALORA = AdapterConfig(
    method="adalora", qformer=("self_attn",), llm=("attn",), alpha=6, adalora=AdaLoRAConfig(init_rank=4, target_rank=2)
)


def _pruned(backbone) -> dict[str, torch.Tensor]:
    """A trained AdaLoRA with some triplets set to zero, in some layers all of them."""
    state = _trained_state(backbone, ADALORA)
    names = sorted(name for name in state if name.endswith("lora_E"))
    for n, name in enumerate(names):
        state[name][: (4, 1, 0, 3)[n % 4]] = 0
    return state


def test_adalora_is_saved_without_its_zero_triplets(backbone, tmp_path):
    state = _pruned(backbone)
    digest = peft_format.save(tmp_path / "adapter", ADALORA, state, backbone.name)
    adapter, tensors = peft_format.read(tmp_path / "adapter")
    assert (adapter, peft_format.digest(tensors)) == (ADALORA, digest)
    assert {name: t.shape for name, t in tensors.items()} == {name: t.shape for name, t in state.items()}
    for name, tensor in state.items():
        if name.endswith("lora_E"):
            A, B = name.replace("lora_E", "lora_A"), name.replace("lora_E", "lora_B")
            torch.testing.assert_close(tensors[B] @ (tensors[name] * tensors[A]), state[B] @ (tensor * state[A]))
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    active_count = sum(int(t.count_nonzero()) for name, t in state.items() if name.endswith("lora_E"))
    assert sum(t.shape[0] for name, t in stored.items() if name.endswith("lora_A.weight")) == active_count


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft reads it in transformers
def test_peft_loads_adalora(backbone, small, tmp_path):
    from peft import PeftModel

    state = _pruned(backbone)
    peft_format.save(tmp_path / "adapter", ADALORA, state, backbone.name)
    bank, _ = peft_format.install(backbone, tmp_path / "adapter")
    encoded, pixels = reference.ask(backbone), reference.pictures(backbone, 4)
    batch = backbone.text.targets(encoded)
    with torch.no_grad():
        logits = backbone.target_logits(backbone.query(backbone.see(pixels), batch), batch)[0]
    bank.remove()
    new_backbone = checkpoints.load(small[backbone.family])
    with pytest.warns(UserWarning, match=load_adapter.NOTICE):
        PeftModel.from_pretrained(new_backbone.hf, str(tmp_path / "adapter"))
    peft_logits = reference.with_trained(new_backbone, tmp_path / "adapter" / "trained.safetensors", encoded, pixels)
    torch.testing.assert_close(logits, peft_logits, atol=1e-5, rtol=1e-5)


def test_an_untrained_adalora_changes_nothing(backbone):
    bank = Bank(backbone, [ADALORA], [0])
    before = bank.state(0)
    bank.remove()
    assert not peft_format.changes(ADALORA, before, before)
    name = next(name for name in before if name.endswith("lora_E"))
    assert peft_format.changes(ADALORA, before, before | {name: before[name] + 0.1})
