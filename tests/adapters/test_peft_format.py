"""Adapters on disk: peft reads them, blipfit restores them whole, and what does not fit is refused."""

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
from blipfit.adapters import peft_format, placement
from blipfit.adapters.bank import Bank
from blipfit.errors import UserError
from blipfit.recipe import AdaLoRAConfig, AdapterConfig

LORA = AdapterConfig(qformer=("self_attn", "ffn"), llm=("attn",), rank=3, alpha=6)
FULL = AdapterConfig(qformer="full", llm=("ffn",), rank=2)


def _trained(backbone, adapter: AdapterConfig, seed: int = 3) -> dict[str, torch.Tensor]:
    """An experiment's tensors as training would leave them: every one of them moved."""
    bank = Bank(backbone, [adapter], [seed])
    bank.values.add_(torch.randn(bank.values.shape, generator=torch.Generator().manual_seed(seed)), alpha=0.05)
    state = bank.state(0)
    bank.remove()
    return state


@torch.no_grad()
def _losses(backbone) -> float:
    batch = backbone.text.targets(reference.ask(backbone))
    return backbone.losses(backbone.query(backbone.see(reference.pictures(backbone, 4)), batch), batch).item()


@pytest.fixture
def saved(backbone, tmp_path: Path) -> Path:
    peft_format.save(tmp_path / "adapter", LORA, _trained(backbone, LORA), backbone.name, seed=3)
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    "adapter", [LORA, FULL, AdapterConfig()], ids=["LoRA", "full", "nothing but the always trained"]
)
def test_what_was_saved_comes_back(backbone, tmp_path, adapter):
    state = _trained(backbone, adapter)
    digest = peft_format.save(tmp_path / "adapter", adapter, state, backbone.name)
    read, tensors = peft_format.read(tmp_path / "adapter")
    assert read == adapter
    assert tensors.keys() == state.keys()
    assert all(torch.equal(tensors[name], state[name]) for name in state)
    bank, again = peft_format.install(backbone, tmp_path / "adapter")
    assert again == digest == peft_format.digest(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in bank.state(0).items())
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]  # no temporary names left


def test_installed_it_gives_what_it_gave(backbone, small, saved):
    plain = _losses(backbone)
    bank = Bank(backbone, [LORA], [0])
    bank.load_state(0, _trained(checkpoints.load(small[backbone.family]), LORA))
    in_memory = _losses(backbone)
    bank.remove()
    peft_format.install(backbone, saved)
    assert _losses(backbone) == in_memory
    assert abs(in_memory - plain) > 0.1


def test_a_hash_is_of_the_tensors(backbone):
    state = _trained(backbone, LORA)
    assert peft_format.digest(dict(reversed(state.items()))) == peft_format.digest(state)
    name = next(iter(state))
    assert peft_format.digest(state | {name: state[name] + 1e-6}) != peft_format.digest(state)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks transformers so
@pytest.mark.parametrize("adapter", [LORA, FULL], ids=["LoRA", "full"])
def test_peft_loads_it(backbone, small, tmp_path, adapter):
    """`PeftModel.from_pretrained` wraps the wanted layers and no other; with the other tensors it gives our logits."""
    from peft import PeftModel

    state = _trained(backbone, adapter)
    peft_format.save(tmp_path / "adapter", adapter, state, backbone.name)
    bank, _ = peft_format.install(backbone, tmp_path / "adapter")
    encoded, pixels = reference.ask(backbone), reference.pictures(backbone, 4)
    batch = backbone.text.targets(encoded)
    with torch.no_grad():
        ours = backbone.target_logits(backbone.query(backbone.see(pixels), batch), batch)[0]
    bank.remove()

    fresh = checkpoints.load(small[backbone.family])
    hf = fresh.hf
    PeftModel.from_pretrained(hf, str(tmp_path / "adapter"))
    wrapped = {
        name.removesuffix(".lora_A.default") for name, _ in hf.named_modules() if name.endswith(".lora_A.default")
    }
    assert wrapped == set(placement.resolve(backbone.hf, backbone.family, adapter).lora)
    rows = [(e.qformer, e.prompt_cut, e.target) for e in encoded]
    with torch.no_grad():
        half = torch.cat(reference.forward(hf, fresh, pixels, rows)[1])
    theirs = reference.with_trained(fresh, tmp_path / "adapter" / "trained.safetensors", encoded, pixels)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert (half - theirs).abs().max() > 1e-2  # peft alone cannot carry the query tokens and their like


