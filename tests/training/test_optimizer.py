"""AdamW over a bank is torch's AdamW on every experiment, with its own rate, decay and betas."""

import pytest
import torch

import checkpoints
from blipfit.adapters.bank import Bank
from blipfit.recipe import AdapterConfig, TrainingConfig
from blipfit.training.optimizer import BankAdamW, rate_at

ADAPTERS = [AdapterConfig(qformer=("ffn",), rank=2), AdapterConfig(llm=("attn",), rank=4)]
TRAININGS = [
    TrainingConfig(learning_rate=1e-2, weight_decay=0.1),
    TrainingConfig(learning_rate=3e-3, weight_decay=0.5, betas=(0.8, 0.95)),
]


def _gradients(bank: Bank, step: int) -> None:
    """Random gradients, of very different sizes, at every experiment's own tensors."""
    generator = torch.Generator().manual_seed(step)
    bank.grads.zero_()
    for k in range(bank.K):
        state = {
            n: torch.randn(t.shape, generator=generator) * 10.0 ** (step % 7 - 4) for n, t in bank.state(k).items()
        }
        bank.load_state(k, state, bank.grads)


def _torchs(bank: Bank) -> list[tuple[dict[str, torch.Tensor], torch.optim.AdamW]]:
    pairs = []
    for k, training in enumerate(TRAININGS):
        own = {name: torch.nn.Parameter(tensor) for name, tensor in bank.state(k).items()}
        groups = [
            {"params": [p for p in own.values() if p.ndim > 1], "weight_decay": training.weight_decay},
            {"params": [p for p in own.values() if p.ndim < 2], "weight_decay": 0.0},
        ]
        pairs.append((own, torch.optim.AdamW(groups, lr=training.learning_rate, betas=training.betas, eps=1e-8)))
    return pairs


def _walk_beside_torch(bank: Bank, optimizer: BankAdamW, steps: range, pairs: list) -> None:
    """The same steps in the bank and with torch's optimizers, at rates that change between steps."""
    for step in steps:
        _gradients(bank, step)
        rates = [rate_at(training, step % 4) for training in TRAININGS]
        optimizer.step(rates)
        for k, (own, theirs) in enumerate(pairs):
            for name, parameter in own.items():
                parameter.grad = bank.tensor(k, name, bank.grads).clone()
            for group in theirs.param_groups:
                group["lr"] = rates[k]
            theirs.step()


def _assert_moved_alike(bank: Bank, pairs: list, tolerance: float) -> None:
    for k, (own, _) in enumerate(pairs):
        for name, parameter in own.items():
            torch.testing.assert_close(bank.tensor(k, name), parameter.data, atol=tolerance, rtol=tolerance, msg=name)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_every_experiment_moves_as_with_torch(small, dtype, tolerance):
    bank = Bank(checkpoints.load(small["t5"]), ADAPTERS, [0, 1], dtype=dtype)
    optimizer = BankAdamW(bank, TRAININGS)
    pairs = _torchs(bank)
    _walk_beside_torch(bank, optimizer, range(12), pairs)
    _assert_moved_alike(bank, pairs, tolerance)


@pytest.mark.slow
def test_a_compiled_update_moves_as_with_torch(small, fresh_compiler):
    """Compiled in the first two steps, and not again for later steps or other rates."""
    bank = Bank(checkpoints.load(small["t5"]), ADAPTERS, [0, 1])
    optimizer = BankAdamW(bank, TRAININGS, compiled=True)
    pairs = _torchs(bank)
    _walk_beside_torch(bank, optimizer, range(2), pairs)
    with torch._dynamo.config.patch(error_on_recompile=True):
        _walk_beside_torch(bank, optimizer, range(2, 12), pairs)
    _assert_moved_alike(bank, pairs, 1e-5)


def test_what_has_one_dimension_does_not_decay(small):
    bank = Bank(checkpoints.load(small["t5"]), [AdapterConfig(qformer="full")], [0])
    before = bank.state(0)
    BankAdamW(bank, [TrainingConfig(weight_decay=0.5)]).step([0.1])  # no gradient: the decay alone
    for name, tensor in bank.state(0).items():
        expected = before[name] * (1 - 0.1 * 0.5) if tensor.ndim > 1 else before[name]
        torch.testing.assert_close(tensor, expected, msg=name)
    assert {before[n].ndim for n in ("query_tokens", "language_projection.bias")} == {2, 1}


