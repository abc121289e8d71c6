"""The models' attention equals torch's own, in values and gradients."""

import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import T5Config, T5Model
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

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
from blipfit.runtime import attention, onednn
from blipfit.runtime.shared_dropout import BANK_SIZE

TINY = 1e-12
"""A dropout probability that drops nothing, to test the other arithmetic of attention with dropout."""

BATCHED = [pytest.param("onednn", marks=needs_onednn), "dropout"]
ROUTES = ["sdpa", *BATCHED]


def _leaves(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Query, key and value, laid out as a model's."""
    return [make_leaf(N, length, H, D, dtype=dtype) for length in (T, S, S)]


def _setting() -> str:
    return torch.backends.mkldnn.matmul.fp32_precision


def _forward(route: str, *inputs: Any, **options: Any) -> torch.Tensor:
    """`attention.forward` by a route → `N × H × T × D`."""
    module = options.pop("module", None) or make_module(is_causal=False)
    output, probabilities = attention.forward(module, *inputs, dropout=TINY if route == "dropout" else 0.0, **options)
    assert probabilities is None
    assert output.is_contiguous()
    return output.transpose(1, 2)


def test_attention_is_registered_with_transformers():
    assert ALL_ATTENTION_FUNCTIONS[attention.NAME] is attention.forward


def _make_t5() -> T5Model:
    config = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 50}
    return T5Model(T5Config(**config, dropout_rate=0.5, decoder_start_token_id=0))


@pytest.mark.parametrize("route", ["sdpa", pytest.param("onednn", marks=needs_onednn)])
def test_a_model_computes_its_attention_with_this_module(route, batched_shapes):
    """Encoder with position biases, causal decoder, cross-attention."""
    model = _make_t5().eval()
    ids, answer = torch.randint(1, 50, (N, S)), torch.randint(1, 50, (N, T))
    inputs = {"input_ids": ids, "attention_mask": padding_mask(S, S - 2)[:, 0, 0].long(), "decoder_input_ids": answer}
    model.set_attn_implementation("eager")
    expected = model(**inputs).last_hidden_state
    attention.enable(model)
    assert model.config._attn_implementation == attention.NAME
    with context(route):
        actual = model(**inputs).last_hidden_state
    assert_close(actual, expected)
    assert len(batched_shapes) == (6 if route == "onednn" else 0)


def test_a_model_in_training_samples_its_noise_in_this_module(batched_shapes):
    model = _make_t5().train()
    attention.enable(model)
    ids = torch.randint(1, 50, (N, S))
    model(input_ids=ids, decoder_input_ids=ids).last_hidden_state.sum().backward()
    assert len(batched_shapes) == 6
    biases = [parameter for name, parameter in model.named_parameters() if "relative_attention_bias" in name]
    assert len(biases) == 2
    assert all(bias.grad.isfinite().all() and bias.grad.abs().sum() > 0 for bias in biases)


MASKS = ["none", "causal", "causal module", "rows", "positions", "positions alone", "additive", "additive per row"]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("scale", [None, 0.3, 1.0])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_values_and_gradients_equal_torchs(name, has_bias, scale, route, batched_shapes):
    leaves = _leaves()
    mask = {
        "none": None,
        "causal": attention.CAUSAL,
        "causal module": None,
        "rows": padding_mask(S, S - 2),
        "positions": torch.ones(T, S, dtype=torch.bool).tril(2).expand(N, 1, T, S),
        "positions alone": torch.ones(T, S, dtype=torch.bool).tril(2),
        "additive": make_leaf(1, H, T, S),
        "additive per row": make_leaf(N, H, T, S),
    }[name]
    bias = make_leaf(1, H, T, S) if has_bias else None
    inputs = [*leaves, *(x for x in (mask, bias) if x is not None and x.requires_grad)]
    module = make_module(is_causal=name == "causal module")

    visible_keys = causal_mask() if "causal" in name else mask
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

    with context(route):
        actual = _forward(route, query, key, value, mask, scaling=scale, position_bias=bias, module=module)
        actual_gradients = torch.autograd.grad(actual, inputs, direction)
    assert actual.dtype == expected.dtype
    for result, reference_result in zip((actual, *actual_gradients), (expected, *gradients), strict=True):
        assert_close(result, reference_result)
    assert len(batched_shapes) == (0 if route == "sdpa" else 1)


