"""Products through oneDNN are torch's own, forward and backward."""

import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from blipfit.adapters.dropout import shared_dropout
from blipfit.model import onednn

N, H, T, S, D = 2, 3, 5, 7, 8

pays = pytest.mark.skipif(not onednn.pays(), reason="oneDNN has nothing to give on this machine")


onednn.install()


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def _leaf(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, requires_grad=True)


def _agree(compute: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> None:
    """Equal values and equal gradients of one random direction, inside and outside."""
    assert _allowed() == "none"
    theirs = compute()
    direction = torch.randn_like(theirs)
    wanted = torch.autograd.grad(theirs, leaves, direction)
    with onednn.products():
        ours = compute()
        found = torch.autograd.grad(ours, leaves, direction)
    for one, other in zip((ours, *found), (theirs, *wanted), strict=True):
        torch.testing.assert_close(one, other, atol=max(1e-5, 2e-6 * float(other.detach().abs().max())), rtol=1e-5)


def _allowed() -> str:
    return torch.backends.mkldnn.matmul.fp32_precision


@pytest.mark.parametrize("size", [32, 256])
def test_rounding_would_be_noticed(size: int):
    x, y, wanted = onednn._whole_numbers(size)
    assert (x @ y == wanted).all()
    assert (x.bfloat16().float() @ y != wanted).all()


@pays
def test_a_machine_that_rounds_is_left_alone(monkeypatch):
    monkeypatch.setattr(onednn, "_exact", lambda size: False)
    assert not onednn._pays.__wrapped__()
    assert _allowed() == "none"
    monkeypatch.setattr(onednn, "pays", lambda: False)
    with onednn.products():
        assert _allowed() == "none"


@pays
def test_it_is_tried_in_fp32_whatever_the_caller_computes_in():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert onednn._pays.__wrapped__()


@pays
def test_another_device_changes_nothing():
    with onednn.products("cuda"):
        assert _allowed() == "none"


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
@pytest.mark.parametrize("mask", ["none", "causal", "rows", "positions", "bias", "bias an experiment"])
def test_attention(mask, batched):
    query, key, value = (_leaf(N, length, H, D).transpose(1, 2) for length in (T, S, S))
    given = {
        "none": None,
        "causal": None,
        "rows": torch.arange(S) < torch.tensor([S, S - 2])[:, None, None, None],
        "positions": torch.ones(T, S, dtype=torch.bool).tril(2).expand(N, 1, T, S),
        "bias": _leaf(1, H, T, S),
        "bias an experiment": _leaf(N, H, T, S),
    }[mask]
    leaves = [query, key, value] + ([given] if given is not None and given.requires_grad else [])
    _agree(
        lambda: F.scaled_dot_product_attention(
            query, key, value, attn_mask=given, is_causal=mask == "causal", scale=0.3 if mask == "rows" else None
        ),
        leaves,
    )
    assert len(batched) == 1


@pays
def test_a_row_with_nothing_to_attend_to_stays_a_number():
    query, key, value = _leaf(N, H, T, D), _leaf(N, H, S, D), _leaf(N, H, S, D)
    with onednn.products():
        found = F.scaled_dot_product_attention(query, key, value, torch.zeros(N, 1, T, S, dtype=torch.bool))
        found.sum().backward()
    assert found.isfinite().all()
    assert all(leaf.grad.isfinite().all() for leaf in (query, key, value))


@pytest.fixture
def batched(monkeypatch) -> list[torch.Size]:
    """Shapes of the queries whose attention was batched."""
    shapes, apply = [], onednn._Attention.apply

    def noted(query, *rest):
        shapes.append(query.shape)
        return apply(query, *rest)

    monkeypatch.setattr(onednn._Attention, "apply", noted)
    return shapes


def _ordinary_cases() -> dict[str, tuple[tuple, dict]]:
    """Arguments of attention that the batched form does not take."""
    q, k = torch.randn(N, H, T, D), torch.randn(N, H, S, D)
    long = torch.randn(1, 1, 257, D)
    return {
        "float64": ((q.double(), k.double(), k.double()), {}),
        "bfloat16": ((q.bfloat16(), k.bfloat16(), k.bfloat16()), {}),
        "long": ((long, long, long), {}),
        "grouped": ((q, k[:, :1], k[:, :1]), {"enable_gqa": True}),
        "shared keys": ((q, k[:1], k[:1]), {}),
        "nothing": ((q[:0], k[:0], k[:0]), {}),
        "three dimensions": ((q[0], k[0], k[0]), {}),
    }


@pays
@pytest.mark.parametrize("case", sorted(_ordinary_cases()))
def test_other_attention_goes_the_ordinary_way(case, batched):
    given, options = _ordinary_cases()[case]
    wanted = F.scaled_dot_product_attention(*given, **options)
    with onednn.products():
        torch.testing.assert_close(F.scaled_dot_product_attention(*given, **options), wanted)
        assert _allowed() == "bf16"
    assert batched == []


@pays
def test_under_autocast_it_goes_the_ordinary_way(batched):
    q = _leaf(N, H, T, D)
    with torch.autocast("cpu", dtype=torch.bfloat16), onednn.products():
        F.scaled_dot_product_attention(q, q, q).sum().backward()
    assert batched == []
    assert q.grad is not None


@pays
def test_the_setting_is_put_back_when_the_last_one_leaves():
    first, second = onednn.products(), onednn.products()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert _allowed() == "bf16"
    second.__exit__(None, None, None)
    assert _allowed() == "none"
    with pytest.raises(RuntimeError), onednn.products():
        F.linear(torch.ones(2, 3), torch.ones(4, 5))
    assert _allowed() == "none"


@pays
def test_another_thread_goes_its_ordinary_way(batched):
    q, changed = torch.randn(N, H, T, D), []

    def look() -> None:
        F.scaled_dot_product_attention(q, q, q)
        changed.append(_allowed())

    with onednn.products():
        other = threading.Thread(target=look)
        other.start()
        other.join()
        assert (batched, changed) == ([], ["bf16"]), "the setting is the process's and stays"
        F.scaled_dot_product_attention(q, q, q)
        assert batched == [q.shape]
    look()
    assert changed == ["bf16", "none"]


@pays
@pytest.mark.parametrize("outside", ["dropout", "products"])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_with_a_banks_dropout(outside, p, batched):
    """Without noise the batched form serves; with it the bank's own, whose products go through oneDNN as well."""
    q = torch.randn(N, H, T, D)
    allowed = []
    contexts = {"dropout": lambda: shared_dropout(2), "products": onednn.products}
    first, second = (contexts[name] for name in (outside, ({*contexts} - {outside}).pop()))
    bernoulli = torch.Tensor.bernoulli_

    def noted(self, *given, **named):
        allowed.append(_allowed())
        return bernoulli(self, *given, **named)

    with pytest.MonkeyPatch.context() as patch, first(), second():
        patch.setattr(torch.Tensor, "bernoulli_", noted)
        F.scaled_dot_product_attention(q, q, q, dropout_p=p)
    assert batched == ([q.shape] if p == 0 else [])
    assert allowed == (["bf16"] if p else [])
    assert F.scaled_dot_product_attention is onednn._attend
    assert _allowed() == "none"


@pays
def test_nothing_to_multiply():
    with onednn.products():
        assert nn.Linear(6, 8)(torch.zeros(0, 6)).shape == (0, 8)
