"""Multi-adapter layers compute for each experiment's rows what a separate layer computes."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from blipfit.adapters.layers import BankEmbedding, BankLayerNorm, BankLinear, BankLoRA
from blipfit.runtime import onednn

K, R, IN, OUT = 3, 5, 4, 6
"""Experiments, rows of each, input width, output width."""

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def _parameter(*shape: int, dtype=torch.float64) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, dtype=dtype))


def _assert_equal_gradients(actual: torch.Tensor, expected: torch.Tensor, leaves: list[torch.Tensor]) -> None:
    direction = torch.randn_like(expected)
    gradients, expected_gradients = (
        torch.autograd.grad(y, leaves, direction, retain_graph=True) for y in (actual, expected)
    )
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, atol=2e-5, rtol=1e-5)


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture(params=["torch's", "oneDNN's"])
def arithmetic(request):
    """Both ways in which a CPU computes fp32; the second only where it is faster."""
    with onednn.onednn_products() if request.param == "oneDNN's" else nullcontext():
        yield


@DTYPES
@pytest.mark.usefixtures("arithmetic")
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("middle", [(), (7,)])
def test_linear(biased, middle, dtype):
    weight = _parameter(K, OUT, IN, dtype=dtype)
    bias = _parameter(K, OUT, dtype=dtype) if biased else None
    x = torch.randn(K * R, *middle, IN, dtype=dtype, requires_grad=True)
    y = BankLinear(weight, bias)(x)
    parts = [
        nn.functional.linear(x_k, weight[k], bias[k] if bias is not None else None) for k, x_k in enumerate(x.chunk(K))
    ]
    torch.testing.assert_close(y, torch.cat(parts))
    _assert_equal_gradients(y, torch.cat(parts), [x, weight] + ([bias] if bias is not None else []))


@pytest.mark.parametrize("size", [1, K])
def test_layer_norm(size):
    weight, bias = _parameter(size, IN), _parameter(size, IN)
    x = torch.randn(size * R, 7, IN, dtype=torch.float64)
    y = BankLayerNorm(weight, bias, 1e-6)(x)
    for k, (x_k, y_k) in enumerate(zip(x.chunk(size), y.chunk(size), strict=True)):
        torch.testing.assert_close(y_k, nn.functional.layer_norm(x_k, (IN,), weight[k], bias[k], 1e-6))


def test_layer_norm_of_rows_that_all_experiments_share():
    weight, bias = _parameter(K, IN), _parameter(K, IN)
    x = torch.randn(1, R, 7, IN, dtype=torch.float64, requires_grad=True)
    norm = BankLayerNorm(weight, bias, 1e-6)
    y, expected = norm(x), norm(x.expand(K, -1, -1, -1).flatten(0, 1)).view(K, R, 7, IN)
    torch.testing.assert_close(y, expected)
    _assert_equal_gradients(y, expected, [x, weight, bias])


@pytest.mark.parametrize("size", [1, K])
def test_embedding(size):
    table = _parameter(size, 9, IN)
    ids = torch.randint(9, (size * R, 7))
    y = BankEmbedding(table)(ids)
    y.square().sum().backward()
    for k, (ids_k, y_k) in enumerate(zip(ids.chunk(size), y.chunk(size), strict=True)):
        own_table = table[k].detach().clone().requires_grad_()
        expected = nn.functional.embedding(ids_k, own_table)
        assert torch.equal(y_k, expected)
        expected.square().sum().backward()
        torch.testing.assert_close(table.grad[k], own_table.grad)


@DTYPES
@pytest.mark.usefixtures("arithmetic")
@pytest.mark.parametrize(("rank", "is_adalora"), [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("has_lora", [(1, 1, 1), (0, 1, 1), (1, 0, 1), (1, 1, 0), (0, 1, 0)])
def test_lora_of_some_experiments(has_lora, rank, is_adalora, dtype):
    base = nn.Linear(IN, OUT, dtype=dtype).requires_grad_(False)
    A, B = _parameter(K, rank, IN, dtype=dtype), _parameter(K, OUT, rank, dtype=dtype)
    E = _parameter(K, rank, 1, dtype=dtype) if is_adalora else None
    scale = torch.tensor([0.5, 2.0, 3.0], dtype=dtype) * torch.tensor(has_lora)
    last = K - has_lora[::-1].index(1)
    layer = BankLoRA(base, A, B, scale, slice(has_lora.index(1), last), E)
    x = torch.randn(K * R, 7, IN, dtype=dtype, requires_grad=True)
    y = layer(x)
    assert layer.weight is base.weight
    scaled_A = A if E is None else A * E
    parts = [base(x_k) + scale[k] * (x_k @ scaled_A[k].T @ B[k].T) for k, x_k in enumerate(x.chunk(K))]
    torch.testing.assert_close(y, torch.cat(parts))
    _assert_equal_gradients(y, torch.cat(parts), [x, A, B] + ([E] if E is not None else []))
    y.square().sum().backward()
    assert [bool(grad.any()) for grad in A.grad] == [bool(flag) for flag in has_lora]
    assert base.weight.grad is None


@DTYPES
@pytest.mark.usefixtures("arithmetic")
@pytest.mark.parametrize("span", [slice(0, K), slice(0, 0)])
def test_lora_with_a_gradient_that_is_not_contiguous(span, dtype):
    base = nn.Linear(IN, OUT, dtype=dtype).requires_grad_(False)
    A, B = _parameter(K, 2, IN, dtype=dtype), _parameter(K, OUT, 2, dtype=dtype)
    scale = torch.zeros(K, dtype=dtype)
    scale[span] = 1
    x = torch.randn(K * R, 7, IN, dtype=dtype, requires_grad=True)
    y = BankLoRA(base, A, B, scale, span)(x)
    expected = base(x) + (x.view(K, -1, IN) @ A.mT @ B.mT * scale[:, None, None]).view_as(y)
    torch.testing.assert_close(y, expected)
    _assert_equal_gradients(y.transpose(1, 2), expected.transpose(1, 2), [x, A, B])
