"""peft's own methods in the bank: trained as plain peft and torch train them, stored as peft stores them, taken out
without a trace."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import checkpoints
import reference
from blipfit import methods
from blipfit.adapters import count, peft_format, peft_methods, placement
from blipfit.adapters.bank import Bank
from blipfit.adapters.peft_methods import PeftLayers
from blipfit.errors import UserError
from blipfit.model import loading, shapes
from blipfit.model.backbone import Backbone
from blipfit.recipe import AdapterConfig, ModelConfig, TrainingConfig
from blipfit.training.optimizer import BankAdamW

METHODS = tuple(methods.PEFT)
RATE = 1e-3
ASKS = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks transformers so


def part(method: str, qformer=("self_attn", "ffn"), llm=("attn", "ffn"), **more) -> AdapterConfig:
    low_rank = {} if method == "ia3" else {"rank": 3, "alpha": 6}
    return AdapterConfig(method=method, qformer=qformer, llm=llm, **low_rank, **more)


class Walk:
    """A bank of one in training, without dropout."""

    def __init__(self, model: Path | Backbone, adapter: AdapterConfig, seed: int = 0, dtype=torch.float32):
        self.backbone = model if isinstance(model, Backbone) else checkpoints.load(model)
        if dtype != torch.float32:  # quantized weights cannot be cast
            self.backbone.hf.to(dtype)
        self.bank = Bank(self.backbone, [adapter], [seed], dtype)
        self.optimizer = BankAdamW(self.bank, [TrainingConfig(learning_rate=RATE)])
        encoded, pixels = reference.ask(self.backbone, 6), reference.pictures(self.backbone, 6).to(dtype)
        self.batches = [(encoded[i : i + 2], pixels[i : i + 2]) for i in (0, 2, 4)]

    def steps(self, count: int) -> list[float]:
        losses = []
        for step in range(count):
            encoded, pixels = self.batches[step % 3]
            batch = self.backbone.text.targets(encoded)
            self.bank.grads.zero_()
            losses_K = self.backbone.losses(self.backbone.query(self.backbone.see(pixels), batch), batch)
            self.bank.backward(losses_K.sum() / len(batch.labels_N))
            self.optimizer.step([RATE])
            losses.append(losses_K.item() / len(batch.labels_N))
        return losses


@torch.no_grad()
def _scores(backbone) -> torch.Tensor:
    batch = backbone.text.candidates(reference.ask(backbone))
    return backbone.score(backbone.query(backbone.see(reference.pictures(backbone, 4)), batch), batch).sums_KM[0]


def _trained(folder: Path, adapter: AdapterConfig, steps: int = 4) -> tuple[Walk, dict[str, torch.Tensor]]:
    walk = Walk(folder, adapter)
    walk.steps(steps)
    return walk, walk.bank.state(0)


# ------------------------------------------------------------------- against peft


def _configuration(adapter: AdapterConfig, layers: tuple[str, ...]):
    """peft's configuration as its documentation writes each method."""
    from peft import IA3Config, LoraConfig

    if adapter.method == "ia3":
        dense = ("DenseReluDense", ".mlp.", "intermediate", ".output.dense", ".output_query.dense")
        forward = [n for n in layers if any(kind in n for kind in dense) and "attention" not in n]
        return IA3Config(target_modules=list(layers), feedforward_modules=forward)
    options = {"dora": {"use_dora": True}, "rslora": {"use_rslora": True}, "pissa": {"init_lora_weights": "pissa"}}
    return LoraConfig(
        r=adapter.rank, lora_alpha=int(adapter.alpha), target_modules=list(layers), **options[adapter.method]
    )


