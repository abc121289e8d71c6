"""A bank of K experiments equals K separate runs and peft's training, in float64 without dropout."""

import copy
import warnings

import pytest
import torch
from torch import nn

import reference
from blipfit.adapters import placement
from blipfit.adapters.bank import Bank
from blipfit.recipe import AdapterConfig, TrainingConfig
from blipfit.training.optimizer import BankAdamW
from checkpoints import load

MIXED = [
    (AdapterConfig(qformer=("self_attn",), rank=1), 1e-3),
    (AdapterConfig(qformer=("cross_attn", "ffn"), llm=("attn",), rank=2), 5e-4),
    (AdapterConfig(llm=("attn", "ffn"), rank=4), 2e-3),
    (AdapterConfig(qformer=("self_attn", "cross_attn", "ffn"), llm=("ffn",), rank=8, alpha=4), 1e-4),
]
FULL = [
    (AdapterConfig(qformer="full", llm=("attn",), rank=2), 1e-4),
    (AdapterConfig(qformer="full", llm=("ffn",), rank=4), 3e-4),
]


class Trainer:
    """Trains a bank on the same three batches again and again."""

    def __init__(self, backbone, experiments, seeds=None, dtype=torch.float64):
        self.backbone = backbone
        if dtype == torch.float64:
            backbone.hf.double()
        adapters = [adapter for adapter, _ in experiments]
        self.rates = [rate for _, rate in experiments]
        self.bank = Bank(backbone, adapters, seeds or list(range(len(adapters))), dtype=dtype)
        self.optimizer = self._make_optimizer()
        encoded = reference.ask(backbone, 6)
        pixels = reference.pictures(backbone, 6)
        self.batches = [(encoded[i : i + 2], pixels[i : i + 2]) for i in (0, 2, 4)]

    def train(self, first, last):
        """Train from step `first` up to `last`; returns the losses `steps × K`, means over the labels."""
        losses = []
        for step in range(first, last):
            encoded, pixels = self.batches[step % 3]
            batch = self.backbone.text.targets(encoded)
            self.bank.grads.zero_()
            losses_K = self.backbone.losses(self.backbone.query(self.backbone.see(pixels), batch), batch)
            self.bank.backward(losses_K.sum() / len(batch.labels_N))
            self.optimizer.step(self.rates)
            losses.append((losses_K.detach() / len(batch.labels_N)).tolist())
        return torch.tensor(losses, dtype=torch.float64)

    def _make_optimizer(self):
        return BankAdamW(self.bank, [TrainingConfig(learning_rate=rate) for rate in self.rates])

    def keep(self, indices):
        """Continue with these experiments in a bank of their own, as `Stepper.keep_experiments` does."""
        states = [(self.bank.state(k), self.optimizer.state(k)) for k in indices]
        steps, self.rates = self.optimizer.steps, [self.rates[k] for k in indices]
        self.bank.remove()
        adapters = [self.bank.adapters[k] for k in indices]
        self.bank = Bank(self.backbone, adapters, [0] * len(adapters), dtype=self.bank.values.dtype)
        self.optimizer = self._make_optimizer()
        for k, (values, moments) in enumerate(states):
            self.bank.load_state(k, values)
            self.optimizer.load_state(k, moments, steps)


def _train_single(folder, experiments, k, steps):
    """Losses and final state of experiment k in a bank of its own."""
    trainer = Trainer(load(folder), [experiments[k]], [k])
    return trainer.train(0, steps)[:, 0], trainer.bank.state(0)


@pytest.mark.parametrize("experiments", [MIXED, FULL], ids=["mixed ranks and placements", "full Q-Formers"])
def test_a_bank_trains_as_separate_runs(small, family, experiments):
    steps = 6
    trainer = Trainer(load(small[family]), experiments)
    losses = trainer.train(0, steps)
    assert (losses[0] - losses[-1]).abs().min() > 1e-3
    for k in range(len(experiments)):
        single_losses, state = _train_single(small[family], experiments, k, steps)
        torch.testing.assert_close(losses[:, k], single_losses, atol=1e-8, rtol=0)
        bank_state = trainer.bank.state(k)
        assert bank_state.keys() == state.keys()
        for name in state:
            torch.testing.assert_close(bank_state[name], state[name], atol=1e-6, rtol=0, msg=name)