@pytest.mark.parametrize("route", ROUTES)
def test_causality_follows_transformers_rules(route):
    """The module's attribute unless an argument overrides it; never with a mask or a single query."""
    query, key, value = (x.transpose(1, 2) for x in _leaves())
    causal_output = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    full_output = F.scaled_dot_product_attention(query, key, value)
    first_row = F.scaled_dot_product_attention(query[:, :, :1], key, value)
    open_mask = torch.ones(1, 1, T, S, dtype=torch.bool)
    with context(route):
        assert_close(_forward(route, query, key, value, None, module=make_module()), causal_output)
        assert_close(_forward(route, query, key, value, None, is_causal=True), causal_output)
        assert_close(_forward(route, query, key, value, attention.CAUSAL), causal_output)
        assert_close(_forward(route, query, key, value, attention.CAUSAL, is_causal=False), causal_output)
        assert_close(_forward(route, query, key, value, None, is_causal=False, module=make_module()), full_output)
        assert_close(_forward(route, query, key, value, open_mask, is_causal=True), full_output)
        assert_close(_forward(route, query[:, :, :1], key, value, attention.CAUSAL), first_row)


@pytest.mark.parametrize("mask", ["none", "bool", "additive"])
def test_attention_that_drops_nothing_equals_torchs(mask):
    q, k, v = (torch.randn(6, 2, 5, 4, dtype=torch.float64) for _ in range(3))
    keep = torch.rand(6, 1, 5, 5) > 0.3
    keep[..., 0] = True
    attention_mask = {"none": None, "bool": keep, "additive": torch.where(keep, 0.0, -1e9).double()}[mask]
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask)
    module = make_module(is_causal=False, **{BANK_SIZE: K})
    assert torch.equal(_forward("sdpa", q, k, v, attention_mask, module=module), expected)
    torch.testing.assert_close(_forward("dropout", q, k, v, attention_mask, module=module), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("p", [TINY, 0.5])
def test_a_fully_masked_row_is_finite(p, dtype):
    query, key, value = (
        make_leaf(N, H, T, D, dtype=dtype),
        make_leaf(N, H, S, D, dtype=dtype),
        make_leaf(N, H, S, D, dtype=dtype),
    )
    bias = make_leaf(1, H, T, S, dtype=dtype)
    mask = torch.zeros(N, 1, T, S, dtype=torch.bool)
    output, _ = attention.forward(make_module(), query, key, value, mask, dropout=p, position_bias=bias)
    output.sum().backward()
    assert output.isfinite().all()
    assert all(leaf.grad.isfinite().all() for leaf in (query, key, value, bias))


@needs_onednn
def test_a_fully_masked_row_is_finite_with_onednn(batched_shapes):
    query, key, value = make_leaf(N, H, T, D), make_leaf(N, H, S, D), make_leaf(N, H, S, D)
    with onednn.onednn_products():
        output = _forward("onednn", query, key, value, torch.zeros(N, 1, T, S, dtype=torch.bool))
        output.sum().backward()
    assert output.isfinite().all()
    assert all(leaf.grad.isfinite().all() for leaf in (query, key, value))
    assert len(batched_shapes) == 1


@pytest.mark.parametrize("route", BATCHED)
def test_a_fully_masked_row_does_not_change_other_rows(route):
    query, key, value = (x.transpose(1, 2) for x in _leaves())
    mask = padding_mask(S - 1, 0)
    with context(route):
        actual = _forward(route, query, key, value, mask)
    assert_close(actual[:1], F.scaled_dot_product_attention(query, key, value, attn_mask=mask)[:1])


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


@needs_onednn
@pytest.mark.parametrize("case", sorted(_ordinary_cases()))
def test_attention_that_is_not_batched_is_transformers_own(case, batched_shapes, monkeypatch):
    (query, key, value, mask), attributes = _ordinary_cases()[case]
    expected = F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=case == "grouped")
    settings, torch_attention = [], F.scaled_dot_product_attention

    def record(*inputs: Any, **options: Any) -> torch.Tensor:
        settings.append(_setting())
        return torch_attention(*inputs, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    with onednn.onednn_products():
        actual = _forward("sdpa", query, key, value, mask, module=make_module(is_causal=False, **attributes))
        torch.testing.assert_close(actual, expected)
        assert _setting() == "bf16"
    assert batched_shapes == []
    assert settings == ["none"], "oneDNN is slow at its products"


@needs_onednn
def test_empty_inputs_are_not_batched():
    q, k = torch.randn(N, H, T, D), torch.randn(N, H, S, D)
    with onednn.onednn_products():
        assert attention._prefers_batched_products(q, k, k, None)
        assert not attention._prefers_batched_products(q[:0], k[:0], k[:0], None)
        assert not attention._prefers_batched_products(q, k[:, :, :0], k[:, :, :0], None)


@needs_onednn
def test_masks_of_other_types_are_not_batched():
    q, k = torch.randn(N, H, T, D), torch.randn(N, H, S, D)
    with onednn.onednn_products():
        for dtype in (torch.float32, torch.bool):
            assert attention._prefers_batched_products(q, k, k, torch.ones(N, 1, 1, S, dtype=dtype))
        for dtype in (torch.float64, torch.bfloat16, torch.long):
            assert not attention._prefers_batched_products(q, k, k, torch.ones(N, 1, 1, S, dtype=dtype))


@needs_onednn
@pytest.mark.parametrize(("length", "is_batched"), [(256, True), (257, False)])
def test_attention_is_batched_up_to_a_length(length, is_batched, batched_shapes):
    x = torch.randn(1, 1, length, D)
    with onednn.onednn_products():
        _forward("onednn", x, x, x, None)
    assert len(batched_shapes) == is_batched


def test_attention_outside_onednn_products_is_transformers_own(batched_shapes):
    q = torch.randn(N, H, T, D)
    assert torch.equal(_forward("sdpa", q, q, q, None), F.scaled_dot_product_attention(q, q, q))
    assert batched_shapes == []


@needs_onednn
def test_attention_under_autocast_is_transformers_own(batched_shapes):
    q = make_leaf(N, H, T, D)
    with torch.autocast("cpu", dtype=torch.bfloat16), onednn.onednn_products():
        _forward("onednn", q, q, q, None).sum().backward()
    assert batched_shapes == []
    assert q.grad is not None


@needs_onednn
def test_attention_in_another_thread_is_transformers_own(batched_shapes):
    q, settings = torch.randn(N, H, T, D), []

    def compute() -> None:
        _forward("onednn", q, q, q, None)
        settings.append(_setting())

    with onednn.onednn_products():
        thread = threading.Thread(target=compute)
        thread.start()
        thread.join()
        assert (batched_shapes, settings) == ([], ["bf16"]), "the setting is global and does not change"
        _forward("onednn", q, q, q, None)
        assert batched_shapes == [q.shape]
    compute()
    assert settings == ["bf16", "none"]
    assert batched_shapes == [q.shape]


@needs_onednn
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_dropout_inside_onednn_products(p, batched_shapes, monkeypatch):
    """With and without dropout, attention is computed as batched products with oneDNN."""
    q, settings, bmm = torch.randn(N, H, T, D), [], torch.bmm
    torch_function = F.scaled_dot_product_attention

    def record(*inputs: Any) -> torch.Tensor:
        settings.append(_setting())
        return bmm(*inputs)

    monkeypatch.setattr(torch, "bmm", record)
    with onednn.onednn_products():
        attention.forward(make_module(**{BANK_SIZE: 2}), q, q, q, None, dropout=p)
    assert batched_shapes == [q.shape]
    assert settings == ["bf16", "bf16"]
    assert F.scaled_dot_product_attention is torch_function
    assert _setting() == "none"
