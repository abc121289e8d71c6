"""AdaLoRA in the bank equals peft's AdaLoRA and single runs, and meets its budget exactly."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch

import checkpoints
import reference
from blipfit.adapters import parameter_counts, placement
from blipfit.adapters.adalora import Allocator, RankSchedule
from blipfit.adapters.bank import LORA_A, LORA_B, LORA_E, Bank
from blipfit.errors import UserError
from blipfit.recipe import AdaLoRAConfig, AdapterConfig, TrainingConfig
from blipfit.training.optimizer import BankAdamW

STEPS = 12
RATE = 1e-2


def adalora(qformer: Sequence[str] = ("self_attn", "cross_attn"), llm: Sequence[str] = ("attn",), **changes):
    options = {"init_rank": 4, "target_rank": 2, "tinit": 3, "tfinal": 3, "delta_t": 2} | changes
    return AdapterConfig(method="adalora", qformer=qformer, llm=llm, adalora=AdaLoRAConfig(**options))


MIXED = [
    adalora(),
    adalora(("self_attn",), ("ffn",), init_rank=6, target_rank=2.5, delta_t=1),
    adalora((), ("attn",), init_rank=3, target_rank=1, beta1=0.5, orthogonal_weight=0.1),
]


class Trainer:
    """Trains a bank of AdaLoRA experiments in float64 without dropout."""

    def __init__(self, folder, adapters, seeds=None, total=STEPS):
        self.backbone = checkpoints.load(folder)
        self.backbone.hf.double()
        self.bank = Bank(self.backbone, adapters, seeds or list(range(len(adapters))), dtype=torch.float64)
        self.total = total
        self._make_optimizer()
        encoded, pixels = reference.ask(self.backbone, 6), reference.pictures(self.backbone, 6)
        self.batches = [(encoded[i : i + 2], pixels[i : i + 2]) for i in (0, 2, 4)]

    def _make_optimizer(self):
        self.optimizer = BankAdamW(self.bank, [TrainingConfig(learning_rate=RATE)] * self.bank.K)
        self.allocator = Allocator(self.bank, [self.total] * self.bank.K)

    def keep(self, indices):
        """Continue with these experiments in a bank of their own, as `Stepper.keep_experiments` does."""
        states = [(self.bank.state(k), self.optimizer.state(k), self.allocator.state(k)) for k in indices]
        steps = self.optimizer.steps
        self.bank.remove()
        adapters = [self.bank.adapters[k] for k in indices]
        self.bank = Bank(self.backbone, adapters, [0] * len(adapters), dtype=torch.float64)
        self._make_optimizer()
        for k, (values, moments, ranks) in enumerate(states):
            self.bank.load_state(k, values)
            self.optimizer.load_state(k, moments, steps)
            self.allocator.load_state(k, ranks)

    def train(self, first, last):
        """Train from step `first` up to `last`; returns the losses `steps × K`, means over the labels."""
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


def _count_values(bank: Bank, k: int) -> int:
    """Number of singular values of experiment k that are not zero."""
    return sum(int(t.count_nonzero()) for n, t in bank.state(k).items() if n.endswith(LORA_E))


def _train_with_peft(trainer, folder, adapter, start, steps):
    """The same training with peft's AdaLoRA: its layers, the penalty of its forward pass, and its allocator."""
    from peft import AdaLoraConfig, get_peft_model

    backbone = checkpoints.load(folder)
    hf = backbone.hf.double()
    placed = placement.resolve(hf, backbone.family, adapter)
    adalora_config = adapter.adalora
    config = AdaLoraConfig(
        # Any task whose model class passes the call on; without a task peft omits the penalty.
        task_type="SEQ_2_SEQ_LM",
        init_r=adapter.start_rank,
        target_r=int(adapter.mean_rank),
        tinit=adalora_config.tinit,
        tfinal=adalora_config.tfinal,
        deltaT=adalora_config.delta_t,
        beta1=adalora_config.beta1,
        beta2=adalora_config.beta2,
        orth_reg_weight=adalora_config.orthogonal_weight,
        total_step=steps,
        lora_alpha=int(adapter.alpha),
        target_modules=list(placed.lora),
    )
    tuner = get_peft_model(hf, config).base_model
    trained = _copy_start(hf, start)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in trained.values() if p.ndim > 1], "weight_decay": 0.05},
            {"params": [p for p in trained.values() if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=RATE,
    )
    losses = []
    for step in range(steps):
        encoded, pixels = trainer.batches[step % 3]
        rows = [(e.qformer, e.training_prompt, e.target) for e in encoded]
        optimizer.zero_grad()
        loss, _ = reference.forward(_TunerModel(tuner), backbone, pixels, rows)
        penalty = _penalty(hf)
        loss.backward()
        optimizer.step()
        tuner.update_and_allocate(step + 1)
        losses.append((loss - adapter.adalora.orthogonal_weight * penalty).item())
    ranks = {name.partition(".lora_E")[0]: sum(mask) for name, mask in config.rank_pattern.items()}
    return torch.tensor(losses, dtype=torch.float64), trained, ranks


def _copy_start(hf, start):
    """Copy the initial tensors to peft's model; returns its trained parameters by the bank's names."""
    trained = {}
    with torch.no_grad():
        for name, tensor in start.items():
            low_rank = name.endswith((LORA_A, LORA_B, LORA_E))
            parameter = hf.get_parameter(f"{name}.default" if low_rank else name)
            parameter.copy_(tensor.view_as(parameter))
            trained[name] = parameter.requires_grad_(True)
    return trained


class _TunerModel:
    """peft's tuner with the interface of a Hugging Face model; its forward adds the penalty to the loss."""

    def __init__(self, tuner):
        self.tuner, self.config = tuner, tuner.model.config

    def __call__(self, **inputs):
        return self.tuner(**inputs)


@torch.no_grad()
def _penalty(hf):
    norms = []
    for name, p in hf.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            gram = p @ p.T if ".lora_A." in name else p.T @ p
            norms.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), dtype=gram.dtype)))
    return sum(norms) / len(norms)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft reads it in transformers
