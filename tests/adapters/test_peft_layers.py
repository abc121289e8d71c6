"""peft's methods in the bank are trained as by peft and torch, saved in peft's format, and removed completely."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import checkpoints
import reference
from blipfit import methods
from blipfit.adapters import load_adapter, parameter_counts, peft_format, peft_layers, placement
from blipfit.adapters.bank import Bank
from blipfit.adapters.peft_layers import PeftLayers
from blipfit.errors import UserError
from blipfit.model import loading, shapes
from blipfit.model.backbone import Backbone
from blipfit.recipe import AdapterConfig, ModelConfig, TrainingConfig
from blipfit.training.optimizer import BankAdamW

METHODS = tuple(methods.PEFT)
RATE = 1e-3
PEFT_WARNING = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing:FutureWarning"
)  # peft reads it in transformers


def make_adapter(method: str, qformer=("self_attn", "ffn"), llm=("attn", "ffn")) -> AdapterConfig:
    rank_options = {} if method == "ia3" else {"rank": 3, "alpha": 6}
    return AdapterConfig(method=method, qformer=qformer, llm=llm, **rank_options)


class Trainer:
    """Trains a bank of a single experiment without dropout."""

    def __init__(self, model: Path | Backbone, adapter: AdapterConfig, seed: int = 0, dtype=torch.float32):
        self.backbone = model if isinstance(model, Backbone) else checkpoints.load(model)
        if dtype != torch.float32:  # quantized weights cannot be cast
            self.backbone.hf.to(dtype)
        self.bank = Bank(self.backbone, [adapter], [seed], dtype)
        self.optimizer = BankAdamW(self.bank, [TrainingConfig(learning_rate=RATE)])
        encoded, pixels = reference.ask(self.backbone, 6), reference.pictures(self.backbone, 6).to(dtype)
        self.batches = [(encoded[i : i + 2], pixels[i : i + 2]) for i in (0, 2, 4)]

    def train(self, count: int) -> list[float]:
        """Train for `count` steps; returns the loss of each, the mean over the labels."""
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
    return backbone.score_candidates(
        backbone.query(backbone.see(reference.pictures(backbone, 4)), batch), batch
    ).sums_KM[0]


def _train_state(folder: Path, adapter: AdapterConfig, steps: int = 4) -> tuple[Trainer, dict[str, torch.Tensor]]:
    trainer = Trainer(folder, adapter)
    trainer.train(steps)
    return trainer, trainer.bank.state(0)


def _configuration(adapter: AdapterConfig, layers: tuple[str, ...]):
    """peft's configuration as its documentation writes each method."""
    from peft import IA3Config, LoraConfig

    if adapter.method == "ia3":
        dense = ("DenseReluDense", ".mlp.", "intermediate", ".output.dense", ".output_query.dense")
        feedforward = [n for n in layers if any(part in n for part in dense) and "attention" not in n]
        return IA3Config(target_modules=list(layers), feedforward_modules=feedforward)
    options = {"dora": {"use_dora": True}, "rslora": {"use_rslora": True}, "pissa": {"init_lora_weights": "pissa"}}
    return LoraConfig(
        r=adapter.rank, lora_alpha=int(adapter.alpha), target_modules=list(layers), **options[adapter.method]
    )


