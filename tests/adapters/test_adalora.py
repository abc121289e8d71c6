"""AdaLoRA in the bank: against peft's own with its penalty, against single runs, and its budget to the triplet."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch

import checkpoints
import reference
from blipfit.adapters import count, placement
from blipfit.adapters.adalora import Allocator, Schedule
from blipfit.adapters.bank import LORA_A, LORA_B, LORA_E, Bank
from blipfit.errors import UserError
from blipfit.recipe import AdaLoRAConfig, AdapterConfig, TrainingConfig
from blipfit.training.optimizer import BankAdamW

STEPS = 12
RATE = 1e-2


def adalora(qformer: Sequence[str] = ("self_attn", "cross_attn"), llm: Sequence[str] = ("attn",), **changes):
    part = {"init_rank": 4, "target_rank": 2, "tinit": 3, "tfinal": 3, "delta_t": 2} | changes
    return AdapterConfig(method="adalora", qformer=qformer, llm=llm, adalora=AdaLoRAConfig(**part))


MIXED = [
    adalora(),
    adalora(("self_attn",), ("ffn",), init_rank=6, target_rank=2.5, delta_t=1),
    adalora((), ("attn",), init_rank=3, target_rank=1, beta1=0.5, orthogonal_weight=0.1),
]


class Walk:
    """A bank of AdaLoRA experiments in training, in float64 without dropout."""

    def __init__(self, folder, adapters, seeds=None, total=STEPS):
        self.backbone = checkpoints.load(folder)
        self.backbone.hf.double()
        self.bank = Bank(self.backbone, adapters, seeds or list(range(len(adapters))), dtype=torch.float64)
        self.optimizer = BankAdamW(self.bank, [TrainingConfig(learning_rate=RATE)] * len(adapters))
        self.allocator = Allocator(self.bank, [total] * len(adapters))
        encoded, pixels = reference.ask(self.backbone, 6), reference.pictures(self.backbone, 6)
        self.batches = [(encoded[i : i + 2], pixels[i : i + 2]) for i in (0, 2, 4)]

    def steps(self, first, last):
        losses = []
        for step in range(first, last):
            encoded, pixels = self.batches[step % 3]
            batch = self.backbone.text.targets(encoded)
            self.bank.grads.zero_()
            losses_K = self.backbone.losses(self.backbone.query(self.backbone.see(pixels), batch), batch)
            self.bank.backward(losses_K.sum() / len(batch.labels_N))
            self.allocator.add_penalty()
            self.optimizer.step([RATE] * self.bank.K)
            self.allocator.update(self.optimizer.steps)
            losses.append((losses_K.detach() / len(batch.labels_N)).tolist())
        return torch.tensor(losses, dtype=torch.float64)


def _values_left(bank: Bank, k: int) -> int:
    return sum(int(t.count_nonzero()) for n, t in bank.state(k).items() if n.endswith(LORA_E))


# ------------------------------------------------------------------- against peft


def _peft_run(walk, folder, adapter, start, steps):
    """The same training by peft's AdaLoRA: its layers, its penalty in its own forward, its allocator."""
    from peft import AdaLoraConfig, get_peft_model

    backbone = checkpoints.load(folder)
    hf = backbone.hf.double()
    placed = placement.resolve(hf, backbone.family, adapter)
    part = adapter.adalora
    config = AdaLoraConfig(
        # Any task whose model class hands the call on: without one, peft leaves the penalty out.
        task_type="SEQ_2_SEQ_LM",
        init_r=adapter.start_rank,
        target_r=int(adapter.mean_rank),
        tinit=part.tinit,
        tfinal=part.tfinal,
        deltaT=part.delta_t,
        beta1=part.beta1,
        beta2=part.beta2,
        orth_reg_weight=part.orthogonal_weight,
        total_step=steps,
        lora_alpha=int(adapter.alpha),
        target_modules=list(placed.lora),
    )
    tuner = get_peft_model(hf, config).base_model
    trained = {}
    with torch.no_grad():
        for name, tensor in start.items():
            low_rank = name.endswith((LORA_A, LORA_B, LORA_E))
            parameter = hf.get_parameter(f"{name}.default" if low_rank else name)
            parameter.copy_(tensor.view_as(parameter))
            trained[name] = parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in trained.values() if p.ndim > 1], "weight_decay": 0.05},
            {"params": [p for p in trained.values() if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=RATE,
    )
    losses = []
    for step in range(steps):
        encoded, pixels = walk.batches[step % 3]
        rows = [(e.qformer, e.prompt_cut, e.target) for e in encoded]
        optimizer.zero_grad()
        loss, _ = reference.forward(_Called(tuner), backbone, pixels, rows)
        penalty = _penalty(hf)
        loss.backward()
        optimizer.step()
        tuner.update_and_allocate(step + 1)
        losses.append((loss - part.orthogonal_weight * penalty).item())
    pattern = {name.partition(".lora_E")[0]: sum(kept) for name, kept in config.rank_pattern.items()}
    return torch.tensor(losses, dtype=torch.float64), trained, pattern


class _Called:
    """peft's tuner where Hugging Face's model is expected: its forward adds the penalty to the loss."""

    def __init__(self, tuner):
        self.tuner, self.config = tuner, tuner.model.config

    def __call__(self, **inputs):
        return self.tuner(**inputs)


@torch.no_grad()
def _penalty(hf):
    found = []
    for name, p in hf.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            gram = p @ p.T if ".lora_A." in name else p.T @ p
            found.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), dtype=gram.dtype)))
    return sum(found) / len(found)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks transformers so
