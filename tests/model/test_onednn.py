"""Products through oneDNN are torch's own, forward and backward."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from blipfit.model import onednn

K, R, IN, OUT, RANK = 3, 5, 8, 6, 2

pytestmark = pytest.mark.skipif(not onednn.pays(), reason="oneDNN has nothing to give on this machine")


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
def test_a_linear_layer(biased, trained, middle, went_through):
    layer = nn.Linear(IN, OUT, bias=biased).requires_grad_(trained)
    x = _leaf(R, *middle, IN)
    with onednn.products():
        ours = layer(x)
    assert went_through == [OUT]
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


@pytest.fixture
def went_through(monkeypatch) -> list[int]:
    """Widths of the products that went through oneDNN."""
    widths, product = [], onednn.product

    def noted(x, weight, bias=None):
        widths.append(len(weight))
        return product(x, weight, bias)

    monkeypatch.setattr(onednn, "product", noted)
    return widths


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_go_the_ordinary_way(dtype, went_through):
    with onednn.products():
        nn.Linear(IN, OUT, dtype=dtype)(torch.randn(R, IN, dtype=dtype))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            nn.Linear(IN, OUT)(torch.randn(R, IN))
    assert went_through == []


def test_the_function_is_put_back_when_the_last_one_leaves():
    before = F.linear
    first, second = onednn.products(), onednn.products()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert F.linear is not before
    second.__exit__(None, None, None)
    assert F.linear is before
    with pytest.raises(RuntimeError), onednn.products():
        F.linear(torch.ones(2, 3), torch.ones(4, 5))
    assert F.linear is before


def test_another_thread_goes_its_ordinary_way(went_through):
    with onednn.products(), ThreadPoolExecutor(1) as other:
        other.submit(F.linear, torch.ones(2, 3), torch.ones(4, 3)).result()
        assert went_through == []
        F.linear(input=torch.ones(2, 3), weight=torch.ones(4, 3))
        assert went_through == [4]


def test_nothing_to_multiply():
    with onednn.products():
        assert nn.Linear(IN, OUT)(torch.zeros(0, IN)).shape == (0, OUT)