def test_experiments_that_leave_do_not_change_the_others(small, family):
    trainer = Trainer(load(small[family]), MIXED)
    trainer.train(0, 3)
    trainer.keep([3, 1])
    losses = trainer.train(3, 6)
    for k, original in enumerate((3, 1)):
        single_losses, state = _train_single(small[family], MIXED, original, 6)
        torch.testing.assert_close(losses[:, k], single_losses[3:], atol=1e-8, rtol=0)
        for name, tensor in trainer.bank.state(k).items():
            torch.testing.assert_close(tensor, state[name], atol=1e-6, rtol=0, msg=name)


def test_padding_of_smaller_ranks_stays_zero(small):
    trainer = Trainer(load(small["t5"]), MIXED)
    bank = trainer.bank
    trainer.train(0, 3)
    for k in range(4):
        own_values = torch.zeros_like(bank.values)
        bank.load_state(k, bank.state(k), own_values)
        assert torch.equal(own_values[k], bank.values[k])


def _train_with_peft(folder, adapter, rate, start, steps, trainer):
    """The same training with peft's layers, torch's AdamW and Hugging Face's forward and loss."""
    from peft import LoraConfig, get_peft_model

    backbone = load(folder)
    hf = backbone.hf.double()
    layers = placement.resolve(hf, backbone.family, adapter).lora
    config = LoraConfig(r=adapter.rank, lora_alpha=int(adapter.alpha), target_modules=list(layers))
    peft_model = get_peft_model(hf, config)
    wrapped_names = {n.removesuffix(".lora_A.default") for n, _ in hf.named_modules() if n.endswith(".lora_A.default")}
    assert wrapped_names == set(layers)
    trained = {}
    for name, tensor in start.items():
        layer, _, last = name.rpartition(".")
        parameter = hf.get_parameter(f"{layer}.{last}.default.weight" if "lora_" in last else name)
        with torch.no_grad():
            assert parameter.numel() == tensor.numel()
            parameter.copy_(tensor.view_as(parameter))
        trained[name] = parameter.requires_grad_(True)
    assert {id(p) for p in peft_model.parameters() if p.requires_grad} == {id(p) for p in trained.values()}
    groups = [
        {"params": [p for p in trained.values() if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in trained.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.999), eps=1e-8)
    losses = reference.train(hf, backbone, trainer.batches, optimizer, steps)
    return torch.tensor(losses, dtype=torch.float64), trained


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft reads it in transformers
@pytest.mark.parametrize(
    "adapter",
    [
        AdapterConfig(qformer=("self_attn", "cross_attn", "ffn"), llm=("attn", "ffn"), rank=4),
        AdapterConfig(qformer="full", llm=("attn",), rank=2),
    ],
    ids=["all LoRA", "full Q-Former"],
)
def test_one_experiment_trains_as_with_peft_and_torch(small, family, adapter):
    trainer = Trainer(load(small[family]), [(adapter, 1e-3)])
    start = trainer.bank.state(0)
    losses = trainer.train(0, 20)[:, 0]
    peft_losses, trained = _train_with_peft(small[family], adapter, 1e-3, start, 20, trainer)
    torch.testing.assert_close(losses, peft_losses, atol=1e-5, rtol=0)
    assert losses[0] - losses[-2] > 0.1
    for name, tensor in trainer.bank.state(0).items():
        torch.testing.assert_close(tensor, trained[name].detach().view_as(tensor), atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("adapter", [MIXED[3][0], FULL[0][0]], ids=["LoRA", "full"])
def test_removing_a_bank_restores_the_backbone(backbone, adapter):
    modules = dict(backbone.hf.named_modules())
    weights = {name: tensor.clone() for name, tensor in backbone.hf.state_dict().items()}
    trainer = Trainer(backbone, [(adapter, 1e-2), (adapter, 1e-2)], dtype=torch.float32)
    trainer.train(0, 2)
    assert backbone.experiments == 2
    trainer.bank.remove()
    assert backbone.experiments == 1
    assert {name: id(m) for name, m in modules.items()} == {n: id(m) for n, m in backbone.hf.named_modules()}
    after = backbone.hf.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], weights[name]) for name in weights)
    assert not any(p.requires_grad or p.grad is not None for p in backbone.hf.parameters())


