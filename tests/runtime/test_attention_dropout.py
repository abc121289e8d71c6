"""Attention with dropout equals an explicit reference, in values and gradients and in all dtypes."""

import pytest
import torch
import torch.nn.functional as F

from attention_inputs import (
    D,
    H,
    K,
    N,
    S,
    T,
    assert_close,
    causal_mask,
    context,
    make_leaf,
    make_module,
    needs_onednn,
    padding_mask,
)
from blipfit.runtime import attention
from blipfit.runtime.shared_dropout import BANK_SIZE, sample_mask


def _reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    scale: float,
    noise: torch.Tensor,
) -> torch.Tensor:
    """Attention written out; `noise` is 0 or 1 / (1 − p)."""
    scores = query @ key.mT * scale
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return (scores.softmax(-1) * noise) @ value


def _noise(p: float, bank_size: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The next noise `K·B × …` of torch's generator, whose state does not change."""
    with torch.random.fork_rng():
        mask_B = torch.empty(shape[0] // bank_size, *shape[1:], dtype=dtype).bernoulli_(1 - p)
    return mask_B.repeat(bank_size, *[1] * (len(shape) - 1)) / (1 - p)


@pytest.mark.parametrize("route", ["torch", pytest.param("onednn", marks=needs_onednn)])
@pytest.mark.parametrize("bank_size", [1, K])
@pytest.mark.parametrize("scale", [None, 0.3, 1.0])
@pytest.mark.parametrize("name", ["none", "causal", "rows", "additive", "bias", "bias and rows", "bias and causal"])
def test_dropout_equals_the_reference_with_the_same_noise(name, scale, bank_size, route, batched_shapes):
    p, rows = 0.4, K * N
    leaves = [make_leaf(rows, length, H, D) for length in (T, S, S)]
    bias = make_leaf(1, H, T, S) if "bias" in name else None
    padding = padding_mask(S, S - 2).repeat(K, 1, 1, 1) if "rows" in name else None
    mask = make_leaf(rows, 1, T, S) if name == "additive" else attention.CAUSAL if "causal" in name else padding
    inputs = [*leaves, *(x for x in (mask, bias) if x is not None and x.requires_grad)]
    module = make_module(is_causal=False, **({BANK_SIZE: K} if bank_size > 1 else {}))
    query, key, value = (x.transpose(1, 2) for x in leaves)

    noise = _noise(p, bank_size, rows, H, T, S)
    assert 0.2 < (noise == 0).float().mean() < 0.6
    visible_keys = causal_mask() if "causal" in name else mask
    expected = _reference(query, key, value, bias, visible_keys, D**-0.5 if scale is None else scale, noise)
    direction = torch.randn_like(expected, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(expected, inputs, direction)

    with context(route):
        actual, _ = attention.forward(module, query, key, value, mask, dropout=p, scaling=scale, position_bias=bias)
        actual = actual.transpose(1, 2)
        actual_gradients = torch.autograd.grad(actual, inputs, direction)
    for result, reference_result in zip((actual, *actual_gradients), (expected, *gradients), strict=True):
        assert_close(result, reference_result)
    assert batched_shapes == [query.shape]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_experiments_have_the_same_noise(dtype):
    q, k, v = (torch.randn(2, 2, 30, 4, dtype=dtype).repeat(3, 1, 1, 1) for _ in range(3))
    module = make_module(is_causal=False, **{BANK_SIZE: 3})
    y = attention.forward(module, q, k, v, None, dropout=0.5)[0].transpose(1, 2)
    assert all(torch.equal(part, y[:2]) for part in y.chunk(3))
    assert (y - F.scaled_dot_product_attention(q, k, v)).abs().mean() > 0.05


def test_different_questions_and_heads_have_different_noise():
    x = torch.randn(1, 1, 30, 4).expand(4, 2, 30, 4)
    y = attention.compute_batched(x, x, x, None, None, 0.5, 0.5, 2)
    assert not torch.equal(y[0], y[1])
    assert not torch.equal(y[0, 0], y[0, 1])
    assert torch.equal(y[:2], y[2:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_a_bank_computes_as_each_experiment_alone(p, dtype):
    """Values and gradients."""
    query, key, value = (make_leaf(K * N, H, length, D, dtype=dtype) for length in (T, S, S))
    bias, direction = torch.randn(1, H, T, S, dtype=dtype), torch.randn(K * N, H, T, D, dtype=dtype)
    mask = padding_mask(S, S - 2)
    torch.manual_seed(1)
    bank_output = attention.compute_batched(query, key, value, bias, mask.repeat(K, 1, 1, 1), 0.3, p, K)
    bank_output.backward(direction)
    for rows in torch.arange(K * N).chunk(K):
        leaves = [x.detach()[rows].requires_grad_() for x in (query, key, value)]
        torch.manual_seed(1)
        single_output = attention.compute_batched(*leaves, bias, mask, 0.3, p)
        single_output.backward(direction[rows])
        torch.testing.assert_close(single_output, bank_output[rows])
        for leaf, bank_leaf in zip(leaves, (query, key, value), strict=True):
            torch.testing.assert_close(leaf.grad, bank_leaf.grad[rows])


def test_causal_attention_with_dropout_ignores_later_tokens():
    query, key, value = make_leaf(N, H, T, D), make_leaf(N, H, T, D), make_leaf(N, H, T, D)
    output, _ = attention.forward(make_module(), query, key, value, attention.CAUSAL, dropout=0.5)
    output[:, :2].sum().backward()
    assert (key.grad[:, :, 2:] == 0).all()
    assert (value.grad[:, :, 2:] == 0).all()
    assert value.grad[:, :, :2].abs().sum() > 0


def test_dropout_with_grouped_keys_is_refused():
    q, k = torch.randn(N, 4, T, D), torch.randn(N, 2, S, D)
    with pytest.raises(NotImplementedError, match="grouped"):
        attention.forward(make_module(num_key_value_groups=2), q, k, k, None, dropout=0.5)


@pytest.fixture
def computed_dtypes(monkeypatch) -> list[torch.dtype]:
    """Dtypes in which attention probabilities were computed."""
    dtypes, compute = [], attention._probabilities

    def record(query, *rest):
        dtypes.append(query.dtype)
        return compute(query, *rest)

    monkeypatch.setattr(attention, "_probabilities", record)
    return dtypes


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize(
    ("dtype", "count"), [(torch.float64, 1), (torch.float32, 1), (torch.bfloat16, 2), (torch.float16, 2)]
)
def test_only_16_bit_probabilities_are_computed_again(dtype, count, p, computed_dtypes):
    query, key, value = (make_leaf(N, H, length, D, dtype=dtype) for length in (T, S, S))
    output = attention.compute_batched(query, key, value, None, None, 0.3, p)
    assert computed_dtypes == [dtype]
    saved_shapes = [x.shape for x in output.grad_fn.saved_tensors if x is not None and x.is_floating_point()]
    assert ((N * H, T, S) in saved_shapes) == (count == 1)
    output.sum().backward()
    assert computed_dtypes == [dtype] * count


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("name", ["none", "rows", "causal", "additive"])
def test_gradients_in_bfloat16_equal_those_in_fp32(name, p):
    query, key, value = (make_leaf(K * N, H, length, D) for length in (T, S, S))
    bias = make_leaf(1, H, T, S)
    mask = {
        "none": None,
        "rows": padding_mask(S, S - 2).repeat(K, 1, 1, 1),
        "causal": causal_mask(),
        "additive": make_leaf(K * N, 1, T, S),
    }[name]
    inputs = [query, key, value, bias, *([mask] if name == "additive" else [])]
    for leaf in inputs:
        leaf.data = leaf.data.bfloat16().float()  # both start from the same numbers
    direction = torch.randn(K * N, H, T, D).bfloat16()
    if p:
        torch.manual_seed(1)
        mask_B = sample_mask(attention._shape_only(query.bfloat16(), (K * N, H, T, S)), p, K)
        noise = mask_B.repeat(K, 1, 1, 1) / (1 - p)
    else:
        noise = torch.ones(())
    expected = _reference(query, key, value, bias, mask, 0.3, noise)
    gradients = torch.autograd.grad(expected, inputs, direction.float())

    bfloat16_leaves = [leaf.detach().bfloat16().requires_grad_() for leaf in inputs]
    torch.manual_seed(1)
    actual = attention.compute_batched(
        *bfloat16_leaves[:4], bfloat16_leaves[4] if name == "additive" else mask, 0.3, p, K
    )
    actual_gradients = torch.autograd.grad(actual, bfloat16_leaves, direction)
    for result, reference_result in zip((actual, *actual_gradients), (expected, *gradients), strict=True):
        assert result.dtype == torch.bfloat16
        _assert_within_rounding(result, reference_result)


def _assert_within_rounding(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Assert a difference of a few bfloat16 roundings at most, and much less on average."""
    difference = (actual.float() - expected).detach()
    size = float(expected.detach().abs().max())
    assert float(difference.abs().max()) < 4 * 2**-8 * size
    assert float(difference.norm()) < 2**-7 * float(expected.detach().norm())


@pytest.mark.parametrize("backward_inside", [True, False])
def test_dropout_under_autocast_is_computed_in_16_bit(backward_inside, batched_shapes, computed_dtypes):
    leaves = [make_leaf(N, H, length, D) for length in (T, S, S)]
    bias = make_leaf(1, H, T, S)
    direction = torch.randn(N, T, H, D)
    torch.manual_seed(1)
    mask_B = sample_mask(attention._shape_only(leaves[0].bfloat16(), (N, H, T, S)), 0.4, 1)
    expected = _reference(*leaves, bias, None, 0.3, mask_B / 0.6).transpose(1, 2)
    gradients = torch.autograd.grad(expected, [*leaves, bias], direction)
    torch.manual_seed(1)
    module = make_module(is_causal=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, _ = attention.forward(module, *leaves, None, dropout=0.4, scaling=0.3, position_bias=bias)
        if backward_inside:
            actual.backward(direction.bfloat16())
    if not backward_inside:
        actual.backward(direction.bfloat16())
    assert actual.dtype == torch.bfloat16
    assert computed_dtypes == [torch.bfloat16] * 2
    assert len(batched_shapes) == 1
    _assert_within_rounding(actual, expected)
    for leaf, gradient in zip((*leaves, bias), gradients, strict=True):
        assert leaf.grad.dtype == torch.float32
        _assert_within_rounding(leaf.grad, gradient)


def test_the_scale_of_dropout_is_exact_in_bfloat16():
    """Rounding 1 / (1 − p) to bfloat16 would make every value 0.2 % too small."""
    p, length = 0.1, 200
    query, key = (torch.randn(4, 2, length, D, dtype=torch.bfloat16) for _ in range(2))
    value = torch.ones(4, 2, length, 1, dtype=torch.bfloat16)
    probabilities = attention._probabilities(query.flatten(0, 1), key.flatten(0, 1), (4, 2), None, None)
    torch.manual_seed(1)
    mask = sample_mask(attention._shape_only(query, (4, 2, length, length)), p, 2)
    torch.manual_seed(1)
    output = attention.compute_batched(query, key, value, None, None, 1.0, p, 2)
    expected = (probabilities.view(4, 2, length, length).double() * mask.repeat(2, 1, 1, 1)).sum(-1) / (1 - p)
    assert float(output.double().sum() / expected.sum()) == pytest.approx(1, abs=1e-3)
    assert float((output[..., 0].double() / expected).mean()) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("bank_size", [None, 1, 2])
@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("name", ["none", "bool", "additive", "additive alone"])
def test_gradients_in_float64(name, scale, bank_size):
    """With fixed noise; without noise if `bank_size` is None."""
    options = {"dtype": torch.float64}
    query, key, value = (make_leaf(4, 2, length, 3, **options) for length in (3, 4, 4))
    bias = None if name == "additive alone" else make_leaf(1, 2, 3, 4, **options)
    mask = {"none": None, "bool": torch.ones(3, 4, dtype=torch.bool).tril(1)}.get(name)
    if "additive" in name:
        mask = make_leaf(4, 1, 1, 4, **options)
    p, noise = 0.0, None
    if bank_size is not None:
        p = 0.3
        noise = sample_mask(attention._shape_only(query, (4, 2, 3, 4)), p, bank_size)
        assert noise.shape == (4 // bank_size, 2, 3, 4)
        assert 0 < (noise == 0).sum() < noise.numel()
    assert torch.autograd.gradcheck(
        lambda *inputs: attention._Attention.apply(*inputs, noise, scale, p), (query, key, value, bias, mask)
    )


@pytest.mark.parametrize("frozen_inputs", [(0,), (1,), (2,), (0, 1), (1, 2)])
def test_gradients_of_some_inputs(frozen_inputs):
    inputs = [make_leaf(4, 2, length, 3, dtype=torch.float64) for length in (3, 4, 4)]
    for i in frozen_inputs:
        inputs[i].requires_grad_(False)
    noise = sample_mask(attention._shape_only(inputs[0], (4, 2, 3, 4)), 0.3, 2)
    assert torch.autograd.gradcheck(
        lambda *inputs: attention._Attention.apply(*inputs, None, None, noise, 0.3, 0.3), inputs
    )


def test_inputs_do_not_change():
    query, key, value = (torch.randn(N, H, length, D) for length in (T, S, S))
    bias, mask = torch.randn(1, H, T, S), torch.randn(N, 1, T, S)
    inputs = (query, key, value, bias, mask)
    copies = [x.clone() for x in inputs]
    for scale in (1.0, 0.3):
        leaves = [x.requires_grad_() for x in inputs]
        attention.compute_batched(*leaves, scale, 0.5).sum().backward()
    assert all(torch.equal(x, copy) for x, copy in zip(inputs, copies, strict=True))
