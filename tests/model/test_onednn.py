"""Products through oneDNN are torch's own, forward and backward."""

import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from blipfit.model import onednn

N, H, T, S, D = 2, 3, 5, 7, 8

pays = pytest.mark.skipif(not onednn.pays(), reason="oneDNN has nothing to give on this machine")


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def _leaf(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, requires_grad=True)


def _agree(compute: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> None:
    """Equal values and equal gradients of one random direction, inside and outside."""
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


def test_a_machine_that_rounds_is_left_alone(monkeypatch):
    monkeypatch.setattr(onednn, "_exact", lambda size: False)
    assert not onednn.pays.__wrapped__()
    monkeypatch.setattr(onednn, "pays", lambda: False)
    before = _allowed(), F.scaled_dot_product_attention
    with onednn.products():
        assert (_allowed(), F.scaled_dot_product_attention) == before


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


@pays
@pytest.mark.parametrize("case", ["float64", "bfloat16", "long", "grouped"])
def test_other_attention_goes_the_ordinary_way(case, batched):
    dtype = {"float64": torch.float64, "bfloat16": torch.bfloat16}.get(case, torch.float32)
    length, heads = onednn.LONGEST + 1 if case == "long" else S, 1 if case == "grouped" else 2
    query, key = torch.randn(N, 2, T, D, dtype=dtype), torch.randn(N, heads, length, D, dtype=dtype)
    compute = lambda: F.scaled_dot_product_attention(query, key, key, enable_gqa=case == "grouped")  # noqa: E731
    wanted = compute()
    with onednn.products():
        torch.testing.assert_close(compute(), wanted)
        assert _allowed() == "bf16"
    assert batched == []


@pays
def test_everything_is_put_back_when_the_last_one_leaves():
    before = _allowed(), F.scaled_dot_product_attention
    first, second = onednn.products(), onednn.products()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert _allowed() == "bf16"
    second.__exit__(None, None, None)
    assert (_allowed(), F.scaled_dot_product_attention) == before
    with pytest.raises(RuntimeError), onednn.products():
        F.linear(torch.ones(2, 3), torch.ones(4, 5))
    assert (_allowed(), F.scaled_dot_product_attention) == before


@pays
def test_another_threads_attention_goes_its_ordinary_way(batched):
    q = torch.randn(N, H, T, D)
    with onednn.products():
        other = threading.Thread(target=F.scaled_dot_product_attention, args=(q, q, q))
        other.start()
        other.join()
        assert batched == []
        F.scaled_dot_product_attention(q, q, q)
        assert batched == [q.shape]


@pays
def test_nothing_to_multiply():
    with onednn.products():
        assert nn.Linear(6, 8)(torch.zeros(0, 6)).shape == (0, 8)