def test_an_untrained_bank_computes_as_the_base_model(backbone):
    encoded, pixels = reference.ask(backbone), reference.pictures(backbone, 4)
    batch = backbone.text.targets(encoded)
    with torch.no_grad():
        base = backbone.losses(backbone.query(backbone.see(pixels), batch), batch)
        for experiments in (MIXED, FULL):
            bank = Bank(backbone, [adapter for adapter, _ in experiments], [0] * len(experiments))
            losses = backbone.losses(backbone.query(backbone.see(pixels), batch), batch)
            bank.remove()
            torch.testing.assert_close(losses, base.expand_as(losses), atol=1e-4, rtol=0)


def test_an_experiment_starts_the_same_in_any_bank(backbone):
    bank = Bank(backbone, [adapter for adapter, _ in MIXED], [7, 7, 8, 9])
    bank_state = bank.state(1)
    bank.remove()
    bank = Bank(backbone, [MIXED[1][0]], [7])
    single_state = bank.state(0)
    bank.remove()
    other_seed_state = Bank(backbone, [MIXED[1][0]], [8]).state(0)
    assert all(torch.equal(bank_state[name], single_state[name]) for name in single_state)
    A_name = next(name for name in single_state if name.endswith("lora_A"))
    assert not torch.equal(other_seed_state[A_name], single_state[A_name])


def test_lora_is_initialized_as_pefts(backbone):
    """A is Kaiming-uniform with a = √5, which is uniform in ± 1 / √inputs; B is zero."""
    bank = Bank(backbone, [AdapterConfig(qformer=("ffn",), llm=("ffn",), rank=8)], [0])
    for name, tensor in bank.state(0).items():
        if name.endswith("lora_B"):
            assert not tensor.any()
        elif name.endswith("lora_A"):
            bound = tensor.shape[1] ** -0.5
            assert 0.9 * bound < tensor.abs().max() <= bound
            assert abs(tensor.mean()) < 0.2 * bound
            assert tensor.std() == pytest.approx(bound / 3**0.5, rel=0.15)


def test_full_and_lora_q_formers_cannot_share_a_bank(backbone):
    with pytest.raises(ValueError, match="cannot share a bank"):
        Bank(backbone, [FULL[0][0], MIXED[0][0]], [0, 0])


def test_states_of_another_experiment_are_refused(backbone):
    bank = Bank(backbone, [adapter for adapter, _ in MIXED], [0] * 4)
    with pytest.raises(ValueError, match="does not fit"):
        bank.load_state(0, bank.state(1))
    state = bank.state(0)
    name = next(iter(state))
    with pytest.raises(ValueError, match="expected"):
        bank.load_state(0, state | {name: state[name][:1]})


def test_counted_parameters_are_those_of_the_tensors(backbone):
    bank = Bank(backbone, [adapter for adapter, _ in MIXED], [0] * 4)
    for k in range(4):
        assert sum(bank.trained_parameters(k).values()) == sum(t.numel() for t in bank.state(k).values())


def test_training_gives_no_warning_about_gradient_layouts(backbone):
    trainer = Trainer(backbone, FULL, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.train(0, 1)


def test_frozen_modules_do_not_change(backbone):
    assert isinstance(copy.deepcopy(backbone.hf).language_projection, nn.Linear)
    trainer = Trainer(backbone, MIXED, dtype=torch.float32)
    before = {n: p.clone() for n, p in backbone.hf.named_parameters() if not p.requires_grad}
    trainer.train(0, 2)
    after = dict(backbone.hf.named_parameters())
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert all(after[n].grad is None for n in before)