def test_the_configuration_is_pefts(saved, backbone):
    config = json.loads((saved / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["lora_dropout"]) == ("LORA", 3, 6, 0.0)
    assert config["base_model_name_or_path"] == backbone.name
    assert set(config["target_modules"]) == set(placement.resolve(backbone.hf, backbone.family, LORA).lora)
    with safe_open(saved / "trained.safetensors", "pt") as file:
        header = file.metadata()
        assert set(file.keys()) >= {"query_tokens", "language_projection.bias"}
    assert AdapterConfig.model_validate_json(header["adapter"]) == LORA
    assert (header["base"], header["seed"]) == (backbone.name, "3")


_FRESH = """
import sys
import torch
import checkpoints, reference
from pathlib import Path
from blipfit.adapters import peft_format
backbone = checkpoints.load(Path(sys.argv[1]))
bank, digest = peft_format.install(backbone, Path(sys.argv[2]))
batch = backbone.text.candidates(reference.ask(backbone))
with torch.no_grad():
    scores = backbone.score(backbone.query(backbone.see(reference.pictures(backbone, 4)), batch), batch)
print(digest)
print(scores.sums_KM[0].tolist())
"""


def test_a_fresh_process_gives_what_memory_gives(small, tmp_path):
    backbone, saved = checkpoints.load(small["t5"]), tmp_path / "adapter"
    peft_format.save(saved, LORA, _trained(backbone, LORA), backbone.name)
    _, digest = peft_format.install(backbone, saved)
    batch = backbone.text.candidates(reference.ask(backbone))
    with torch.no_grad():
        scores = backbone.score(backbone.query(backbone.see(reference.pictures(backbone, 4)), batch), batch)
    done = subprocess.run(
        [sys.executable, "-c", _FRESH, backbone.name, str(saved)],
        env={"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True,
        text=True,
        check=True,
    )
    told, printed = done.stdout.splitlines()
    assert told == digest
    assert json.loads(printed) == pytest.approx(scores.sums_KM[0].tolist(), abs=1e-5)


def _refused(backbone, folder: Path, told: str) -> None:
    modules = {id(module) for module in backbone.hf.modules()}
    with pytest.raises(UserError, match=told) as error:
        peft_format.install(backbone, folder)
    assert "\n" not in str(error.value)
    assert {id(module) for module in backbone.hf.modules()} == modules
    assert backbone.experiments == 1


def test_an_adapter_of_the_other_family_is_refused(small, tmp_path):
    vicuna = checkpoints.load(small["vicuna"])
    peft_format.save(tmp_path / "a", LORA, _trained(vicuna, LORA), vicuna.name)
    _refused(checkpoints.load(small["t5"]), tmp_path / "a", "was not trained on")


def test_an_adapter_of_another_size_is_refused(backbone, tmp_path):
    state = _trained(backbone, LORA)
    name = "language_projection.weight"
    peft_format.save(tmp_path / "a", LORA, state | {name: state[name][:, :16]}, "larger")
    _refused(
        backbone, tmp_path / "a", r"was not trained on .* language_projection.weight is \(32, 16\), expected \(32, 32\)"
    )


def test_an_untrained_adapter_is_refused(backbone, tmp_path):
    bank = Bank(backbone, [LORA], [0])
    state = bank.state(0)
    bank.remove()
    peft_format.save(tmp_path / "a", LORA, state, backbone.name)
    _refused(backbone, tmp_path / "a", "changes nothing of .* saved untrained")


@pytest.mark.parametrize("moved", ["query_tokens", "language_projection.bias", "lora_B"])
def test_one_moved_tensor_is_a_change(backbone, moved):
    bank = Bank(backbone, [LORA], [0])
    before = bank.state(0)
    after = bank.state(0)
    assert not peft_format.changes(LORA, before, after)
    after[next(name for name in after if name.endswith(moved))].flatten()[0] += 1e-3
    assert peft_format.changes(LORA, before, after)
    other_seed = {n: t + 1 if n.endswith("lora_A") else t for n, t in before.items()}
    assert not peft_format.changes(LORA, before, other_seed)  # with B zero, A does nothing


def test_a_missing_folder_is_refused(backbone, tmp_path):
    _refused(backbone, tmp_path / "none", "is no adapter folder of blipfit")
    (tmp_path / "file").write_text("x")
    _refused(backbone, tmp_path / "file", "is no adapter folder of blipfit")


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


def _header(folder: Path, adapter: str) -> None:
    from safetensors.torch import save_file

    save_file(load_file(folder / "trained.safetensors"), folder / "trained.safetensors", {"adapter": adapter})


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda f: _cut(f / "trained.safetensors"), "is damaged"),
        (lambda f: _cut(f / "adapter_model.safetensors"), "is damaged"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), r"was not trained on .*missing \["),
        (lambda f: _header(f, "{"), "is damaged"),
        (lambda f: _header(f, '{"rank": 0}'), "is damaged"),
        (lambda f: shutil.copy(f / "adapter_model.safetensors", f / "trained.safetensors"), "is damaged"),
    ],
)
def test_a_damaged_folder_is_refused(backbone, saved, spoil, told):
    spoil(saved)
    _refused(backbone, saved, told)