def test_one_experiment_trains_as_with_pefts_adalora(small, family):
    adapter = adalora(tinit=10, tfinal=10, delta_t=5)
    trainer = Trainer(small[family], [adapter], total=50)
    start = trainer.bank.state(0)
    losses = trainer.train(0, 50)[:, 0]
    peft_losses, trained, ranks = _train_with_peft(trainer, small[family], adapter, start, 50)
    torch.testing.assert_close(losses, peft_losses, atol=1e-4, rtol=0)
    for name, tensor in trainer.bank.state(0).items():
        torch.testing.assert_close(tensor, trained[name].detach().view_as(tensor), atol=1e-4, rtol=0, msg=name)
    assert losses[0] - losses[-2] > 0.1
    assert trainer.allocator.ranks(0) == ranks
    assert len(set(ranks.values())) > 1
    assert 0 < _count_values(trainer.bank, 0) < 4 * len(trainer.allocator.layers)


def test_the_penaltys_gradient_equals_autograds(small):
    trainer = Trainer(small["t5"], MIXED)
    for k, adapter in enumerate(MIXED):
        trainer.bank.grads.zero_()
        trainer.allocator.add_penalty()
        leaves = {n: t.requires_grad_() for n, t in trainer.bank.state(k).items() if n.endswith((LORA_A, LORA_B))}
        rows = [t if n.endswith(LORA_A) else t.mT for n, t in leaves.items()]
        norms = [torch.linalg.matrix_norm(M @ M.mT - torch.eye(len(M), dtype=M.dtype)) for M in rows]
        (adapter.adalora.orthogonal_weight * sum(norms) / len(norms)).backward()
        gradients = trainer.bank.state(k, trainer.bank.grads)
        for name, leaf in leaves.items():
            torch.testing.assert_close(gradients[name], leaf.grad, atol=1e-12, rtol=1e-9)
        assert not any(t.any() for n, t in gradients.items() if n not in leaves)


def test_a_bank_trains_as_single_runs(small, family):
    trainer = Trainer(small[family], MIXED)
    losses = trainer.train(0, STEPS)
    for k, adapter in enumerate(MIXED):
        single = Trainer(small[family], [adapter], [k])
        torch.testing.assert_close(losses[:, k], single.train(0, STEPS)[:, 0], atol=1e-8, rtol=0)
        for name, tensor in single.bank.state(0).items():
            torch.testing.assert_close(trainer.bank.state(k)[name], tensor, atol=1e-6, rtol=0, msg=name)
        assert trainer.allocator.history(k) == single.allocator.history(0)


def test_padding_of_smaller_ranks_stays_zero(small):
    trainer = Trainer(small["t5"], MIXED)
    trainer.train(0, STEPS)
    for k in range(len(MIXED)):
        own_values = torch.zeros_like(trainer.bank.values)
        trainer.bank.load_state(k, trainer.bank.state(k), own_values)
        assert torch.equal(own_values[k], trainer.bank.values[k])


def test_experiments_that_leave_do_not_change_the_others(small):
    trainer = Trainer(small["t5"], MIXED)
    trainer.train(0, 5)
    trainer.keep([2, 0])
    trainer.train(5, STEPS)
    for k, original in enumerate((2, 0)):
        single = Trainer(small["t5"], [MIXED[original]], [original])
        single.train(0, STEPS)
        for name, tensor in single.bank.state(0).items():
            torch.testing.assert_close(trainer.bank.state(k)[name], tensor, atol=1e-6, rtol=0, msg=name)
        assert trainer.allocator.history(k) == single.allocator.history(0)


