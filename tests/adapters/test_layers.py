"""multi-adapter layers give every slice of rows what its own plain layer gives."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from blipfit.adapters.layers import BankEmbedding, BankLayerNorm, BankLinear, BankLoRA
from blipfit.runtime import cpu

K, R, IN, OUT = 3, 5, 4, 6

TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def _parameter(*shape: int, dtype=torch.float64) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, dtype=dtype))


def _gradients_agree(ours: torch.Tensor, theirs: torch.Tensor, leaves: list[torch.Tensor]) -> None:
    direction = torch.randn_like(theirs)
    found, wanted = (torch.autograd.grad(y, leaves, direction, retain_graph=True) for y in (ours, theirs))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-5)


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture(params=["torch's", "oneDNN's"])
def arithmetic(request):
    """Both ways in which a CPU computes fp32; the second only where it pays."""
    with cpu.products() if request.param == "oneDNN's" else nullcontext():
        yield


@TYPES
@pytest.mark.usefixtures("arithmetic")
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("middle", [(), (7,)])
def test_linear(biased, middle, dtype):
    weight = _parameter(K, OUT, IN, dtype=dtype)
    bias = _parameter(K, OUT, dtype=dtype) if biased else None
    x = torch.randn(K * R, *middle, IN, dtype=dtype, requires_grad=True)
    y = BankLinear(weight, bias)(x)
    parts = [
        nn.functional.linear(own, weight[k], bias[k] if bias is not None else None) for k, own in enumerate(x.chunk(K))
    ]
    torch.testing.assert_close(y, torch.cat(parts))
    _gradients_agree(y, torch.cat(parts), [x, weight] + ([bias] if bias is not None else []))


@pytest.mark.parametrize("k_fold", [1, K])
def test_layer_norm(k_fold):
    weight, bias = _parameter(k_fold, IN), _parameter(k_fold, IN)
    x = torch.randn(k_fold * R, 7, IN, dtype=torch.float64)
    y = BankLayerNorm(weight, bias, 1e-6)(x)
    for k, (own, out) in enumerate(zip(x.chunk(k_fold), y.chunk(k_fold), strict=True)):
        torch.testing.assert_close(out, nn.functional.layer_norm(own, (IN,), weight[k], bias[k], 1e-6))


def test_layer_norm_of_what_is_the_same_for_all():
    weight, bias = _parameter(K, IN), _parameter(K, IN)
    x = torch.randn(1, R, 7, IN, dtype=torch.float64, requires_grad=True)
    norm = BankLayerNorm(weight, bias, 1e-6)
    y, theirs = norm(x), norm(x.expand(K, -1, -1, -1).flatten(0, 1)).view(K, R, 7, IN)
    torch.testing.assert_close(y, theirs)
    _gradients_agree(y, theirs, [x, weight, bias])


@pytest.mark.parametrize("k_fold", [1, K])
def test_embedding(k_fold):
    table = _parameter(k_fold, 9, IN)
    ids = torch.randint(9, (k_fold * R, 7))
    y = BankEmbedding(table)(ids)
    y.square().sum().backward()
    for k, (own, out) in enumerate(zip(ids.chunk(k_fold), y.chunk(k_fold), strict=True)):
        alone = table[k].detach().clone().requires_grad_()
        expected = nn.functional.embedding(own, alone)
        assert torch.equal(out, expected)
        expected.square().sum().backward()
        torch.testing.assert_close(table.grad[k], alone.grad)


@TYPES
@pytest.mark.usefixtures("arithmetic")
@pytest.mark.parametrize(("rank", "adaptive"), [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("has", [(1, 1, 1), (0, 1, 1), (1, 0, 1), (1, 1, 0), (0, 1, 0)])
def test_lora_of_some_experiments(has, rank, adaptive, dtype):
    base = nn.Linear(IN, OUT, dtype=dtype).requires_grad_(False)
    A, B = _parameter(K, rank, IN, dtype=dtype), _parameter(K, OUT, rank, dtype=dtype)
    E = _parameter(K, rank, 1, dtype=dtype) if adaptive else None
    scale = torch.tensor([0.5, 2.0, 3.0], dtype=dtype) * torch.tensor(has)
    last = K - has[::-1].index(1)
    layer = BankLoRA(base, A, B, scale, slice(has.index(1), last), E)
    x = torch.randn(K * R, 7, IN, dtype=dtype, requires_grad=True)
    y = layer(x)
    assert layer.weight is base.weight
    down = A if E is None else A * E
    parts = [base(own) + scale[k] * (own @ down[k].T @ B[k].T) for k, own in enumerate(x.chunk(K))]
    torch.testing.assert_close(y, torch.cat(parts))
    _gradients_agree(y, torch.cat(parts), [x, A, B] + ([E] if E is not None else []))
    y.square().sum().backward()
    assert [bool(grad.any()) for grad in A.grad] == [bool(there) for there in has]
    assert base.weight.grad is None


@TYPES
@pytest.mark.usefixtures("arithmetic")
@pytest.mark.parametrize("span", [slice(0, K), slice(0, 0)])
def test_lora_below_a_gradient_that_is_not_contiguous(span, dtype):
    base = nn.Linear(IN, OUT, dtype=dtype).requires_grad_(False)
    A, B = _parameter(K, 2, IN, dtype=dtype), _parameter(K, OUT, 2, dtype=dtype)
    scale = torch.zeros(K, dtype=dtype)
    scale[span] = 1
    x = torch.randn(K * R, 7, IN, dtype=dtype, requires_grad=True)
    ours = BankLoRA(base, A, B, scale, span)(x)
    low = (x.view(K, -1, IN) @ A.mT @ B.mT * scale[:, None, None]).view_as(ours)
    torch.testing.assert_close(ours, base(x) + low)
    _gradients_agree(ours.transpose(1, 2), (base(x) + low).transpose(1, 2), [x, A, B])