def test_a_restored_state_goes_on_in_another_bank(small):
    backbone = checkpoints.load(small["t5"])
    bank = Bank(backbone, ADAPTERS, [0, 1])
    optimizer = BankAdamW(bank, TRAININGS)
    for step in range(3):
        _gradients(bank, step)
        optimizer.step([1e-2, 1e-2])
    values, moments = bank.state(1), optimizer.state(1)
    gradient = torch.ones_like(bank.values)
    bank.grads.copy_(gradient)
    optimizer.step([1e-2, 1e-2])
    expected = bank.state(1)
    bank.remove()
    alone = Bank(backbone, ADAPTERS[1:], [5])
    alone.load_state(0, values)
    restored = BankAdamW(alone, TRAININGS[1:])
    restored.load_state(0, moments, steps=3)
    alone.grads.fill_(1)
    restored.step([1e-2])
    for name, tensor in alone.state(0).items():
        torch.testing.assert_close(tensor, expected[name], msg=name)


def test_the_rate_falls_by_the_epoch():
    training = TrainingConfig(learning_rate=2e-5, max_epochs=15)
    assert [rate_at(training, e) for e in (0, 1, 14)] == pytest.approx([2e-5, 2e-5 * 14 / 15, 2e-5 / 15])


# ---------------------------------------------------------------------- rates


@pytest.fixture
def bank(small) -> Bank:
    return Bank(checkpoints.load(small["t5"]), ADAPTERS, [0, 1])


def _moved(bank: Bank, optimizer: BankAdamW, rates: list[float]) -> list[bool]:
    """Whether a step at these rates changed each experiment."""
    before = bank.values.clone()
    optimizer.step(rates)
    return (bank.values != before).any(dim=1).tolist()


def test_rates_that_changed_are_used_in_the_next_step(bank):
    optimizer = BankAdamW(bank, TRAININGS)
    _gradients(bank, 4)
    assert _moved(bank, optimizer, [0.0, 0.0]) == [False, False]
    assert _moved(bank, optimizer, [1e-3, 0.0]) == [True, False]
    assert _moved(bank, optimizer, [0.0, 1e-3]) == [False, True]
    assert _moved(bank, optimizer, [0.0, 1e-3]) == [False, True]
    assert _moved(bank, optimizer, [1e-3, 1e-3]) == [True, True]
    assert _moved(bank, optimizer, [0.0, 0.0]) == [False, False]


def test_a_list_of_rates_that_is_changed_in_place_is_used(bank):
    optimizer, rates = BankAdamW(bank, TRAININGS), [0.0, 0.0]
    _gradients(bank, 4)
    assert _moved(bank, optimizer, rates) == [False, False]
    rates[1] = 1e-3
    assert _moved(bank, optimizer, rates) == [False, True]


def test_rates_are_copied_where_they_changed_alone(bank, monkeypatch):
    optimizer, columns = BankAdamW(bank, TRAININGS), []
    original = optimizer._column

    def column(numbers):
        columns.append(tuple(numbers))
        return original(numbers)

    monkeypatch.setattr(optimizer, "_column", column)
    for rates in ([1e-3, 2e-3], [1e-3, 2e-3], (1e-3, 2e-3), [2e-3, 2e-3], [1e-3, 2e-3]):
        optimizer.set_rates(rates)
    assert columns == [(1e-3, 2e-3), (2e-3, 2e-3), (1e-3, 2e-3)]


def test_rates_set_before_a_step_are_those_of_the_step(bank):
    """As where a step is captured: its tensors are filled first and read later."""
    optimizer = BankAdamW(bank, TRAININGS)
    rate = optimizer._rate
    optimizer.set_rates([1e-3, 2e-3])
    assert optimizer._rate is rate
    torch.testing.assert_close(rate.squeeze(1), torch.tensor([1e-3, 2e-3]))