def test_saving_again_replaces_the_whole_folder(backbone, saved):
    peft_format.save(saved, AdapterConfig(), _trained(backbone, AdapterConfig()), backbone.name)
    assert [p.name for p in saved.iterdir()] == ["trained.safetensors"]
    assert [p.name for p in saved.parent.iterdir()] == ["adapter"]


# -------------------------------------------------------------------- AdaLoRA

ADALORA = AdapterConfig(
    method="adalora", qformer=("self_attn",), llm=("attn",), alpha=6, adalora=AdaLoRAConfig(init_rank=4, target_rank=2)
)


def _pruned(backbone) -> dict[str, torch.Tensor]:
    """A trained AdaLoRA with some triplets dropped, in one layer all of them."""
    state = _trained(backbone, ADALORA)
    values = sorted(name for name in state if name.endswith("lora_E"))
    for n, name in enumerate(values):
        state[name][: (4, 1, 0, 3)[n % 4]] = 0
    return state


def test_adalora_comes_back_without_what_was_dropped(backbone, tmp_path):
    state = _pruned(backbone)
    digest = peft_format.save(tmp_path / "adapter", ADALORA, state, backbone.name)
    read, tensors = peft_format.read(tmp_path / "adapter")
    assert (read, peft_format.digest(tensors)) == (ADALORA, digest)
    assert {name: t.shape for name, t in tensors.items()} == {name: t.shape for name, t in state.items()}
    for name, tensor in state.items():
        if name.endswith("lora_E"):
            A, B = name.replace("lora_E", "lora_A"), name.replace("lora_E", "lora_B")
            torch.testing.assert_close(tensors[B] @ (tensors[name] * tensors[A]), state[B] @ (tensor * state[A]))
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    kept = sum(int(t.count_nonzero()) for name, t in state.items() if name.endswith("lora_E"))
    assert sum(t.shape[0] for name, t in stored.items() if name.endswith("lora_A.weight")) == kept


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks transformers so
def test_peft_loads_adalora(backbone, small, tmp_path):
    from peft import PeftModel

    state = _pruned(backbone)
    peft_format.save(tmp_path / "adapter", ADALORA, state, backbone.name)
    bank, _ = peft_format.install(backbone, tmp_path / "adapter")
    encoded, pixels = reference.ask(backbone), reference.pictures(backbone, 4)
    batch = backbone.text.targets(encoded)
    with torch.no_grad():
        ours = backbone.target_logits(backbone.query(backbone.see(pixels), batch), batch)[0]
    bank.remove()
    fresh = checkpoints.load(small[backbone.family])
    PeftModel.from_pretrained(fresh.hf, str(tmp_path / "adapter"))
    theirs = reference.with_trained(fresh, tmp_path / "adapter" / "trained.safetensors", encoded, pixels)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_an_untrained_adalora_changes_nothing(backbone):
    bank = Bank(backbone, [ADALORA], [0])
    before = bank.state(0)
    bank.remove()
    assert not peft_format.changes(ADALORA, before, before)
    name = next(name for name in before if name.endswith("lora_E"))
    assert peft_format.changes(ADALORA, before, before | {name: before[name] + 0.1})
