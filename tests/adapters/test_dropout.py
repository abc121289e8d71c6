"""Dropout inside a bank: everybody the same mask, the right share dropped, torch's own functions back afterwards."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from blipfit.adapters.dropout import shared_dropout


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def test_all_experiments_share_the_mask_and_one_alone_has_it_too():
    x = torch.rand(4, 50, 8) + 1
    layer = nn.Dropout(0.3)
    torch.manual_seed(1)
    with shared_dropout(1):
        alone = layer(x)
    torch.manual_seed(1)
    with shared_dropout(3):
        together = layer(x.repeat(3, 1, 1))
    assert all(torch.equal(part, alone) for part in together.chunk(3))
    assert (alone == 0).float().mean() == pytest.approx(0.3, abs=0.05)
    kept = alone != 0
    torch.testing.assert_close(alone[kept], x[kept] / 0.7)


def test_different_questions_have_different_masks():
    with shared_dropout(2):
        y = F.dropout(torch.ones(4, 100), 0.5, True)
    assert not torch.equal(y[0], y[1])
    assert torch.equal(y[:2], y[2:])


@pytest.mark.parametrize("mask", ["none", "bool", "additive"])
def test_attention_without_drops_is_torchs(mask):
    q, k, v = (torch.randn(6, 2, 5, 4, dtype=torch.float64) for _ in range(3))
    keep = torch.rand(6, 1, 5, 5) > 0.3
    keep[..., 0] = True
    given = {"none": None, "bool": keep, "additive": torch.where(keep, 0.0, -1e9).double()}[mask]
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=given)
    with shared_dropout(3):
        assert torch.equal(F.scaled_dot_product_attention(q, k, v, attn_mask=given), expected)
        # So little is dropped that the two agree: the arithmetic beside the dropout is the same.
        torch.manual_seed(0)
        dropped = F.scaled_dot_product_attention(q, k, v, attn_mask=given, dropout_p=1e-12)
    torch.testing.assert_close(dropped, expected)


def test_attention_drops_weights_the_same_for_all():
    q, k, v = (torch.randn(2, 2, 30, 4).repeat(3, 1, 1, 1) for _ in range(3))
    with shared_dropout(3):
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    assert all(torch.equal(part, y[:2]) for part in y.chunk(3))
    assert (y - F.scaled_dot_product_attention(q, k, v)).abs().mean() > 0.05


def test_causal_attention_with_dropout_is_refused():
    q = torch.randn(2, 2, 3, 4)
    with shared_dropout(1), pytest.raises(NotImplementedError, match="causal"):
        F.scaled_dot_product_attention(q, q, q, dropout_p=0.5, is_causal=True)


def test_nothing_is_dropped_in_eval_mode():
    x = torch.rand(4, 5)
    with shared_dropout(2):
        assert nn.Dropout(0.5).eval()(x) is x
        assert F.dropout(x, 0.0, True) is x


def test_torchs_functions_come_back_even_after_an_error():
    before = F.dropout, F.scaled_dot_product_attention
    with pytest.raises(RuntimeError), shared_dropout(2):
        F.dropout(torch.ones(2, 3), 2.0, True)  # no probability
    assert (F.dropout, F.scaled_dot_product_attention) == before