def test_one_experiment_trains_as_with_pefts_adalora(small, family):
    adapter = adalora(tinit=10, tfinal=10, delta_t=5)
    walk = Walk(small[family], [adapter], total=50)
    start = walk.bank.state(0)
    ours = walk.steps(0, 50)[:, 0]
    theirs, trained, ranks = _peft_run(walk, small[family], adapter, start, 50)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    for name, tensor in walk.bank.state(0).items():
        torch.testing.assert_close(tensor, trained[name].detach().view_as(tensor), atol=1e-4, rtol=0, msg=name)
    assert ours[0] - ours[-2] > 0.1
    assert walk.allocator.ranks(0) == ranks
    assert len(set(ranks.values())) > 1
    assert 0 < _values_left(walk.bank, 0) < 4 * len(walk.allocator.layers)


def test_the_penalty_is_autograds(small):
    walk = Walk(small["t5"], MIXED)
    for k, adapter in enumerate(MIXED):
        walk.bank.grads.zero_()
        walk.allocator.add_penalty()
        leaves = {n: t.requires_grad_() for n, t in walk.bank.state(k).items() if n.endswith((LORA_A, LORA_B))}
        rows = [t if n.endswith(LORA_A) else t.mT for n, t in leaves.items()]
        norms = [torch.linalg.matrix_norm(M @ M.mT - torch.eye(len(M), dtype=M.dtype)) for M in rows]
        (adapter.adalora.orthogonal_weight * sum(norms) / len(norms)).backward()
        got = walk.bank.state(k, walk.bank.grads)
        for name, leaf in leaves.items():
            torch.testing.assert_close(got[name], leaf.grad, atol=1e-12, rtol=1e-9)
        assert not any(t.any() for n, t in got.items() if n not in leaves)


# ------------------------------------------------------------------------- the bank


def test_a_bank_trains_as_single_runs(small, family):
    bank = Walk(small[family], MIXED)
    losses = bank.steps(0, STEPS)
    for k, adapter in enumerate(MIXED):
        alone = Walk(small[family], [adapter], [k])
        torch.testing.assert_close(losses[:, k], alone.steps(0, STEPS)[:, 0], atol=1e-8, rtol=0)
        for name, tensor in alone.bank.state(0).items():
            torch.testing.assert_close(bank.bank.state(k)[name], tensor, atol=1e-6, rtol=0, msg=name)
        assert bank.allocator.history(k) == alone.allocator.history(0)


def test_padding_of_smaller_ranks_stays_zero(small):
    walk = Walk(small["t5"], MIXED)
    walk.steps(0, STEPS)
    for k in range(len(MIXED)):
        only_own = torch.zeros_like(walk.bank.values)
        walk.bank.load_state(k, walk.bank.state(k), only_own)
        assert torch.equal(only_own[k], walk.bank.values[k])


def test_leaving_midway_changes_nothing_for_the_others(small):
    walk = Walk(small["t5"], MIXED)
    walk.steps(0, 5)
    walk.bank.keep([2, 0])
    walk.optimizer.keep([2, 0])
    walk.allocator.keep([2, 0])
    walk.steps(5, STEPS)
    for k, original in enumerate((2, 0)):
        alone = Walk(small["t5"], [MIXED[original]], [original])
        alone.steps(0, STEPS)
        for name, tensor in alone.bank.state(0).items():
            torch.testing.assert_close(walk.bank.state(k)[name], tensor, atol=1e-6, rtol=0, msg=name)
        assert walk.allocator.history(k) == alone.allocator.history(0)


