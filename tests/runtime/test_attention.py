"""Attention of the models is torch's own, in value and gradient; with dropout it equals an explicit reference."""

import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import T5Config, T5Model
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from blipfit.runtime import attention, cpu
from blipfit.runtime.dropout import BANK_SIZE, draw_mask

N, H, T, S, D = 2, 3, 5, 7, 8
K = 3
TINY = 1e-12
"""A dropout probability that drops nothing: the arithmetic beside the dropout is what is left."""

pays = pytest.mark.skipif(not cpu.pays(), reason="oneDNN is not faster on this machine")
BATCHED = [pytest.param("products", marks=pays), "dropout"]
ROUTES = ["sdpa", *BATCHED]


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture
def batched(monkeypatch) -> list[torch.Size]:
    """Shapes of the queries whose attention was batched."""
    shapes, apply = [], attention._Attention.apply

    def record(query, *rest):
        shapes.append(query.shape)
        return apply(query, *rest)

    monkeypatch.setattr(attention._Attention, "apply", record)
    return shapes


def _leaf(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def _leaves(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Query, key and value, laid out as a model's."""
    return [_leaf(N, length, H, D, dtype=dtype) for length in (T, S, S)]


def _module(**attributes: Any) -> nn.Module:
    module = nn.Module()
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def _setting() -> str:
    return torch.backends.mkldnn.matmul.fp32_precision


def _context(route: str) -> AbstractContextManager[None]:
    return cpu.products() if route == "products" else nullcontext()


def _forward(route: str, *inputs: Any, **options: Any) -> torch.Tensor:
    """`attention.forward` by a route → `N × H × T × D`."""
    module = options.pop("module", None) or _module(is_causal=False)
    output, probabilities = attention.forward(module, *inputs, dropout=TINY if route == "dropout" else 0.0, **options)
    assert probabilities is None
    assert output.is_contiguous()
    return output.transpose(1, 2)


def _assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    atol = max(1e-5, 2e-6 * float(expected.detach().abs().max()))
    torch.testing.assert_close(actual, expected, atol=atol, rtol=1e-5)


def _tril() -> torch.Tensor:
    return torch.ones(T, S, dtype=torch.bool).tril()


def _rows(*lengths: int) -> torch.Tensor:
    """Padding on the right, as a bool mask `N × 1 × 1 × S`."""
    return torch.arange(S) < torch.tensor(lengths)[:, None, None, None]


# ---------------------------------------------------------- registration


def test_transformers_knows_it():
    assert ALL_ATTENTION_FUNCTIONS[attention.NAME] is attention.forward


def _t5() -> T5Model:
    shape = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 50}
    return T5Model(T5Config(**shape, dropout_rate=0.5, decoder_start_token_id=0))


@pytest.mark.parametrize("route", ["sdpa", pytest.param("products", marks=pays)])
def test_a_model_uses_it(route, batched):
    """Encoder with position biases, causal decoder, cross-attention."""
    model = _t5().eval()
    ids, answer = torch.randint(1, 50, (N, S)), torch.randint(1, 50, (N, T))
    inputs = {"input_ids": ids, "attention_mask": _rows(S, S - 2)[:, 0, 0].long(), "decoder_input_ids": answer}
    model.set_attn_implementation("eager")
    expected = model(**inputs).last_hidden_state
    attention.use(model)
    assert model.config._attn_implementation == attention.NAME
    with _context(route):
        actual = model(**inputs).last_hidden_state
    _assert_close(actual, expected)
    assert len(batched) == (6 if route == "products" else 0)


def test_a_model_in_training_draws_its_noise_here(batched):
    model = _t5().train()
    attention.use(model)
    ids = torch.randint(1, 50, (N, S))
    model(input_ids=ids, decoder_input_ids=ids).last_hidden_state.sum().backward()
    assert len(batched) == 6
    biases = [parameter for name, parameter in model.named_parameters() if "relative_attention_bias" in name]
    assert len(biases) == 2
    assert all(bias.grad.isfinite().all() and bias.grad.abs().sum() > 0 for bias in biases)


# ---------------------------------------------------- without any dropout

MASKS = ["none", "causal", "causal module", "rows", "positions", "positions alone", "additive", "additive per row"]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("scale", [None, 0.3, 1.0])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_value_and_gradient_are_torchs(name, has_bias, scale, route, batched):
    leaves = _leaves()
    mask = {
        "none": None,
        "causal": attention.CAUSAL,
        "causal module": None,
        "rows": _rows(S, S - 2),
        "positions": torch.ones(T, S, dtype=torch.bool).tril(2).expand(N, 1, T, S),
        "positions alone": torch.ones(T, S, dtype=torch.bool).tril(2),
        "additive": _leaf(1, H, T, S),
        "additive per row": _leaf(N, H, T, S),
    }[name]
    bias = _leaf(1, H, T, S) if has_bias else None
    inputs = [*leaves, *(x for x in (mask, bias) if x is not None and x.requires_grad)]
    module = _module(is_causal=name == "causal module")

    visible_keys = _tril() if "causal" in name else mask
    if visible_keys is None or bias is None:
        reference = bias if visible_keys is None else visible_keys
    elif visible_keys.dtype == torch.bool:
        reference = bias.masked_fill(~visible_keys, float("-inf"))
    else:
        reference = bias + visible_keys
    query, key, value = (x.transpose(1, 2) for x in leaves)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=reference, scale=scale)
    direction = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, inputs, direction)

    with _context(route):
        actual = _forward(route, query, key, value, mask, scaling=scale, position_bias=bias, module=module)
        actual_gradients = torch.autograd.grad(actual, inputs, direction)
    assert actual.dtype == expected.dtype
    for result, reference_result in zip((actual, *actual_gradients), (expected, *gradients), strict=True):
        _assert_close(result, reference_result)
    assert len(batched) == (0 if route == "sdpa" else 1)


