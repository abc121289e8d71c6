"""Products through oneDNN are torch's own, forward and backward."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from blipfit.model import onednn

K, R, IN, OUT, RANK = 3, 5, 8, 6, 2

pytestmark = pytest.mark.skipif(not onednn._present(), reason="this torch was built without oneDNN")


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def _leaf(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, requires_grad=True)


def _agree(ours: torch.Tensor, theirs: torch.Tensor, leaves: list[torch.Tensor]) -> None:
    """Equal values and equal gradients of one random direction."""
    torch.testing.assert_close(ours, theirs)
    direction = torch.randn_like(theirs)
    found, wanted = (torch.autograd.grad(y, leaves, direction) for y in (ours, theirs))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("middle", [(), (7,)])
def test_a_linear_layer(biased, trained, middle):
    layer = nn.Linear(IN, OUT, bias=biased).requires_grad_(trained)
    x = _leaf(R, *middle, IN)
    with onednn.products():
        ours = layer(x)
    assert "_Linear" in type(ours.grad_fn).__name__
    _agree(ours, layer(x), [x, *(p for p in layer.parameters() if p.requires_grad)])


@pytest.mark.parametrize("biased", [True, False])
def test_a_bank_of_linear_layers(biased):
    x, weight, bias = _leaf(K, R, IN), _leaf(K, OUT, IN), _leaf(K, OUT) if biased else None
    theirs = torch.stack([F.linear(x[k], weight[k], None if bias is None else bias[k]) for k in range(K)])
    _agree(onednn.bank(x, weight, bias), theirs, [x, weight] + ([] if bias is None else [bias]))


@pytest.mark.parametrize("span", [slice(0, K), slice(1, K), slice(0, 1), slice(0, 0)])
def test_low_rank_products_beside_a_frozen_layer(span):
    base = nn.Linear(IN, OUT).requires_grad_(False)
    inside = len(range(K)[span])
    x, A, B = _leaf(K, R, IN), _leaf(inside, RANK, IN), _leaf(inside, OUT, RANK)
    low = x[span] @ A.mT @ B.mT
    theirs = base(x) + torch.cat([low.new_zeros(span.start, R, OUT), low, low.new_zeros(K - span.stop, R, OUT)])
    ours = onednn.low_rank(x, base.weight, base.bias, A, B, span)
    _agree(ours, theirs, [x, A, B] if inside else [x])


def test_a_gradient_that_is_not_contiguous():
    base = nn.Linear(IN, OUT).requires_grad_(False)
    x, A, B = _leaf(K, R, IN), _leaf(K, RANK, IN), _leaf(K, OUT, RANK)
    ours = onednn.low_rank(x, base.weight, base.bias, A, B).transpose(1, 2)
    _agree(ours, (base(x) + x @ A.mT @ B.mT).transpose(1, 2), [x, A, B])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_go_the_ordinary_way(dtype):
    x, layer = torch.randn(R, IN, dtype=dtype), nn.Linear(IN, OUT, dtype=dtype)
    with onednn.products():
        assert not onednn.usable(x)
        assert torch.equal(layer(x), layer(x))
        assert "_Linear" not in type(layer(x).grad_fn).__name__
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not onednn.usable(x.float())


def test_the_function_is_put_back_also_after_an_error():
    before = F.linear
    with pytest.raises(RuntimeError), onednn.products():
        F.linear(torch.ones(2, 3), torch.ones(4, 5))
    assert F.linear is before


def test_nothing_to_multiply():
    with onednn.products():
        assert nn.Linear(IN, OUT)(torch.zeros(0, IN)).shape == (0, OUT)