@pytest.mark.parametrize("stop", [5, 11])
def test_state_is_all_there_is(small, stop):
    """Taken out at any step and put into a fresh bank, training goes on bit for bit."""
    straight = Walk(small["t5"], MIXED)
    straight.steps(0, STEPS)
    first, second = Walk(small["t5"], MIXED), Walk(small["t5"], MIXED, [7, 8, 9])
    first.steps(0, stop)
    for k in range(len(MIXED)):
        second.bank.load_state(k, first.bank.state(k))
        second.optimizer.load_state(k, first.optimizer.state(k), stop)
        second.allocator.load_state(k, first.allocator.state(k))
    second.steps(stop, STEPS)
    assert torch.equal(second.bank.values, straight.bank.values)
    assert [second.allocator.history(k) for k in range(3)] == [straight.allocator.history(k) for k in range(3)]


def test_an_untrained_bank_is_the_base_model(backbone):
    encoded, pixels = reference.ask(backbone), reference.pictures(backbone, 4)
    batch = backbone.text.targets(encoded)
    with torch.no_grad():
        base = backbone.losses(backbone.query(backbone.see(pixels), batch), batch)
        bank = Bank(backbone, MIXED, [0, 1, 2])
        losses = backbone.losses(backbone.query(backbone.see(pixels), batch), batch)
    torch.testing.assert_close(losses, base.expand_as(losses), atol=1e-4, rtol=0)
    a = next(t for n, t in bank.state(0).items() if n.endswith(LORA_A))
    assert a.std() == pytest.approx(0.02, rel=0.3)


def test_lora_and_adalora_cannot_share_a_bank(backbone):
    with pytest.raises(ValueError, match="cannot share a bank"):
        Bank(backbone, [MIXED[0], AdapterConfig(llm=("attn",))], [0, 0])


def test_counts_are_of_the_real_tensors(backbone):
    bank = Bank(backbone, MIXED, [0, 1, 2])
    counts = [bank.trained_parameters(k) for k in range(3)]
    assert [sum(c.values()) for c in counts] == [sum(t.numel() for t in bank.state(k).values()) for k in range(3)]
    bank.remove()
    assert counts == [count.trained(backbone.hf, backbone.family, adapter) for adapter in MIXED]


# ----------------------------------------------------------------------- the budget


def test_the_budget_is_met_to_the_triplet(small):
    walk = Walk(small["vicuna"], MIXED)
    walk.steps(0, STEPS)
    for k, adapter in enumerate(MIXED):
        history = walk.allocator.history(k)
        layers = len(walk.bank.placements[k].lora)
        assert sum(walk.allocator.ranks(k).values()) == round(adapter.mean_rank * layers) == history["budget"]
        kept = [sum(row) for row in history["ranks"]]
        assert kept == [walk.allocator.schedules[k].budget(step) for step in history["steps"]]
        assert all(one >= other for one, other in pairwise(kept))
        assert history["steps"][-1] == STEPS - 3
        assert _values_left(walk.bank, k) <= history["budget"]
        assert walk.allocator.settled(k, STEPS - 3)
        assert not walk.allocator.settled(k, STEPS - 4)


def test_what_does_not_matter_goes_first(small):
    """A layer whose gradients are zero loses all its ranks to the others."""
    walk = Walk(small["t5"], [adalora(orthogonal_weight=0)])
    dead = walk.allocator.layers[0]
    slot = walk.bank.slots[f"{dead}.{LORA_A}"]
    for step in range(1, STEPS + 1):
        walk.bank.grads.normal_(generator=torch.Generator().manual_seed(step))
        for name in (LORA_A, LORA_B, LORA_E):
            slot = walk.bank.slots[f"{dead}.{name}"]
            walk.bank.columns(walk.bank.grads, slot).zero_()
        walk.optimizer.step([RATE])
        walk.allocator.update(step)
    assert walk.allocator.ranks(0)[dead] == 0
    assert sum(walk.allocator.ranks(0).values()) == walk.allocator.schedules[0].target


def test_the_schedule_falls_with_the_cube():
    schedule = Schedule.of(adalora(tinit=10, tfinal=20, delta_t=7), layers=5, total=100)
    assert [schedule.budget(step) for step in (1, 10, 45, 80, 100)] == [20, 20, 11, 10, 10]
    assert [step for step in range(1, 101) if schedule.allocates(step)] == [14, 21, 28, 35, 42, 49, 56, 63, 70, 77, 80]


def test_without_numbers_the_schedule_is_of_the_length():
    part = AdapterConfig(method="adalora", llm=("attn",), rank=8)
    assert Schedule.of(part, 10, 300) == Schedule(start=120, target=80, tinit=30, end=150, delta_t=10)


def test_a_training_too_short_is_told():
    with pytest.raises(UserError, match=r"none of the 6 optimizer steps is left.*adapter.adalora.tinit or tfinal"):
        Schedule.of(adalora(), 4, 6)