def _train_with_peft(
    folder: Path, adapter: AdapterConfig, start: dict[str, torch.Tensor], trainer: Trainer, steps: int
):
    """The same training with peft's own model, torch's AdamW and Hugging Face's forward and loss."""
    from peft import get_peft_model

    backbone = checkpoints.load(folder)
    hf = backbone.hf.to(trainer.bank.values.dtype)
    layers = placement.resolve(hf, backbone.family, adapter).lora
    model = get_peft_model(hf, _configuration(adapter, layers))
    peft_parameters = {name.replace(".default", ""): p for name, p in hf.named_parameters() if p.requires_grad}
    peft_parameters = {
        name.replace("magnitude_vector.weight", "magnitude_vector"): p for name, p in peft_parameters.items()
    }
    trained = {}
    for name, tensor in start.items():
        parameter = peft_parameters[name] if name in peft_parameters else hf.get_parameter(name)
        with torch.no_grad():
            if ".lora_A." in name and adapter.method != "pissa":
                parameter.copy_(tensor)  # peft's A is random; all other tensors are computed in the same way
            torch.testing.assert_close(parameter.view_as(tensor), tensor, atol=0, rtol=0, msg=name)
        trained[name] = parameter.requires_grad_(True)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in trained.values()}
    decays = {n: p.ndim > 1 and "ia3_l" not in n for n, p in trained.items()}
    groups = [
        {"params": [p for n, p in trained.items() if decays[n]], "weight_decay": 0.05},
        {"params": [p for n, p in trained.items() if not decays[n]], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE)
    return reference.train(hf, backbone, trainer.batches, optimizer, steps), trained


@PEFT_WARNING
@pytest.mark.parametrize("qformer", [("self_attn", "ffn"), "full"], ids=["all LoRA", "full Q-Former"])
@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_as_with_peft_and_torch(small, family, method, qformer):
    adapter = make_adapter(method, qformer)
    # peft initializes PiSSA in fp32 only, where AdamW turns rounding differences of gradients into whole steps.
    is_exact = method != "pissa"
    trainer = Trainer(small[family], adapter, dtype=torch.float64 if is_exact else torch.float32)
    start = trainer.bank.state(0)
    losses = trainer.train(10)
    peft_losses, trained = _train_with_peft(small[family], adapter, start, trainer, 10)
    assert losses == pytest.approx(peft_losses, abs=1e-5)
    assert losses[0] - losses[-1] > 0.05
    adapter_names = []
    for name, tensor in trainer.bank.state(0).items():
        if name.endswith("key.bias"):
            continue  # it has no effect on softmax: its gradient is rounding only, which AdamW turns into a step
        differs = (tensor - trained[name].detach().view_as(tensor)).abs() > 1e-5
        assert differs.float().mean() <= (0 if is_exact else 0.01), name
        adapter_names += [name] if ".lora_" in name or ".ia3_" in name else []
    assert adapter_names


def test_rslora_is_lora_with_another_scale(small):
    """rsLoRA's alpha / √r equals LoRA's alpha / r here, and both start from the same A."""
    rslora = AdapterConfig(method="rslora", qformer=("self_attn",), llm=("attn",), rank=4, alpha=3)
    lora = rslora.model_copy(update={"method": "lora", "alpha": 6})
    rs_trainer, lora_trainer = Trainer(small["t5"], rslora), Trainer(small["t5"], lora)
    assert rs_trainer.train(4) == pytest.approx(lora_trainer.train(4), abs=1e-5)
    lora_state = lora_trainer.bank.state(0)
    for name, tensor in rs_trainer.bank.state(0).items():
        torch.testing.assert_close(tensor, lora_state[name.removesuffix(".weight") if "lora_" in name else name])


@pytest.mark.parametrize("method", METHODS)
def test_an_untrained_method_computes_as_the_base_model(small, family, method):
    """PiSSA up to rounding: it moves singular vectors from the weight to A and B."""
    backbone = checkpoints.load(small[family])
    base_scores = _scores(backbone)
    Bank(backbone, [make_adapter(method)], [0])
    torch.testing.assert_close(_scores(backbone), base_scores, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_the_initialization_depends_on_the_seed_only(small, method):
    def initial_state(seed: int) -> dict[str, torch.Tensor]:
        bank = Bank(backbone, [make_adapter(method)], [seed])
        state = bank.state(0)
        bank.remove()
        return state

    backbone = checkpoints.load(small["t5"])
    torch.manual_seed(1)
    state = initial_state(5)
    noise = torch.rand(1)
    torch.manual_seed(1)
    assert torch.rand(1) == noise  # torch's own generator is unchanged
    assert all(torch.equal(tensor, state[name]) for name, tensor in initial_state(5).items())
    different_names = {name for name, tensor in initial_state(6).items() if not torch.equal(tensor, state[name])}
    assert different_names == (
        {name for name in state if ".lora_A." in name} if method in ("dora", "rslora") else set()
    )


def test_ia3_scales_the_inputs_of_feed_forward_layers(small, family):
    bank = Bank(checkpoints.load(small[family]), [make_adapter("ia3")], [0])
    hf = bank.backbone.hf
    kinds = set()
    for name in bank.placements[0].lora:
        layer, vector = hf.get_submodule(name), bank.tensor(0, f"{name}.ia3_l")
        is_feedforward = any(part in name for part in ("Dense", "mlp", "intermediate", "output"))
        assert vector.shape == ((1, layer.in_features) if is_feedforward else (layer.out_features, 1))
        assert vector.eq(1).all()
        kinds.add(is_feedforward)
    assert kinds == {True, False}
    mask = bank.decay_mask()
    assert not any(mask[slot.start : slot.stop].any() for name, slot in bank.slots.items() if name.endswith("ia3_l"))


@pytest.mark.parametrize("method", METHODS)
def test_removing_a_method_restores_the_model(small, family, method):
    backbone = checkpoints.load(small[family])
    base_scores, modules = _scores(backbone), {name: id(module) for name, module in backbone.hf.named_modules()}
    weights = {name: tensor.clone() for name, tensor in backbone.hf.state_dict().items()}
    flags = {name: p.requires_grad for name, p in backbone.hf.named_parameters()}
    attributes = set(vars(backbone.hf))
    bank = Bank(backbone, [make_adapter(method)], [0])
    bank.values.add_(0.1)
    changed_scores = _scores(backbone)
    bank.remove()
    bank.remove()
    assert {name: id(module) for name, module in backbone.hf.named_modules()} == modules
    after = backbone.hf.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in weights.items())
    assert {name: p.requires_grad for name, p in backbone.hf.named_parameters()} == flags
    assert set(vars(backbone.hf)) == attributes
    assert torch.equal(_scores(backbone), base_scores)
    assert (changed_scores - base_scores).abs().max() > 0.1
    Bank(backbone, [AdapterConfig(llm=("attn",))], [0])  # another bank can be installed
    bank.remove()
    assert (
        backbone.hf.get_submodule("language_projection").weight.ndim == 3
    )  # removing the first again does not affect it


@pytest.mark.parametrize("failure", ["a layer is not wrapped", "out of memory"])
def test_a_failed_initialization_restores_the_model(small, monkeypatch, failure):
    backbone = checkpoints.load(small["t5"])
    base_scores, modules = _scores(backbone), {id(module) for module in backbone.hf.modules()}
    make_config = peft_layers.make_config
    if failure == "a layer is not wrapped":
        monkeypatch.setattr(peft_layers, "make_config", lambda adapter, layers: make_config(adapter, layers[1:]))
    else:
        monkeypatch.setattr(Bank, "_initialize", _raise_memory_error)
    with pytest.raises((AssertionError, MemoryError), match=r"SelfAttention\.q|^$"):
        Bank(backbone, [make_adapter("pissa", (), ("attn",))], [0])
    assert {id(module) for module in backbone.hf.modules()} == modules
    assert torch.equal(_scores(backbone), base_scores)


def _raise_memory_error(*_) -> None:
    raise MemoryError


@pytest.mark.parametrize("method", METHODS)
def test_a_bank_holds_a_single_experiment(small, method):
    backbone = checkpoints.load(small["t5"])
    with pytest.raises(ValueError, match=f"2 experiments with {method} cannot share a bank"):
        Bank(backbone, [make_adapter(method), make_adapter(method)], [0, 1])


def test_pissa_refuses_layers_smaller_than_its_rank(small):
    backbone = checkpoints.load(small["t5"])
    modules = {id(module) for module in backbone.hf.modules()}
    with pytest.raises(UserError, match=r"pissa cannot take rank 33 out of qformer\.\S+, which has 32 singular values"):
        Bank(backbone, [AdapterConfig(method="pissa", qformer=("self_attn",), rank=33)], [0])
    assert {id(module) for module in backbone.hf.modules()} == modules


@pytest.mark.parametrize(
    ("method", "quantization"),
    [(name, quantization) for name, method in methods.PEFT.items() for quantization in method.quantization],
)
def test_a_method_trains_with_quantized_weights(method, quantization, capfd):
    """Weights are not compared afterwards: bitsandbytes itself repacks 4-bit weights at the first forward on a CPU."""
    backbone = loading.load(ModelConfig(name="tiny-t5", quantization=quantization))
    modules = {id(module) for module in backbone.hf.modules()}
    trainer = Trainer(backbone, make_adapter(method, ()))
    losses = trainer.train(7)
    assert losses[0] - losses[6] > 0.05
    trainer.bank.remove()
    assert {id(module) for module in backbone.hf.modules()} == modules
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("method", METHODS)
def test_the_count_is_what_a_bank_trains(backbone, method):
    expected = parameter_counts.trained_parameters(backbone.hf, backbone.family, make_adapter(method))
    bank = Bank(backbone, [make_adapter(method)], [0])
    assert bank.trained_parameters(0) == expected
    assert bank.values.numel() == sum(expected.values())


def test_counts_of_the_published_model():
    """From shapes only. DoRA: LoRA's and a magnitude per output; (IA)³: a factor per input or output."""
    model = shapes.on_meta("Salesforce/instructblip-flan-t5-xl")
    adapters = {m: AdapterConfig(method=m, qformer=("self_attn",), llm=("ffn",)) for m in METHODS}
    counts = {m: parameter_counts.trained_parameters(model, "t5", adapter) for m, adapter in adapters.items()}
    layers = 48
    assert counts["rslora"] == counts["pissa"]
    assert counts["rslora"]["qformer self_attn"] == 8 * 36_864
    assert counts["dora"]["qformer self_attn"] == 8 * 36_864 + 24 * 768
    assert counts["dora"]["llm ffn"] == 8 * 1_032_192 + layers * (5120 + 5120 + 2048)
    assert counts["ia3"]["qformer self_attn"] == 24 * 768
    assert counts["ia3"]["llm ffn"] == layers * (2048 + 2048 + 5120)
    assert not any("lora" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("method", METHODS)
def test_a_saved_adapter_computes_the_same_in_a_new_model(small, family, tmp_path, method):
    trainer, state = _train_state(small[family], make_adapter(method))
    digest = peft_format.save(tmp_path / "a", make_adapter(method), state, trainer.backbone.name)
    adapter, tensors = peft_format.read(tmp_path / "a")
    assert adapter == make_adapter(method)
    assert tensors.keys() == state.keys()
    new_backbone = checkpoints.load(small[family])
    base_scores = _scores(new_backbone)
    _, installed_digest = peft_format.install(new_backbone, tmp_path / "a")
    assert installed_digest == digest
    assert torch.equal(_scores(new_backbone), _scores(trainer.backbone))
    assert (_scores(new_backbone) - base_scores).abs().max() > 0.1


@PEFT_WARNING
@pytest.mark.parametrize("method", METHODS)
def test_peft_loads_a_saved_adapter(small, family, tmp_path, method):
    """`PeftModel.from_pretrained` on the base model; with the other tensors its logits equal blipfit's."""
    from peft import PeftModel

    trainer, state = _train_state(small[family], make_adapter(method))
    peft_format.save(tmp_path / "a", make_adapter(method), state, trainer.backbone.name)
    encoded, pixels = reference.ask(trainer.backbone), reference.pictures(trainer.backbone, 4)
    batch = trainer.backbone.text.targets(encoded)
    with torch.no_grad():
        logits = trainer.backbone.target_logits(trainer.backbone.query(trainer.backbone.see(pixels), batch), batch)[0]
    new_backbone = checkpoints.load(small[family])
    with pytest.warns(UserWarning, match=load_adapter.NOTICE):
        model = PeftModel.from_pretrained(new_backbone.hf, str(tmp_path / "a"))
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    peft_parameters = {
        n.replace(".default", "").replace("vector.weight", "vector"): p for n, p in model.named_parameters()
    }
    assert all(torch.equal(peft_parameters[name], tensor) for name, tensor in stored.items())
    peft_logits = reference.with_trained(new_backbone, tmp_path / "a" / "trained.safetensors", encoded, pixels)
    torch.testing.assert_close(logits, peft_logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_the_configuration_is_in_pefts_format(small, tmp_path, method):
    trainer, state = _train_state(small["t5"], make_adapter(method), 1)
    peft_format.save(tmp_path / "a", make_adapter(method), state, trainer.backbone.name)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["peft_type"] == ("IA3" if method == "ia3" else "LORA")
    assert set(config["target_modules"]) == set(trainer.bank.placements[0].lora)
    assert config["base_model_name_or_path"] == trainer.backbone.name
    if method != "ia3":
        assert (config["r"], config["lora_alpha"]) == (3, 6)
        assert (config["use_dora"], config["use_rslora"]) == (method == "dora", method == "rslora")
        assert config["init_lora_weights"] == ("pissa" if method == "pissa" else True)
    else:
        assert set(config["feedforward_modules"]) == {
            n for n in trainer.bank.placements[0].lora if "Dense" in n or "intermediate" in n or "output" in n
        }


@pytest.mark.parametrize("method", METHODS)
def test_an_untrained_adapter_is_refused(small, tmp_path, method):
    backbone = checkpoints.load(small["t5"])
    bank = Bank(backbone, [make_adapter(method)], [3])
    state = bank.state(0)
    bank.remove()
    peft_format.save(tmp_path / "a", make_adapter(method), state, backbone.name)
    with pytest.raises(UserError, match="changes nothing"):
        peft_format.install(backbone, tmp_path / "a")
    for part in (".lora_B.", "magnitude", ".ia3_l"):
        for name in [n for n in state if part in n][:1]:
            assert peft_format.changes(make_adapter(method), state, state | {name: state[name] + 1e-3})


def test_an_adapter_of_another_size_is_refused(small, tmp_path):
    trainer, state = _train_state(small["t5"], make_adapter("dora"), 1)
    name = next(name for name in state if name.endswith("magnitude_vector"))
    peft_format.save(tmp_path / "a", make_adapter("dora"), state | {name: state[name][:5]}, "larger")
    trainer.bank.remove()
    with pytest.raises(UserError, match=r"was not trained on .*magnitude_vector is \(5,\), expected \(32,\)"):
        peft_format.install(trainer.backbone, tmp_path / "a")
    assert not any("lora" in name for name, _ in trainer.backbone.hf.named_parameters())


def test_layers_list_their_parameters(small):
    backbone = checkpoints.load(small["t5"])
    layers = PeftLayers(backbone.hf, make_adapter("dora"), ["qformer.encoder.layer.0.attention.attention.query"])
    assert {name.rpartition("query.")[2]: tuple(p.shape) for name, p in layers.parameters.items()} == {
        "lora_A.weight": (3, 32),
        "lora_B.weight": (32, 3),
        "lora_magnitude_vector": (32,),
    }

    layers.remove()