@pytest.mark.parametrize("route", ROUTES)
def test_causality_is_as_transformers_decides_it(route):
    """Of the module unless the call says otherwise, and of no module that has a mask or a single query."""
    query, key, value = (x.transpose(1, 2) for x in _leaves())
    causal_output = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    full_output = F.scaled_dot_product_attention(query, key, value)
    first_row = F.scaled_dot_product_attention(query[:, :, :1], key, value)
    open_mask = torch.ones(1, 1, T, S, dtype=torch.bool)
    with _context(route):
        _assert_close(_forward(route, query, key, value, None, module=_module()), causal_output)
        _assert_close(_forward(route, query, key, value, None, is_causal=True), causal_output)
        _assert_close(_forward(route, query, key, value, attention.CAUSAL), causal_output)
        _assert_close(_forward(route, query, key, value, attention.CAUSAL, is_causal=False), causal_output)
        _assert_close(_forward(route, query, key, value, None, is_causal=False, module=_module()), full_output)
        _assert_close(_forward(route, query, key, value, open_mask, is_causal=True), full_output)
        _assert_close(_forward(route, query[:, :, :1], key, value, attention.CAUSAL), first_row)


@pytest.mark.parametrize("mask", ["none", "bool", "additive"])
def test_attention_without_drops_is_torchs(mask):
    q, k, v = (torch.randn(6, 2, 5, 4, dtype=torch.float64) for _ in range(3))
    keep = torch.rand(6, 1, 5, 5) > 0.3
    keep[..., 0] = True
    attention_mask = {"none": None, "bool": keep, "additive": torch.where(keep, 0.0, -1e9).double()}[mask]
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask)
    module = _module(is_causal=False, **{BANK_SIZE: K})
    assert torch.equal(_forward("sdpa", q, k, v, attention_mask, module=module), expected)
    torch.testing.assert_close(_forward("dropout", q, k, v, attention_mask, module=module), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("p", [TINY, 0.5])
def test_a_row_with_nothing_to_attend_to_stays_a_number(p, dtype):
    query, key, value = _leaf(N, H, T, D, dtype=dtype), _leaf(N, H, S, D, dtype=dtype), _leaf(N, H, S, D, dtype=dtype)
    bias = _leaf(1, H, T, S, dtype=dtype)
    mask = torch.zeros(N, 1, T, S, dtype=torch.bool)
    output, _ = attention.forward(_module(), query, key, value, mask, dropout=p, position_bias=bias)
    output.sum().backward()
    assert output.isfinite().all()
    assert all(leaf.grad.isfinite().all() for leaf in (query, key, value, bias))


@pays
def test_a_row_with_nothing_to_attend_to_stays_a_number_in_products(batched):
    query, key, value = _leaf(N, H, T, D), _leaf(N, H, S, D), _leaf(N, H, S, D)
    with cpu.products():
        output = _forward("products", query, key, value, torch.zeros(N, 1, T, S, dtype=torch.bool))
        output.sum().backward()
    assert output.isfinite().all()
    assert all(leaf.grad.isfinite().all() for leaf in (query, key, value))
    assert len(batched) == 1


@pytest.mark.parametrize("route", BATCHED)
def test_a_row_with_nothing_to_attend_to_leaves_the_others_alone(route):
    query, key, value = (x.transpose(1, 2) for x in _leaves())
    mask = _rows(S - 1, 0)
    with _context(route):
        actual = _forward(route, query, key, value, mask)
    _assert_close(actual[:1], F.scaled_dot_product_attention(query, key, value, attn_mask=mask)[:1])


# ------------------------------------------------------- which is batched


def _ordinary_cases() -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """Inputs of attention that are not computed as batched products, and attributes of their module."""
    q, k = torch.randn(N, H, T, D), torch.randn(N, H, S, D)
    long_input = torch.randn(1, 1, 257, D)
    return {
        "float64": ((q.double(), k.double(), k.double(), None), {}),
        "bfloat16": ((q.bfloat16(), k.bfloat16(), k.bfloat16(), None), {}),
        "long": ((long_input, long_input, long_input, None), {}),
        "grouped": ((q, k[:, :1], k[:, :1], None), {"num_key_value_groups": H}),
        "shared keys": ((q, k[:1], k[:1], None), {}),
    }


@pays
@pytest.mark.parametrize("case", sorted(_ordinary_cases()))
def test_other_attention_is_transformers(case, batched, monkeypatch):
    (query, key, value, mask), attributes = _ordinary_cases()[case]
    expected = F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=case == "grouped")
    settings, compute = [], F.scaled_dot_product_attention

    def record(*inputs: Any, **options: Any) -> torch.Tensor:
        settings.append(_setting())
        return compute(*inputs, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    with cpu.products():
        actual = _forward("sdpa", query, key, value, mask, module=_module(is_causal=False, **attributes))
        torch.testing.assert_close(actual, expected)
        assert _setting() == "bf16"
    assert batched == []
    assert settings == ["none"], "oneDNN is slow at its products"


@pays
def test_nothing_to_attend_to_is_not_batched():
    q, k = torch.randn(N, H, T, D), torch.randn(N, H, S, D)
    with cpu.products():
        assert attention._is_batched(q, k, k, None)
        assert not attention._is_batched(q[:0], k[:0], k[:0], None)
        assert not attention._is_batched(q, k[:, :, :0], k[:, :, :0], None)


@pays
def test_masks_of_other_types_are_not_batched():
    q, k = torch.randn(N, H, T, D), torch.randn(N, H, S, D)
    with cpu.products():
        for dtype in (torch.float32, torch.bool):
            assert attention._is_batched(q, k, k, torch.ones(N, 1, 1, S, dtype=dtype))
        for dtype in (torch.float64, torch.bfloat16, torch.long):
            assert not attention._is_batched(q, k, k, torch.ones(N, 1, 1, S, dtype=dtype))


@pays
@pytest.mark.parametrize(("length", "is_batched"), [(256, True), (257, False)])
def test_the_longest_attention_that_is_batched(length, is_batched, batched):
    x = torch.randn(1, 1, length, D)
    with cpu.products():
        _forward("products", x, x, x, None)
    assert len(batched) == is_batched


def test_outside_products_it_is_transformers(batched):
    q = torch.randn(N, H, T, D)
    assert torch.equal(_forward("sdpa", q, q, q, None), F.scaled_dot_product_attention(q, q, q))
    assert batched == []


@pays
def test_under_autocast_it_is_transformers(batched):
    q = _leaf(N, H, T, D)
    with torch.autocast("cpu", dtype=torch.bfloat16), cpu.products():
        _forward("products", q, q, q, None).sum().backward()
    assert batched == []
    assert q.grad is not None


@pays
def test_another_thread_computes_as_transformers_does(batched):
    q, settings = torch.randn(N, H, T, D), []

    def look() -> None:
        _forward("products", q, q, q, None)
        settings.append(_setting())

    with cpu.products():
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        assert (batched, settings) == ([], ["bf16"]), "the setting is the process's and stays"
        _forward("products", q, q, q, None)
        assert batched == [q.shape]
    look()
    assert settings == ["bf16", "none"]
    assert batched == [q.shape]


@pays
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_dropout_within_products(p, batched, monkeypatch):
    """With and without noise the batched products serve, and go through oneDNN."""
    q, settings, bmm = torch.randn(N, H, T, D), [], torch.bmm
    torch_function = F.scaled_dot_product_attention

    def record(*inputs: Any) -> torch.Tensor:
        settings.append(_setting())
        return bmm(*inputs)

    monkeypatch.setattr(torch, "bmm", record)
    with cpu.products():
        attention.forward(_module(**{BANK_SIZE: 2}), q, q, q, None, dropout=p)
    assert batched == [q.shape]
    assert settings == ["bf16", "bf16"]
    assert F.scaled_dot_product_attention is torch_function
    assert _setting() == "none"


# ---------------------------------------------------------- with dropout


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
    """The noise of `K·B × …` that torch's generator holds next; the generator stays where it is."""
    with torch.random.fork_rng():
        kept_mask = torch.empty(shape[0] // bank_size, *shape[1:], dtype=dtype).bernoulli_(1 - p)
    return kept_mask.repeat(bank_size, *[1] * (len(shape) - 1)) / (1 - p)


@pytest.mark.parametrize("route", ["torch", pytest.param("products", marks=pays)])
@pytest.mark.parametrize("bank_size", [1, K])
@pytest.mark.parametrize("scale", [None, 0.3, 1.0])
@pytest.mark.parametrize("name", ["none", "causal", "rows", "additive", "bias", "bias and rows", "bias and causal"])
def test_dropout_equals_the_reference_of_the_same_noise(name, scale, bank_size, route, batched):
    p, rows = 0.4, K * N
    leaves = [_leaf(rows, length, H, D) for length in (T, S, S)]
    bias = _leaf(1, H, T, S) if "bias" in name else None
    padding = _rows(S, S - 2).repeat(K, 1, 1, 1) if "rows" in name else None
    mask = _leaf(rows, 1, T, S) if name == "additive" else attention.CAUSAL if "causal" in name else padding
    inputs = [*leaves, *(x for x in (mask, bias) if x is not None and x.requires_grad)]
    module = _module(is_causal=False, **({BANK_SIZE: K} if bank_size > 1 else {}))
    query, key, value = (x.transpose(1, 2) for x in leaves)

    noise = _noise(p, bank_size, rows, H, T, S)
    assert 0.2 < (noise == 0).float().mean() < 0.6
    visible_keys = _tril() if "causal" in name else mask
    expected = _reference(query, key, value, bias, visible_keys, D**-0.5 if scale is None else scale, noise)
    direction = torch.randn_like(expected, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(expected, inputs, direction)

    with _context(route):
        actual, _ = attention.forward(module, query, key, value, mask, dropout=p, scaling=scale, position_bias=bias)
        actual = actual.transpose(1, 2)
        actual_gradients = torch.autograd.grad(actual, inputs, direction)
    for result, reference_result in zip((actual, *actual_gradients), (expected, *gradients), strict=True):
        _assert_close(result, reference_result)
    assert batched == [query.shape]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_drops_weights_the_same_for_all(dtype):
    q, k, v = (torch.randn(2, 2, 30, 4, dtype=dtype).repeat(3, 1, 1, 1) for _ in range(3))
    module = _module(is_causal=False, **{BANK_SIZE: 3})
    y = attention.forward(module, q, k, v, None, dropout=0.5)[0].transpose(1, 2)
    assert all(torch.equal(part, y[:2]) for part in y.chunk(3))
    assert (y - F.scaled_dot_product_attention(q, k, v)).abs().mean() > 0.05


def test_different_questions_and_heads_have_different_noise():
    x = torch.randn(1, 1, 30, 4).expand(4, 2, 30, 4)
    y = attention.batched(x, x, x, None, None, 0.5, 0.5, 2)
    assert not torch.equal(y[0], y[1])
    assert not torch.equal(y[0, 0], y[0, 1])
    assert torch.equal(y[:2], y[2:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_the_rows_of_a_bank_are_those_of_each_experiment_alone(p, dtype):
    """Values and gradients."""
    query, key, value = (_leaf(K * N, H, length, D, dtype=dtype) for length in (T, S, S))
    bias, direction = torch.randn(1, H, T, S, dtype=dtype), torch.randn(K * N, H, T, D, dtype=dtype)
    mask = _rows(S, S - 2)
    torch.manual_seed(1)
    bank_output = attention.batched(query, key, value, bias, mask.repeat(K, 1, 1, 1), 0.3, p, K)
    bank_output.backward(direction)
    for rows in torch.arange(K * N).chunk(K):
        leaves = [x.detach()[rows].requires_grad_() for x in (query, key, value)]
        torch.manual_seed(1)
        single_output = attention.batched(*leaves, bias, mask, 0.3, p)
        single_output.backward(direction[rows])
        torch.testing.assert_close(single_output, bank_output[rows])
        for leaf, bank_leaf in zip(leaves, (query, key, value), strict=True):
            torch.testing.assert_close(leaf.grad, bank_leaf.grad[rows])


def test_causal_attention_with_dropout_ignores_what_follows():
    query, key, value = _leaf(N, H, T, D), _leaf(N, H, T, D), _leaf(N, H, T, D)
    output, _ = attention.forward(_module(), query, key, value, attention.CAUSAL, dropout=0.5)
    output[:, :2].sum().backward()
    assert (key.grad[:, :, 2:] == 0).all()
    assert (value.grad[:, :, 2:] == 0).all()
    assert value.grad[:, :, :2].abs().sum() > 0


def test_dropout_with_grouped_keys_is_refused():
    q, k = torch.randn(N, 4, T, D), torch.randn(N, 2, S, D)
    with pytest.raises(NotImplementedError, match="grouped"):
        attention.forward(_module(num_key_value_groups=2), q, k, k, None, dropout=0.5)


# ---------------------------------------------------------------- 16 bit


@pytest.fixture
def computed(monkeypatch) -> list[torch.dtype]:
    """Types in which probabilities were computed."""
    types, compute = [], attention._probabilities

    def record(query, *rest):
        types.append(query.dtype)
        return compute(query, *rest)

    monkeypatch.setattr(attention, "_probabilities", record)
    return types


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize(
    ("dtype", "count"), [(torch.float64, 1), (torch.float32, 1), (torch.bfloat16, 2), (torch.float16, 2)]
)
def test_probabilities_are_computed_again_in_16_bit_only(dtype, count, p, computed):
    query, key, value = (_leaf(N, H, length, D, dtype=dtype) for length in (T, S, S))
    output = attention.batched(query, key, value, None, None, 0.3, p)
    assert computed == [dtype]
    saved_shapes = [x.shape for x in output.grad_fn.saved_tensors if x is not None and x.is_floating_point()]
    assert ((N * H, T, S) in saved_shapes) == (count == 1)
    output.sum().backward()
    assert computed == [dtype] * count


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("name", ["none", "rows", "causal", "additive"])
def test_gradients_in_bfloat16_are_those_of_fp32(name, p):
    query, key, value = (_leaf(K * N, H, length, D) for length in (T, S, S))
    bias = _leaf(1, H, T, S)
    mask = {
        "none": None,
        "rows": _rows(S, S - 2).repeat(K, 1, 1, 1),
        "causal": _tril(),
        "additive": _leaf(K * N, 1, T, S),
    }[name]
    inputs = [query, key, value, bias, *([mask] if name == "additive" else [])]
    for leaf in inputs:
        leaf.data = leaf.data.bfloat16().float()  # so both start from the same numbers
    direction = torch.randn(K * N, H, T, D).bfloat16()
    if p:
        torch.manual_seed(1)
        kept_mask = draw_mask(attention._like(query.bfloat16(), (K * N, H, T, S)), p, K)
        noise = kept_mask.repeat(K, 1, 1, 1) / (1 - p)
    else:
        noise = torch.ones(())
    expected = _reference(query, key, value, bias, mask, 0.3, noise)
    gradients = torch.autograd.grad(expected, inputs, direction.float())

    low_leaves = [leaf.detach().bfloat16().requires_grad_() for leaf in inputs]
    torch.manual_seed(1)
    actual = attention.batched(*low_leaves[:4], low_leaves[4] if name == "additive" else mask, 0.3, p, K)
    actual_gradients = torch.autograd.grad(actual, low_leaves, direction)
    for result, reference_result in zip((actual, *actual_gradients), (expected, *gradients), strict=True):
        assert result.dtype == torch.bfloat16
        _within_rounding(result, reference_result)


def _within_rounding(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """A few roundings of bfloat16 apart, and much closer on average."""
    difference = (actual.float() - expected).detach()
    size = float(expected.detach().abs().max())
    assert float(difference.abs().max()) < 4 * 2**-8 * size
    assert float(difference.norm()) < 2**-7 * float(expected.detach().norm())


@pytest.mark.parametrize("backward_within", [True, False])
def test_under_autocast_dropout_is_computed_in_16_bit(backward_within, batched, computed):
    leaves = [_leaf(N, H, length, D) for length in (T, S, S)]
    bias = _leaf(1, H, T, S)
    direction = torch.randn(N, T, H, D)
    torch.manual_seed(1)
    kept_mask = draw_mask(attention._like(leaves[0].bfloat16(), (N, H, T, S)), 0.4, 1)
    expected = _reference(*leaves, bias, None, 0.3, kept_mask / 0.6).transpose(1, 2)
    gradients = torch.autograd.grad(expected, [*leaves, bias], direction)
    torch.manual_seed(1)
    module = _module(is_causal=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, _ = attention.forward(module, *leaves, None, dropout=0.4, scaling=0.3, position_bias=bias)
        if backward_within:
            actual.backward(direction.bfloat16())
    if not backward_within:
        actual.backward(direction.bfloat16())
    assert actual.dtype == torch.bfloat16
    assert computed == [torch.bfloat16] * 2
    assert len(batched) == 1
    _within_rounding(actual, expected)
    for leaf, gradient in zip((*leaves, bias), gradients, strict=True):
        assert leaf.grad.dtype == torch.float32
        _within_rounding(leaf.grad, gradient)


def test_kept_probabilities_have_the_right_scale_in_bfloat16():
    """Rounding 1 / (1 − p) to bfloat16 would make every value 0.2 % too small."""
    p, length = 0.1, 200
    query, key = (torch.randn(4, 2, length, D, dtype=torch.bfloat16) for _ in range(2))
    value = torch.ones(4, 2, length, 1, dtype=torch.bfloat16)
    probabilities = attention._probabilities(query.flatten(0, 1), key.flatten(0, 1), (4, 2), None, None)
    torch.manual_seed(1)
    mask = draw_mask(attention._like(query, (4, 2, length, length)), p, 2)
    torch.manual_seed(1)
    output = attention.batched(query, key, value, None, None, 1.0, p, 2)
    expected = (probabilities.view(4, 2, length, length).double() * mask.repeat(2, 1, 1, 1)).sum(-1) / (1 - p)
    assert float(output.double().sum() / expected.sum()) == pytest.approx(1, abs=1e-3)
    assert float((output[..., 0].double() / expected).mean()) == pytest.approx(1, abs=1e-3)


# ------------------------------------------------------------- gradcheck


@pytest.mark.parametrize("bank_size", [None, 1, 2])
@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("name", ["none", "bool", "additive", "additive alone"])
def test_gradients_in_float64(name, scale, bank_size):
    """With the noise fixed; no noise at all where the bank has no size."""
    options = {"dtype": torch.float64}
    query, key, value = (_leaf(4, 2, length, 3, **options) for length in (3, 4, 4))
    bias = None if name == "additive alone" else _leaf(1, 2, 3, 4, **options)
    mask = {"none": None, "bool": torch.ones(3, 4, dtype=torch.bool).tril(1)}.get(name)
    if "additive" in name:
        mask = _leaf(4, 1, 1, 4, **options)
    p, noise = 0.0, None
    if bank_size is not None:
        p = 0.3
        noise = draw_mask(attention._like(query, (4, 2, 3, 4)), p, bank_size)
        assert noise.shape == (4 // bank_size, 2, 3, 4)
        assert 0 < (noise == 0).sum() < noise.numel()
    assert torch.autograd.gradcheck(
        lambda *inputs: attention._Attention.apply(*inputs, noise, scale, p), (query, key, value, bias, mask)
    )


@pytest.mark.parametrize("frozen_inputs", [(0,), (1,), (2,), (0, 1), (1, 2)])
def test_gradients_of_some_inputs(frozen_inputs):
    inputs = [_leaf(4, 2, length, 3, dtype=torch.float64) for length in (3, 4, 4)]
    for i in frozen_inputs:
        inputs[i].requires_grad_(False)
    noise = draw_mask(attention._like(inputs[0], (4, 2, 3, 4)), 0.3, 2)
    assert torch.autograd.gradcheck(
        lambda *inputs: attention._Attention.apply(*inputs, None, None, noise, 0.3, 0.3), inputs
    )


def test_inputs_stay_as_they_are():
    query, key, value = (torch.randn(N, H, length, D) for length in (T, S, S))
    bias, mask = torch.randn(1, H, T, S), torch.randn(N, 1, T, S)
    inputs = (query, key, value, bias, mask)
    copies = [x.clone() for x in inputs]
    for scale in (1.0, 0.3):
        leaves = [x.requires_grad_() for x in inputs]
        attention.batched(*leaves, scale, 0.5).sum().backward()
    assert all(torch.equal(x, copy) for x, copy in zip(inputs, copies, strict=True))