def _plain(folder: Path, adapter: AdapterConfig, start: dict[str, torch.Tensor], walk: Walk, steps: int):
    """The same training by peft's own model, torch's AdamW and Hugging Face's forward and loss."""
    from peft import get_peft_model

    backbone = checkpoints.load(folder)
    hf = backbone.hf.to(walk.bank.values.dtype)
    layers = placement.resolve(hf, backbone.family, adapter).lora
    model = get_peft_model(hf, _configuration(adapter, layers))
    inside = {name.replace(".default", ""): p for name, p in hf.named_parameters() if p.requires_grad}
    inside = {name.replace("magnitude_vector.weight", "magnitude_vector"): p for name, p in inside.items()}
    trained = {}
    for name, tensor in start.items():
        parameter = inside[name] if name in inside else hf.get_parameter(name)
        with torch.no_grad():
            if ".lora_A." in name and adapter.method != "pissa":
                parameter.copy_(tensor)  # what peft drew is noise; everything else starts from its own arithmetic
            torch.testing.assert_close(parameter.view_as(tensor), tensor, atol=0, rtol=0, msg=name)
        trained[name] = parameter.requires_grad_(True)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in trained.values()}
    decays = {n: p.ndim > 1 and "ia3_l" not in n for n, p in trained.items()}
    groups = [
        {"params": [p for n, p in trained.items() if decays[n]], "weight_decay": 0.05},
        {"params": [p for n, p in trained.items() if not decays[n]], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE)
    return reference.train(hf, backbone, walk.batches, optimizer, steps), trained


@ASKS
@pytest.mark.parametrize("qformer", [("self_attn", "ffn"), "full"], ids=["all LoRA", "full Q-Former"])
@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_as_with_peft_and_torch(small, family, method, qformer):
    adapter = part(method, qformer)
    # AdamW makes steps of what fp32 only rounds; peft starts PiSSA in fp32 alone.
    exact = method != "pissa"
    walk = Walk(small[family], adapter, dtype=torch.float64 if exact else torch.float32)
    start = walk.bank.state(0)
    ours = walk.steps(10)
    theirs, trained = _plain(small[family], adapter, start, walk, 10)
    assert ours == pytest.approx(theirs, abs=1e-5)
    assert ours[0] - ours[-1] > 0.05
    moved = []
    for name, tensor in walk.bank.state(0).items():
        if name.endswith("key.bias"):
            continue  # softmax does not see it: its gradient is rounding, which AdamW makes a step of
        apart = (tensor - trained[name].detach().view_as(tensor)).abs() > 1e-5
        assert apart.float().mean() <= (0 if exact else 0.01), name
        moved += [name] if ".lora_" in name or ".ia3_" in name else []
    assert moved


def test_rslora_is_lora_with_another_scale(small):
    """alpha / √r of the one is alpha / r of the other, from the same A."""
    rs = AdapterConfig(method="rslora", qformer=("self_attn",), llm=("attn",), rank=4, alpha=3)
    one, other = Walk(small["t5"], rs), Walk(small["t5"], rs.model_copy(update={"method": "lora", "alpha": 6}))
    assert one.steps(4) == pytest.approx(other.steps(4), abs=1e-5)
    banked = other.bank.state(0)
    for name, tensor in one.bank.state(0).items():
        torch.testing.assert_close(tensor, banked[name.removesuffix(".weight") if "lora_" in name else name])


@pytest.mark.parametrize("method", METHODS)
def test_a_method_starts_as_the_model(small, family, method):
    """PiSSA up to the rounding of what it takes out and puts beside."""
    backbone = checkpoints.load(small[family])
    plain = _scores(backbone)
    Bank(backbone, [part(method)], [0])
    torch.testing.assert_close(_scores(backbone), plain, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_start_is_of_its_seed_alone(small, method):
    def start(seed: int) -> dict[str, torch.Tensor]:
        bank = Bank(backbone, [part(method)], [seed])
        state = bank.state(0)
        bank.remove()
        return state

    backbone = checkpoints.load(small["t5"])
    torch.manual_seed(1)
    one = start(5)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.rand(1) == drawn  # no one else's noise was touched
    assert all(torch.equal(tensor, one[name]) for name, tensor in start(5).items())
    other = {name for name, tensor in start(6).items() if not torch.equal(tensor, one[name])}
    assert other == ({name for name in one if ".lora_A." in name} if method in ("dora", "rslora") else set())


def test_ia3_rescales_what_goes_into_feed_forward_layers(small, family):
    bank = Bank(checkpoints.load(small[family]), [part("ia3")], [0])
    hf = bank.backbone.hf
    seen = set()
    for name in bank.placements[0].lora:
        layer, vector = hf.get_submodule(name), bank.tensor(0, f"{name}.ia3_l")
        forward = any(kind in name for kind in ("Dense", "mlp", "intermediate", "output"))
        assert vector.shape == ((1, layer.in_features) if forward else (layer.out_features, 1))
        assert vector.eq(1).all()
        seen.add(forward)
    assert seen == {True, False}
    mask = bank.decay_mask()
    assert not any(mask[slot.start : slot.stop].any() for name, slot in bank.slots.items() if name.endswith("ia3_l"))


# --------------------------------------------------------------------- in and out


@pytest.mark.parametrize("method", METHODS)
def test_taken_out_it_leaves_no_trace(small, family, method):
    backbone = checkpoints.load(small[family])
    plain, modules = _scores(backbone), {name: id(module) for name, module in backbone.hf.named_modules()}
    weights = {name: tensor.clone() for name, tensor in backbone.hf.state_dict().items()}
    flags = {name: p.requires_grad for name, p in backbone.hf.named_parameters()}
    attributes = set(vars(backbone.hf))
    bank = Bank(backbone, [part(method)], [0])
    bank.values.add_(0.1)
    changed = _scores(backbone)
    bank.remove()
    bank.remove()
    assert {name: id(module) for name, module in backbone.hf.named_modules()} == modules
    after = backbone.hf.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in weights.items())
    assert {name: p.requires_grad for name, p in backbone.hf.named_parameters()} == flags
    assert set(vars(backbone.hf)) == attributes
    assert torch.equal(_scores(backbone), plain)
    assert (changed - plain).abs().max() > 0.1
    Bank(backbone, [AdapterConfig(llm=("attn",))], [0])  # and others can come in
    bank.remove()
    assert backbone.hf.get_submodule("language_projection").weight.ndim == 3  # which it then leaves alone


@pytest.mark.parametrize("failure", ["a layer is missed", "memory runs out"])
def test_a_failed_start_leaves_no_trace(small, monkeypatch, failure):
    backbone = checkpoints.load(small["t5"])
    plain, modules = _scores(backbone), {id(module) for module in backbone.hf.modules()}
    made = peft_methods.configuration
    if failure == "a layer is missed":
        monkeypatch.setattr(peft_methods, "configuration", lambda adapter, layers: made(adapter, layers[1:]))
    else:
        monkeypatch.setattr(Bank, "_initialize", _runs_out)
    with pytest.raises((AssertionError, MemoryError), match=r"SelfAttention\.q|^$"):
        Bank(backbone, [part("pissa", (), ("attn",))], [0])
    assert {id(module) for module in backbone.hf.modules()} == modules
    assert torch.equal(_scores(backbone), plain)


def _runs_out(*_) -> None:
    raise MemoryError


@pytest.mark.parametrize("method", METHODS)
def test_a_bank_holds_one(small, method):
    backbone = checkpoints.load(small["t5"])
    with pytest.raises(ValueError, match=f"2 experiments with {method} cannot share a bank"):
        Bank(backbone, [part(method), part(method)], [0, 1])
    bank = Bank(backbone, [part(method)], [0])
    bank.keep([0])
    with pytest.raises(ValueError, match="cannot keep"):
        bank.keep([])


def test_pissa_needs_layers_as_wide_as_its_rank(small):
    backbone = checkpoints.load(small["t5"])
    modules = {id(module) for module in backbone.hf.modules()}
    with pytest.raises(UserError, match=r"pissa cannot take rank 33 out of qformer\.\S+, which has 32 singular values"):
        Bank(backbone, [AdapterConfig(method="pissa", qformer=("self_attn",), rank=33)], [0])
    assert {id(module) for module in backbone.hf.modules()} == modules


@pytest.mark.parametrize(
    ("method", "how"), [(name, how) for name, method in methods.PEFT.items() for how in method.quantization]
)
def test_beside_quantized_weights(method, how, capfd):
    """They are not compared afterwards: bitsandbytes itself repacks 4-bit weights when a CPU first answers."""
    backbone = loading.load(ModelConfig(name="tiny-t5", quantization=how))
    modules = {id(module) for module in backbone.hf.modules()}
    walk = Walk(backbone, part(method, ()))
    losses = walk.steps(7)
    assert losses[0] - losses[6] > 0.05
    walk.bank.remove()
    assert {id(module) for module in backbone.hf.modules()} == modules
    assert capfd.readouterr() == ("", "")


# ------------------------------------------------------------------------- counts


@pytest.mark.parametrize("method", METHODS)
def test_counted_is_what_a_bank_trains(backbone, method):
    expected = count.trained(backbone.hf, backbone.family, part(method))
    bank = Bank(backbone, [part(method)], [0])
    assert bank.trained_parameters(0) == expected
    assert bank.values.numel() == sum(expected.values())


def test_parts_of_the_published_model():
    """From shapes alone. DoRA: LoRA's and a magnitude for every output; (IA)³: a number for every in- or output."""
    model = shapes.on_meta("Salesforce/instructblip-flan-t5-xl")
    adapters = {m: AdapterConfig(method=m, qformer=("self_attn",), llm=("ffn",)) for m in METHODS}
    found = {m: count.trained(model, "t5", adapter) for m, adapter in adapters.items()}
    layers = 48
    assert found["rslora"] == found["pissa"]
    assert found["rslora"]["qformer self_attn"] == 8 * 36_864
    assert found["dora"]["qformer self_attn"] == 8 * 36_864 + 24 * 768
    assert found["dora"]["llm ffn"] == 8 * 1_032_192 + layers * (5120 + 5120 + 2048)
    assert found["ia3"]["qformer self_attn"] == 24 * 768
    assert found["ia3"]["llm ffn"] == layers * (2048 + 2048 + 5120)
    assert not any("lora" in name for name, _ in model.named_parameters())


# ------------------------------------------------------------------------ on disk


@pytest.mark.parametrize("method", METHODS)
def test_saved_it_answers_alike_in_a_fresh_model(small, family, tmp_path, method):
    walk, state = _trained(small[family], part(method))
    digest = peft_format.save(tmp_path / "a", part(method), state, walk.backbone.name)
    read, tensors = peft_format.read(tmp_path / "a")
    assert read == part(method)
    assert tensors.keys() == state.keys()
    fresh = checkpoints.load(small[family])
    plain = _scores(fresh)
    _, again = peft_format.install(fresh, tmp_path / "a")
    assert again == digest
    assert torch.equal(_scores(fresh), _scores(walk.backbone))
    assert (_scores(fresh) - plain).abs().max() > 0.1


@ASKS
@pytest.mark.parametrize("method", METHODS)
def test_peft_loads_it(small, family, tmp_path, method):
    """`PeftModel.from_pretrained` on the model it was trained on; with the other tensors it gives our logits."""
    from peft import PeftModel

    walk, state = _trained(small[family], part(method))
    peft_format.save(tmp_path / "a", part(method), state, walk.backbone.name)
    encoded, pixels = reference.ask(walk.backbone), reference.pictures(walk.backbone, 4)
    batch = walk.backbone.text.targets(encoded)
    with torch.no_grad():
        ours = walk.backbone.target_logits(walk.backbone.query(walk.backbone.see(pixels), batch), batch)[0]
    fresh = checkpoints.load(small[family])
    model = PeftModel.from_pretrained(fresh.hf, str(tmp_path / "a"))
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    inside = {n.replace(".default", "").replace("vector.weight", "vector"): p for n, p in model.named_parameters()}
    assert all(torch.equal(inside[name], tensor) for name, tensor in stored.items())
    theirs = reference.with_trained(fresh, tmp_path / "a" / "trained.safetensors", encoded, pixels)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_the_configuration_is_pefts(small, tmp_path, method):
    walk, state = _trained(small["t5"], part(method), 1)
    peft_format.save(tmp_path / "a", part(method), state, walk.backbone.name)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["peft_type"] == ("IA3" if method == "ia3" else "LORA")
    assert set(config["target_modules"]) == set(walk.bank.placements[0].lora)
    assert config["base_model_name_or_path"] == walk.backbone.name
    if method != "ia3":
        assert (config["r"], config["lora_alpha"]) == (3, 6)
        assert (config["use_dora"], config["use_rslora"]) == (method == "dora", method == "rslora")
        assert config["init_lora_weights"] == ("pissa" if method == "pissa" else True)
    else:
        assert set(config["feedforward_modules"]) == {
            n for n in walk.bank.placements[0].lora if "Dense" in n or "intermediate" in n or "output" in n
        }


@pytest.mark.parametrize("method", METHODS)
def test_an_untrained_adapter_is_refused(small, tmp_path, method):
    backbone = checkpoints.load(small["t5"])
    bank = Bank(backbone, [part(method)], [3])
    state = bank.state(0)
    bank.remove()
    peft_format.save(tmp_path / "a", part(method), state, backbone.name)
    with pytest.raises(UserError, match="changes nothing"):
        peft_format.install(backbone, tmp_path / "a")
    for kind in (".lora_B.", "magnitude", ".ia3_l"):
        for name in [n for n in state if kind in n][:1]:
            assert peft_format.changes(part(method), state, state | {name: state[name] + 1e-3})


def test_an_adapter_of_another_size_is_refused(small, tmp_path):
    walk, state = _trained(small["t5"], part("dora"), 1)
    name = next(name for name in state if name.endswith("magnitude_vector"))
    peft_format.save(tmp_path / "a", part("dora"), state | {name: state[name][:5]}, "larger")
    walk.bank.remove()
    with pytest.raises(UserError, match=r"was not trained on .*magnitude_vector is \(5,\), expected \(32,\)"):
        peft_format.install(walk.backbone, tmp_path / "a")
    assert not any("lora" in name for name, _ in walk.backbone.hf.named_parameters())


def test_layers_know_their_parameters(small):
    backbone = checkpoints.load(small["t5"])
    layers = PeftLayers(backbone.hf, part("dora"), ["qformer.encoder.layer.0.attention.attention.query"])
    assert {name.rpartition("query.")[2]: tuple(p.shape) for name, p in layers.parameters.items()} == {
        "lora_A.weight": (3, 32),
        "lora_B.weight": (32, 3),
        "lora_magnitude_vector": (32,),
    }

    layers.remove()
