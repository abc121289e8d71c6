"""A bank of K experiments is K experiments: against separate runs, against peft, in float64 without dropout."""

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


class Walk:
    """A bank in training on a few batches, over and over."""

    def __init__(self, backbone, experiments, seeds=None, dtype=torch.float64):
        self.backbone = backbone
        if dtype == torch.float64:
            backbone.hf.double()
        adapters = [adapter for adapter, _ in experiments]
        self.rates = [rate for _, rate in experiments]
        self.bank = Bank(backbone, adapters, seeds or list(range(len(adapters))), dtype=dtype)
        self.optimizer = BankAdamW(self.bank, [TrainingConfig(learning_rate=rate) for rate in self.rates])
        encoded = reference.ask(backbone, 6)
        pixels = reference.pictures(backbone, 6)
        self.batches = [(encoded[i : i + 2], pixels[i : i + 2]) for i in (0, 2, 4)]

    def steps(self, first, last):
        """Losses `steps × K`, the mean over the labels."""
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

    def keep(self, rows):
        self.bank.keep(rows)
        self.optimizer.keep(rows)
        self.rates = [self.rates[k] for k in rows]


def _alone(folder, experiments, k, steps):
    walk = Walk(load(folder), [experiments[k]], [k])
    return walk.steps(0, steps)[:, 0], walk.bank.state(0)


@pytest.mark.parametrize("experiments", [MIXED, FULL], ids=["mixed ranks and placements", "full Q-Formers"])
def test_a_bank_trains_as_separate_runs(small, family, experiments):
    steps = 6
    bank = Walk(load(small[family]), experiments)
    losses = bank.steps(0, steps)
    assert (losses[0] - losses[-1]).abs().min() > 1e-3
    for k in range(len(experiments)):
        alone, state = _alone(small[family], experiments, k, steps)
        torch.testing.assert_close(losses[:, k], alone, atol=1e-8, rtol=0)
        banked = bank.bank.state(k)
        assert banked.keys() == state.keys()
        for name in state:
            torch.testing.assert_close(banked[name], state[name], atol=1e-6, rtol=0, msg=name)


def test_leaving_midway_changes_nothing_for_the_others(small, family):
    bank = Walk(load(small[family]), MIXED)
    bank.steps(0, 3)
    bank.keep([3, 1])
    losses = bank.steps(3, 6)
    for k, original in enumerate((3, 1)):
        alone, state = _alone(small[family], MIXED, original, 6)
        torch.testing.assert_close(losses[:, k], alone[3:], atol=1e-8, rtol=0)
        for name, tensor in bank.bank.state(k).items():
            torch.testing.assert_close(tensor, state[name], atol=1e-6, rtol=0, msg=name)


def test_padding_of_smaller_ranks_stays_zero(small):
    walk = Walk(load(small["t5"]), MIXED)
    bank = walk.bank
    walk.steps(0, 3)
    for k in range(4):
        only_own = torch.zeros_like(bank.values)
        bank.load_state(k, bank.state(k), only_own)
        assert torch.equal(only_own[k], bank.values[k])


def _peft_run(folder, adapter, rate, start, steps, walk):
    """The same training through peft's layers, torch's AdamW and Hugging Face's forward and loss."""
    from peft import LoraConfig, get_peft_model

    backbone = load(folder)
    hf = backbone.hf.double()
    placed = placement.resolve(hf, backbone.family, adapter)
    config = LoraConfig(r=adapter.rank, lora_alpha=int(adapter.alpha), target_modules=list(placed.lora))
    peft_model = get_peft_model(hf, config)
    wrapped = {n.removesuffix(".lora_A.default") for n, _ in hf.named_modules() if n.endswith(".lora_A.default")}
    assert wrapped == set(placed.lora)
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
    losses = reference.train(hf, backbone, walk.batches, optimizer, steps)
    return torch.tensor(losses, dtype=torch.float64), trained


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks transformers so
@pytest.mark.parametrize(
    "adapter",
    [
        AdapterConfig(qformer=("self_attn", "cross_attn", "ffn"), llm=("attn", "ffn"), rank=4),
        AdapterConfig(qformer="full", llm=("attn",), rank=2),
    ],
    ids=["all LoRA", "full Q-Former"],
)
def test_one_experiment_trains_as_with_peft_and_torch(small, family, adapter):
    walk = Walk(load(small[family]), [(adapter, 1e-3)])
    start = walk.bank.state(0)
    ours = walk.steps(0, 20)[:, 0]
    theirs, trained = _peft_run(small[family], adapter, 1e-3, start, 20, walk)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert ours[0] - ours[-2] > 0.1
    for name, tensor in walk.bank.state(0).items():
        torch.testing.assert_close(tensor, trained[name].detach().view_as(tensor), atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("adapter", [MIXED[3][0], FULL[0][0]], ids=["LoRA", "full"])
def test_removing_a_bank_gives_the_backbone_back(backbone, adapter):
    modules = dict(backbone.hf.named_modules())
    weights = {name: tensor.clone() for name, tensor in backbone.hf.state_dict().items()}
    walk = Walk(backbone, [(adapter, 1e-2), (adapter, 1e-2)], dtype=torch.float32)
    walk.steps(0, 2)
    assert backbone.experiments == 2
    walk.bank.remove()
    assert backbone.experiments == 1
    assert {name: id(m) for name, m in modules.items()} == {n: id(m) for n, m in backbone.hf.named_modules()}
    after = backbone.hf.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], weights[name]) for name in weights)
    assert not any(p.requires_grad or p.grad is not None for p in backbone.hf.parameters())


def test_untrained_bank_is_the_base_model(backbone):
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
    together = bank.state(1)
    bank.remove()
    bank = Bank(backbone, [MIXED[1][0]], [7])
    alone = bank.state(0)
    bank.remove()
    other = Bank(backbone, [MIXED[1][0]], [8]).state(0)
    assert all(torch.equal(together[name], alone[name]) for name in alone)
    a = next(name for name in alone if name.endswith("lora_A"))
    assert not torch.equal(other[a], alone[a])


def test_lora_starts_as_pefts(backbone):
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
    wrong = bank.state(0)
    name = next(iter(wrong))
    with pytest.raises(ValueError, match="expected"):
        bank.load_state(0, wrong | {name: wrong[name][:1]})


def test_counts_are_of_the_real_tensors(backbone):
    bank = Bank(backbone, [adapter for adapter, _ in MIXED], [0] * 4)
    for k in range(4):
        assert sum(bank.trained_parameters(k).values()) == sum(t.numel() for t in bank.state(k).values())


def test_no_warning_about_gradient_layouts(backbone):
    walk = Walk(backbone, FULL, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        walk.steps(0, 1)


def test_frozen_modules_are_untouched(backbone):
    assert isinstance(copy.deepcopy(backbone.hf).language_projection, nn.Linear)
    walk = Walk(backbone, MIXED, dtype=torch.float32)
    before = {n: p.clone() for n, p in backbone.hf.named_parameters() if not p.requires_grad}
    walk.steps(0, 2)
    after = dict(backbone.hf.named_parameters())
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert all(after[n].grad is None for n in before)