@pytest.mark.parametrize("stop", [5, 11])
def test_training_resumes_bit_for_bit_from_a_saved_state(small, stop):
    """The state at any step, loaded into a new bank, continues as uninterrupted training."""
    uninterrupted = Trainer(small["t5"], MIXED)
    uninterrupted.train(0, STEPS)
    first, second = Trainer(small["t5"], MIXED), Trainer(small["t5"], MIXED, [7, 8, 9])
    first.train(0, stop)
    for k in range(len(MIXED)):
        second.bank.load_state(k, first.bank.state(k))
        second.optimizer.load_state(k, first.optimizer.state(k), stop)
        second.allocator.load_state(k, first.allocator.state(k))
    second.train(stop, STEPS)
    assert torch.equal(second.bank.values, uninterrupted.bank.values)
    assert [second.allocator.history(k) for k in range(3)] == [uninterrupted.allocator.history(k) for k in range(3)]


def test_an_untrained_bank_is_the_base_model(backbone):
    encoded, pixels = reference.ask(backbone), reference.pictures(backbone, 4)
    batch = backbone.text.targets(encoded)
    with torch.no_grad():
        base = backbone.losses(backbone.query(backbone.see(pixels), batch), batch)
        bank = Bank(backbone, MIXED, [0, 1, 2])
        losses = backbone.losses(backbone.query(backbone.see(pixels), batch), batch)
    torch.testing.assert_close(losses, base.expand_as(losses), atol=1e-4, rtol=0)
    A = next(t for n, t in bank.state(0).items() if n.endswith(LORA_A))
    assert A.std() == pytest.approx(0.02, rel=0.3)


def test_lora_and_adalora_cannot_share_a_bank(backbone):
    with pytest.raises(ValueError, match="cannot share a bank"):
        Bank(backbone, [MIXED[0], AdapterConfig(llm=("attn",))], [0, 0])


def test_counted_parameters_are_those_of_the_tensors(backbone):
    bank = Bank(backbone, MIXED, [0, 1, 2])
    counts = [bank.trained_parameters(k) for k in range(3)]
    assert [sum(c.values()) for c in counts] == [sum(t.numel() for t in bank.state(k).values()) for k in range(3)]
    bank.remove()
    assert counts == [parameter_counts.trained_parameters(backbone.hf, backbone.family, adapter) for adapter in MIXED]


def test_the_budget_is_met_exactly(small):
    trainer = Trainer(small["vicuna"], MIXED)
    trainer.train(0, STEPS)
    for k, adapter in enumerate(MIXED):
        history = trainer.allocator.history(k)
        layers = len(trainer.bank.placements[k].lora)
        assert sum(trainer.allocator.ranks(k).values()) == round(adapter.mean_rank * layers) == history["budget"]
        active_counts = [sum(row) for row in history["ranks"]]
        assert active_counts == [trainer.allocator.schedules[k].budget(step) for step in history["steps"]]
        assert all(count >= next_count for count, next_count in pairwise(active_counts))
        assert history["steps"][-1] == STEPS - 3
        assert _count_values(trainer.bank, k) <= history["budget"]
        assert trainer.allocator.has_final_ranks(k, STEPS - 3)
        assert not trainer.allocator.has_final_ranks(k, STEPS - 4)


def test_a_layer_without_gradients_loses_all_its_ranks(small):
    trainer = Trainer(small["t5"], [adalora(orthogonal_weight=0)])
    layer = trainer.allocator.layers[0]
    for step in range(1, STEPS + 1):
        trainer.bank.grads.normal_(generator=torch.Generator().manual_seed(step))
        for name in (LORA_A, LORA_B, LORA_E):
            slot = trainer.bank.slots[f"{layer}.{name}"]
            trainer.bank.columns(trainer.bank.grads, slot).zero_()
        trainer.optimizer.step([RATE])
        trainer.allocator.update(step)
    assert trainer.allocator.ranks(0)[layer] == 0
    assert sum(trainer.allocator.ranks(0).values()) == trainer.allocator.schedules[0].target


def test_the_schedule_falls_with_the_cube():
    schedule = RankSchedule.from_config(adalora(tinit=10, tfinal=20, delta_t=7), layers=5, total=100)
    assert [schedule.budget(step) for step in (1, 10, 45, 80, 100)] == [20, 20, 11, 10, 10]
    assert [step for step in range(1, 101) if schedule.is_allocation_step(step)] == [
        14,
        21,
        28,
        35,
        42,
        49,
        56,
        63,
        70,
        77,
        80,
    ]


def test_the_default_schedule_depends_on_the_number_of_steps():
    adapter = AdapterConfig(method="adalora", llm=("attn",), rank=8)
    assert RankSchedule.from_config(adapter, 10, 300) == RankSchedule(
        start=120, target=80, tinit=30, end=150, delta_t=10
    )


def test_a_training_that_is_too_short_is_refused():
    with pytest.raises(UserError, match=r"none of the 6 optimizer steps is left.*adapter.adalora.tinit or tfinal"):
        RankSchedule.from_config(adalora(), 4, 6)
