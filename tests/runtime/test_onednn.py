"""Products with oneDNN equal torch's own, forward and backward."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from blipfit.runtime import onednn

needs_onednn = pytest.mark.skipif(not onednn.onednn_is_faster(), reason="oneDNN is not faster on this machine")


def _leaf(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, requires_grad=True)


def _assert_equal_with_onednn(compute: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> None:
    """Assert equal values, and equal gradients for a random output gradient, with and without oneDNN."""
    assert _setting() == "none"
    plain_result = compute()
    direction = torch.randn_like(plain_result)
    plain_gradients = torch.autograd.grad(plain_result, leaves, direction)
    with onednn.onednn_products():
        result = compute()
        gradients = torch.autograd.grad(result, leaves, direction)
    for actual, expected in zip((result, *gradients), (plain_result, *plain_gradients), strict=True):
        atol = max(1e-5, 2e-6 * float(expected.detach().abs().max()))
        torch.testing.assert_close(actual, expected, atol=atol, rtol=1e-5)


def _setting() -> str:
    return torch.backends.mkldnn.matmul.fp32_precision


def _in_thread(compute: Callable[[], Any]) -> Any:
    """Call a function in another thread; returns its result."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(compute()))
    thread.start()
    thread.join()
    return results[0]


@pytest.mark.parametrize("size", [32, 256])
def test_the_check_detects_rounding(size: int):
    x, y, value = onednn._make_rounding_test(size)
    assert (x @ y == value).all()
    assert (x.bfloat16().float() @ y != value).all()


@needs_onednn
def test_nothing_changes_on_a_machine_that_rounds(monkeypatch):
    monkeypatch.setattr(onednn, "_products_are_exact", lambda size: False)
    assert not onednn._check_onednn.__wrapped__()
    assert _setting() == "none"
    monkeypatch.setattr(onednn, "onednn_is_faster", lambda: False)
    with onednn.onednn_products():
        assert _setting() == "none"
        assert not onednn.uses_onednn()


