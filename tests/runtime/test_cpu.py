"""Products through oneDNN are torch's own, forward and backward."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from blipfit.runtime import cpu

pays = pytest.mark.skipif(not cpu.pays(), reason="oneDNN is not faster on this machine")


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def _leaf(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, requires_grad=True)


def _agree(compute: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> None:
    """Equal values and equal gradients of one random direction, inside and outside."""
    assert _setting() == "none"
    plain_result = compute()
    direction = torch.randn_like(plain_result)
    plain_gradients = torch.autograd.grad(plain_result, leaves, direction)
    with cpu.products():
        result = compute()
        gradients = torch.autograd.grad(result, leaves, direction)
    for actual, expected in zip((result, *gradients), (plain_result, *plain_gradients), strict=True):
        atol = max(1e-5, 2e-6 * float(expected.detach().abs().max()))
        torch.testing.assert_close(actual, expected, atol=atol, rtol=1e-5)


def _setting() -> str:
    return torch.backends.mkldnn.matmul.fp32_precision


def _in_thread(compute: Callable[[], Any]) -> Any:
    """What a function returns in another thread."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(compute()))
    thread.start()
    thread.join()
    return results[0]


# ------------------------------------------------------------------ pays


@pytest.mark.parametrize("size", [32, 256])
def test_rounding_would_be_noticed(size: int):
    x, y, value = cpu._whole_numbers(size)
    assert (x @ y == value).all()
    assert (x.bfloat16().float() @ y != value).all()


@pays
def test_a_machine_that_rounds_is_left_alone(monkeypatch):
    monkeypatch.setattr(cpu, "_exact", lambda size: False)
    assert not cpu._pays.__wrapped__()
    assert _setting() == "none"
    monkeypatch.setattr(cpu, "pays", lambda: False)
    with cpu.products():
        assert _setting() == "none"
        assert not cpu.in_products()


@pays
@pytest.mark.parametrize("capability", ["AVX2", "DEFAULT"])
def test_a_machine_without_avx512_is_left_alone(capability, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert not cpu._pays.__wrapped__()


@pays
def test_intels_processors_are_left_alone(monkeypatch):
    monkeypatch.setattr(cpu, "_intel", lambda: True)
    assert not cpu._pays.__wrapped__()


@pays
@pytest.mark.parametrize("error", [AttributeError, RuntimeError])
def test_a_torch_without_the_setting_is_left_alone(error, monkeypatch):
    def refuse(precision: str) -> str:
        raise error

    monkeypatch.setattr(cpu, "_allow", refuse)
    assert not cpu._pays.__wrapped__()


@pays
def test_it_is_tried_in_fp32_whatever_the_caller_computes_in():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert cpu._pays.__wrapped__()
    assert _setting() == "none"


# -------------------------------------------------------------- products


@pays
def test_another_device_changes_nothing():
    with cpu.products("cuda"):
        assert _setting() == "none"
        assert not cpu.in_products("cuda")
        assert not cpu.in_products()


@pays
@pytest.mark.parametrize("middle", [(), (37,)])
def test_a_linear_layer(middle):
    layer = nn.Linear(96, 64)
    x = _leaf(50, *middle, 96)
    _agree(lambda: layer(x), [x, *layer.parameters()])


@pays
def test_batched_products():
    x, y = _leaf(4, 50, 96), _leaf(4, 96, 64)
    _agree(lambda: x @ y, [x, y])


@pays
def test_nothing_to_multiply():
    with cpu.products():
        assert nn.Linear(6, 8)(torch.zeros(0, 6)).shape == (0, 8)


@pays
def test_the_setting_is_put_back_when_the_last_context_closes():
    def in_any_order() -> list[str]:
        first_context, second_context = cpu.products(), cpu.products()
        first_context.__enter__()
        second_context.__enter__()
        first_context.__exit__(None, None, None)
        settings = [_setting()]
        second_context.__exit__(None, None, None)
        return [*settings, _setting()]

    assert _in_thread(in_any_order) == ["bf16", "none"]
    with pytest.raises(RuntimeError), cpu.products():
        F.linear(torch.ones(2, 3), torch.ones(4, 5))
    assert _setting() == "none"


@pays
def test_a_thread_is_outside_when_its_last_context_closes():
    def in_any_order() -> list[bool]:
        first_context, second_context = cpu.products(), cpu.products()
        first_context.__enter__()
        second_context.__enter__()
        first_context.__exit__(None, None, None)
        result = [cpu.in_products()]
        second_context.__exit__(None, None, None)
        return [*result, cpu.in_products()]

    assert _in_thread(in_any_order) == [True, False]


@pays
def test_the_setting_of_the_caller_is_put_back(monkeypatch):
    setting = torch.backends.mkldnn.matmul
    setting.fp32_precision = "ieee"
    try:
        with cpu.products():
            assert _setting() == "bf16"
            with cpu.plain_products():
                assert _setting() == "ieee"
        assert _setting() == "ieee"
    finally:
        setting.fp32_precision = "none"


# ----------------------------------------------------------- in_products


@pays
def test_in_products_is_true_inside_only():
    assert not cpu.in_products()
    with cpu.products():
        assert cpu.in_products()
        assert not cpu.in_products("cuda")
        with cpu.products():
            assert cpu.in_products()
        assert cpu.in_products()
    assert not cpu.in_products()
    with pytest.raises(ValueError), cpu.products():
        raise ValueError
    assert not cpu.in_products()


@pays
def test_another_thread_is_not_inside():
    with cpu.products():
        assert _in_thread(lambda: (cpu.in_products(), _setting())) == (False, "bf16"), "the setting is the process's"
        assert cpu.in_products()
    assert _in_thread(lambda: (cpu.in_products(), _setting())) == (False, "none")


@pays
def test_the_setting_stays_while_another_thread_is_inside():
    entry, exit_signal = threading.Event(), threading.Event()

    def stay() -> None:
        with cpu.products():
            entry.set()
            exit_signal.wait(10)

    thread = threading.Thread(target=stay)
    thread.start()
    assert entry.wait(10)
    with cpu.products():
        pass
    assert _setting() == "bf16"
    assert not cpu.in_products()
    exit_signal.set()
    thread.join()
    assert _setting() == "none"


@pytest.mark.parametrize("answer", [True, False])
def test_a_graph_is_traced_as_if_inside(answer, monkeypatch):
    monkeypatch.setattr(cpu, "pays", lambda: answer)
    with cpu.products():
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert cpu.in_products() is answer
        assert not cpu.in_products("cuda")
        monkeypatch.undo()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not cpu.in_products()


# -------------------------------------------------------- plain_products


@pays
def test_plain_products_are_torchs_own_inside():
    with cpu.products():
        with cpu.plain_products():
            assert _setting() == "none"
        assert _setting() == "bf16"
        with pytest.raises(ValueError), cpu.plain_products():
            raise ValueError
        assert _setting() == "bf16"
        with cpu.plain_products("cuda"):
            assert _setting() == "bf16"
    assert _setting() == "none"


def test_plain_products_outside_do_nothing():
    with cpu.plain_products():
        assert _setting() == "none"
    assert _setting() == "none"


@pays
def test_plain_products_of_a_thread_outside_do_nothing():
    def look() -> tuple[str, str]:
        with cpu.plain_products():
            result = _setting()
        return result, _setting()

    with cpu.products():
        assert _in_thread(look) == ("bf16", "bf16")
    assert _in_thread(look) == ("none", "none")


@pays
def test_plain_products_change_nothing_in_a_compiled_graph(monkeypatch):
    with cpu.products():
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        with cpu.plain_products():
            assert _setting() == "bf16"
