"""K-fold layers give every slice of rows what its own plain layer gives."""

import pytest
import torch
from torch import nn

from blipfit.adapters.layers import BankEmbedding, BankLayerNorm, BankLinear, BankLoRA

K, R, IN, OUT = 3, 5, 4, 6


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, dtype=torch.float64))


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("middle", [(), (7,)])
def test_linear(biased, middle):
    weight, bias = _parameter(K, OUT, IN), _parameter(K, OUT) if biased else None
    x = torch.randn(K * R, *middle, IN, dtype=torch.float64)
    y = BankLinear(weight, bias)(x)
    for k, (own, out) in enumerate(zip(x.chunk(K), y.chunk(K), strict=True)):
        torch.testing.assert_close(out, nn.functional.linear(own, weight[k], bias[k] if bias is not None else None))


@pytest.mark.parametrize("k_fold", [1, K])
def test_layer_norm(k_fold):
    weight, bias = _parameter(k_fold, IN), _parameter(k_fold, IN)
    x = torch.randn(k_fold * R, 7, IN, dtype=torch.float64)
    y = BankLayerNorm(weight, bias, 1e-6)(x)
    for k, (own, out) in enumerate(zip(x.chunk(k_fold), y.chunk(k_fold), strict=True)):
        torch.testing.assert_close(out, nn.functional.layer_norm(own, (IN,), weight[k], bias[k], 1e-6))


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


@pytest.mark.parametrize("has", [(1, 1, 1), (0, 1, 1), (1, 0, 1), (1, 1, 0), (0, 1, 0)])
def test_lora_of_some_experiments(has):
    base = nn.Linear(IN, OUT, dtype=torch.float64).requires_grad_(False)
    A, B = _parameter(K, 2, IN), _parameter(K, OUT, 2)
    scale = torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64) * torch.tensor(has)
    last = K - has[::-1].index(1)
    layer = BankLoRA(base, A, B, scale, slice(has.index(1), last))
    x = torch.randn(K * R, 7, IN, dtype=torch.float64)
    y = layer(x)
    y.square().sum().backward()
    assert layer.weight is base.weight
    for k, (own, out) in enumerate(zip(x.chunk(K), y.chunk(K), strict=True)):
        expected = base(own) + scale[k] * (own @ A[k].T @ B[k].T)
        torch.testing.assert_close(out, expected)
        assert bool(A.grad[k].any()) == bool(has[k])
    assert base.weight.grad is None