@needs_onednn
@pytest.mark.parametrize("capability", ["AVX2", "DEFAULT"])
def test_nothing_changes_without_avx512(capability, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert not onednn._check_onednn.__wrapped__()


@needs_onednn
def test_nothing_changes_on_intels_processors(monkeypatch):
    monkeypatch.setattr(onednn, "_is_intel", lambda: True)
    assert not onednn._check_onednn.__wrapped__()


@needs_onednn
@pytest.mark.parametrize("error", [AttributeError, RuntimeError])
def test_nothing_changes_with_a_torch_without_the_setting(error, monkeypatch):
    def refuse(precision: str) -> str:
        raise error

    monkeypatch.setattr(onednn, "_set_precision", refuse)
    assert not onednn._check_onednn.__wrapped__()


@needs_onednn
def test_the_check_computes_in_fp32_also_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert onednn._check_onednn.__wrapped__()
    assert _setting() == "none"


@needs_onednn
def test_nothing_changes_for_another_device():
    with onednn.onednn_products("cuda"):
        assert _setting() == "none"
        assert not onednn.uses_onednn("cuda")
        assert not onednn.uses_onednn()


@needs_onednn
@pytest.mark.parametrize("middle", [(), (37,)])
def test_a_linear_layer(middle):
    layer = nn.Linear(96, 64)
    x = _leaf(50, *middle, 96)
    _assert_equal_with_onednn(lambda: layer(x), [x, *layer.parameters()])


@needs_onednn
def test_batched_products():
    x, y = _leaf(4, 50, 96), _leaf(4, 96, 64)
    _assert_equal_with_onednn(lambda: x @ y, [x, y])


@needs_onednn
def test_empty_inputs():
    with onednn.onednn_products():
        assert nn.Linear(6, 8)(torch.zeros(0, 6)).shape == (0, 8)


@needs_onednn
def test_the_setting_is_restored_when_the_last_context_closes():
    def close_in_another_order() -> list[str]:
        first_context, second_context = onednn.onednn_products(), onednn.onednn_products()
        first_context.__enter__()
        second_context.__enter__()
        first_context.__exit__(None, None, None)
        settings = [_setting()]
        second_context.__exit__(None, None, None)
        return [*settings, _setting()]

    assert _in_thread(close_in_another_order) == ["bf16", "none"]
    with pytest.raises(RuntimeError), onednn.onednn_products():
        F.linear(torch.ones(2, 3), torch.ones(4, 5))
    assert _setting() == "none"


@needs_onednn
def test_a_thread_uses_onednn_until_its_last_context_closes():
    def close_in_another_order() -> list[bool]:
        first_context, second_context = onednn.onednn_products(), onednn.onednn_products()
        first_context.__enter__()
        second_context.__enter__()
        first_context.__exit__(None, None, None)
        result = [onednn.uses_onednn()]
        second_context.__exit__(None, None, None)
        return [*result, onednn.uses_onednn()]

    assert _in_thread(close_in_another_order) == [True, False]


@needs_onednn
def test_the_callers_setting_is_restored(monkeypatch):
    setting = torch.backends.mkldnn.matmul
    setting.fp32_precision = "ieee"
    try:
        with onednn.onednn_products():
            assert _setting() == "bf16"
            with onednn.without_onednn():
                assert _setting() == "ieee"
        assert _setting() == "ieee"
    finally:
        setting.fp32_precision = "none"


@needs_onednn
def test_onednn_is_used_inside_the_context_only():
    assert not onednn.uses_onednn()
    with onednn.onednn_products():
        assert onednn.uses_onednn()
        assert not onednn.uses_onednn("cuda")
        with onednn.onednn_products():
            assert onednn.uses_onednn()
        assert onednn.uses_onednn()
    assert not onednn.uses_onednn()
    with pytest.raises(ValueError), onednn.onednn_products():
        raise ValueError
    assert not onednn.uses_onednn()


@needs_onednn
def test_another_thread_does_not_use_onednn():
    with onednn.onednn_products():
        assert _in_thread(lambda: (onednn.uses_onednn(), _setting())) == (False, "bf16"), "the setting is global"
        assert onednn.uses_onednn()
    assert _in_thread(lambda: (onednn.uses_onednn(), _setting())) == (False, "none")


@needs_onednn
def test_the_setting_stays_while_another_thread_uses_onednn():
    entry, exit_signal = threading.Event(), threading.Event()

    def use_onednn() -> None:
        with onednn.onednn_products():
            entry.set()
            exit_signal.wait(10)

    thread = threading.Thread(target=use_onednn)
    thread.start()
    assert entry.wait(10)
    with onednn.onednn_products():
        pass
    assert _setting() == "bf16"
    assert not onednn.uses_onednn()
    exit_signal.set()
    thread.join()
    assert _setting() == "none"


@pytest.mark.parametrize("is_faster", [True, False])
def test_a_graph_is_traced_with_onednn_where_it_is_faster(is_faster, monkeypatch):
    monkeypatch.setattr(onednn, "onednn_is_faster", lambda: is_faster)
    with onednn.onednn_products():
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert onednn.uses_onednn() is is_faster
        assert not onednn.uses_onednn("cuda")
        monkeypatch.undo()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not onednn.uses_onednn()


@needs_onednn
def test_without_onednn_products_are_torchs_own():
    with onednn.onednn_products():
        with onednn.without_onednn():
            assert _setting() == "none"
        assert _setting() == "bf16"
        with pytest.raises(ValueError), onednn.without_onednn():
            raise ValueError
        assert _setting() == "bf16"
        with onednn.without_onednn("cuda"):
            assert _setting() == "bf16"
    assert _setting() == "none"


def test_without_onednn_does_nothing_outside_onednn_products():
    with onednn.without_onednn():
        assert _setting() == "none"
    assert _setting() == "none"


@needs_onednn
def test_without_onednn_does_nothing_in_another_thread():
    def read_settings() -> tuple[str, str]:
        with onednn.without_onednn():
            result = _setting()
        return result, _setting()

    with onednn.onednn_products():
        assert _in_thread(read_settings) == ("bf16", "bf16")
    assert _in_thread(read_settings) == ("none", "none")


@needs_onednn
def test_without_onednn_does_nothing_in_a_compiled_graph(monkeypatch):
    with onednn.onednn_products():
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        with onednn.without_onednn():
            assert _setting() == "bf16"
