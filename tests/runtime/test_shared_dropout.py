"""Dropout in a bank: all experiments share a mask, the scale is exact, and the modules are restored afterwards."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from blipfit.runtime import shared_dropout
from blipfit.runtime.shared_dropout import BANK_SIZE, SharedDropout, apply_mask, sample_mask

SIXTEEN_BIT = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


class Attention(nn.Module):
    """A module with a `scaling`, as those that sample noise in an attention function."""

    def __init__(self):
        super().__init__()
        self.scaling = 0.5
        self.dropout = nn.Dropout(0.2)


class Model(nn.Module):
    """A model with dropout at two depths, in an attribute and in a list."""

    def __init__(self):
        super().__init__()
        self.attention = Attention()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3)), nn.Identity()])
        self.dropout = nn.Dropout(0.4)

    def forward(self, x):
        return self.dropout(self.layers[0](self.attention.dropout(x)))


def test_all_experiments_share_the_mask_of_a_single_experiment():
    x = torch.rand(4, 50, 8) + 1
    model = nn.Sequential(nn.Dropout(0.3))
    replaced_modules = shared_dropout.share_masks(model, 1)
    torch.manual_seed(1)
    single_output = model(x)
    shared_dropout.restore_modules(model, replaced_modules)
    shared_dropout.share_masks(model, 3)
    torch.manual_seed(1)
    bank_output = model(x.repeat(3, 1, 1))
    assert all(torch.equal(part, single_output) for part in bank_output.chunk(3))
    assert (single_output == 0).float().mean() == pytest.approx(0.3, abs=0.05)
    is_kept = single_output != 0
    torch.testing.assert_close(single_output[is_kept], x[is_kept] / 0.7)


@SIXTEEN_BIT
def test_all_experiments_share_the_mask_in_16_bit(dtype):
    x = (torch.rand(4, 50, 8) + 1).to(dtype)
    torch.manual_seed(1)
    single_output = SharedDropout(0.3, 1)(x)
    torch.manual_seed(1)
    bank_output = SharedDropout(0.3, 3)(x.repeat(3, 1, 1))
    assert single_output.dtype == bank_output.dtype == dtype
    assert all(torch.equal(part, single_output) for part in bank_output.chunk(3))
    assert (single_output == 0).float().mean() == pytest.approx(0.3, abs=0.05)


def test_a_model_in_a_bank_equals_single_models():
    model, x = Model(), torch.randn(4, 8)
    x_K = [x, x + 1, 2 * x]
    results = []
    for size, rows in [(3, torch.cat(x_K)), *((1, part) for part in x_K)]:
        replaced_modules = shared_dropout.share_masks(model, size)
        torch.manual_seed(1)
        results.append(model(rows))
        shared_dropout.restore_modules(model, replaced_modules)
    bank_output, *single_outputs = results
    torch.testing.assert_close(bank_output, torch.cat(single_outputs))


def test_different_questions_have_different_masks():
    y = SharedDropout(0.5, 2)(torch.ones(4, 100))
    assert not torch.equal(y[0], y[1])
    assert torch.equal(y[:2], y[2:])


def test_every_call_samples_a_new_mask():
    layer, x = SharedDropout(0.5, 2), torch.ones(4, 100)
    assert not torch.equal(layer(x), layer(x))


def test_the_mask_is_sampled_for_the_rows_of_a_single_experiment():
    x = torch.randn(6, 5)
    torch.manual_seed(1)
    mask = sample_mask(x, 0.5, 2)
    torch.manual_seed(1)
    assert torch.equal(mask, torch.empty(3, 5).bernoulli_(0.5) * 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_have_the_noise_of_their_rows_in_the_whole_batch(processes, dtype):
    x = torch.ones(5, 4, 8, dtype=dtype)
    torch.manual_seed(1)
    whole = SharedDropout(0.3, 1)(x)
    for index in range(processes):
        rows = slice(index, None, processes)
        torch.manual_seed(1)
        with shared_dropout.batch_rows(5, rows):
            part = SharedDropout(0.3, 2)(x[rows].repeat(2, 1, 1))
        assert all(torch.equal(of_experiment, whole[rows]) for of_experiment in part.chunk(2))


def test_the_noise_of_other_rows_is_freed():
    with shared_dropout.batch_rows(6, slice(0, None, 3)):
        masks = [sample_mask(torch.ones(2, 8, dtype=dtype), 0.5, 1) for dtype in (torch.float32, torch.float16)]
    assert [mask.shape for mask in masks] == [(2, 8)] * 2
    assert [mask.untyped_storage().nbytes() for mask in masks] == [2 * 8 * 4, 2 * 8]


def test_a_process_with_all_rows_samples_as_before():
    torch.manual_seed(1)
    mask = sample_mask(torch.ones(6, 8), 0.5, 1)
    torch.manual_seed(1)
    with shared_dropout.batch_rows(6, slice(0, None, 1)):
        assert torch.equal(sample_mask(torch.ones(6, 8), 0.5, 1), mask)


@pytest.mark.slow
def test_compiled_code_has_the_noise_of_its_rows_too(fresh_compiler):
    x = torch.ones(5, 4, 8)
    compiled = torch.compile(SharedDropout(0.3, 1))
    torch.manual_seed(1)
    whole = compiled(x)
    for rows in (slice(0, None, 2), slice(1, None, 2)):
        torch.manual_seed(1)
        with shared_dropout.batch_rows(5, rows):
            assert torch.equal(compiled(x[rows]), whole[rows])


def test_rows_in_any_memory_order():
    x = torch.randn(7, 6, 5).transpose(0, 1)
    layer = SharedDropout(0.5, 3)
    torch.manual_seed(1)
    expected = layer(x.contiguous())
    torch.manual_seed(1)
    assert torch.equal(layer(x), expected)


def test_remaining_values_are_scaled_exactly():
    x = torch.randn(6, 1000)
    for p in (0.1, 0.3, 0.5):
        y = SharedDropout(p, 3)(x)
        is_kept = y != 0
        assert torch.equal(y[is_kept], x[is_kept] * torch.ones(()).div(1 - p))
        torch.testing.assert_close(y[is_kept].double(), x[is_kept].double() / (1 - p), atol=0, rtol=2**-23)


@SIXTEEN_BIT
@pytest.mark.parametrize("p", [0.1, 0.3])
def test_remaining_16_bit_values_are_rounded_only_at_the_end(dtype, p):
    x = (torch.rand(6, 50_000) + 1).to(dtype)
    y = SharedDropout(p, 3)(x)
    is_kept = y != 0
    expected = x[is_kept].double() / (1 - p)
    torch.testing.assert_close(y[is_kept].double(), expected, atol=0, rtol=torch.finfo(dtype).eps / 2)
    assert float((y[is_kept].double() / expected).mean()) == pytest.approx(1, abs=1e-3)
    assert float(y[is_kept].double().sum() / expected.sum()) == pytest.approx(1, abs=1e-3)


def test_the_comparison_detects_a_scale_rounded_to_bfloat16():
    x = (torch.rand(50_000) + 1).bfloat16()
    y = x * torch.ones((), dtype=torch.bfloat16).div(0.9)
    assert abs(float((y.double() / (x.double() / 0.9)).mean()) - 1) > 1e-3


@SIXTEEN_BIT
def test_the_gradient_has_the_same_scale(dtype):
    x = (torch.rand(6, 50_000) + 1).to(dtype).requires_grad_()
    y = SharedDropout(0.1, 3)(x)
    y.sum().backward()
    is_kept = y != 0
    assert torch.equal(x.grad != 0, is_kept)
    torch.testing.assert_close(
        x.grad[is_kept].double(), torch.full_like(x.grad[is_kept], 1 / 0.9, dtype=torch.float64), atol=0, rtol=2**-8
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_mean_does_not_change(dtype):
    y = SharedDropout(0.1, 2)(torch.ones(400, 5_000, dtype=dtype))
    assert float(y.double().mean()) == pytest.approx(1, abs=3e-3)


def test_gradients_of_a_mask():
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    mask = sample_mask(x, 0.5, 3)
    assert torch.autograd.gradcheck(lambda x: apply_mask(x, mask, 0.5), [x])


def test_in_a_compiled_graph_the_scale_is_the_same(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    x = torch.rand(6, 1000) + 1
    y = SharedDropout(0.3, 3)(x)
    is_kept = y != 0
    assert all(torch.equal(part, is_kept[:2]) for part in is_kept.chunk(3))
    assert (~is_kept).float().mean() == pytest.approx(0.3, abs=0.05)
    torch.testing.assert_close(y[is_kept], x[is_kept] / 0.7)


def test_nothing_is_dropped_in_eval_mode():
    x = torch.rand(4, 5)
    assert SharedDropout(0.5, 2).eval()(x) is x
    assert SharedDropout(0.0, 2)(x) is x
    model = Model().eval()
    expected = model(x := torch.rand(4, 8))
    shared_dropout.share_masks(model, 2)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("training", [True, False])
def test_every_dropout_is_replaced(training):
    model = Model().train(training)
    replaced_modules = shared_dropout.share_masks(model, 3)
    assert not any(type(module) is nn.Dropout for module in model.modules())
    shared_modules = {name: module for name, module in model.named_modules() if isinstance(module, SharedDropout)}
    assert set(replaced_modules) == {"attention.dropout", "layers.0.1", "dropout"}
    assert {name: module.p for name, module in shared_modules.items()} == {
        "attention.dropout": 0.2,
        "layers.0.1": 0.3,
        "dropout": 0.4,
    }
    assert all(module.bank_size == 3 and module.training is training for module in shared_modules.values())


@pytest.mark.parametrize("training", [True, False])
def test_the_original_modules_are_restored(training):
    model = Model()
    original = dict(model.named_modules())
    replaced_modules = shared_dropout.share_masks(model, 3)
    model.train(training)
    shared_dropout.restore_modules(model, replaced_modules)
    restored = dict(model.named_modules())
    assert list(restored) == list(original)
    assert all(restored[name] is module for name, module in original.items())
    assert all(module.training is training for module in model.modules())


def test_sharing_again_uses_the_new_size():
    model = Model()
    for size in (3, 2):
        replaced_modules = shared_dropout.share_masks(model, size)
        assert (model.dropout.bank_size, getattr(model.attention, BANK_SIZE)) == (size, size)
        shared_dropout.restore_modules(model, replaced_modules)


def test_modules_that_sample_noise_have_the_size_of_the_bank_until_the_restore():
    model = Model()
    replaced_modules = shared_dropout.share_masks(model, 3)
    assert getattr(model.attention, BANK_SIZE) == 3
    assert not any(hasattr(module, BANK_SIZE) for module in (model, *model.layers, model.layers[0][0]))
    shared_dropout.restore_modules(model, replaced_modules)
    assert not any(hasattr(module, BANK_SIZE) for module in model.modules())
    assert model.attention.scaling == 0.5


def test_torchs_functions_are_not_replaced():
    original = F.dropout, F.scaled_dot_product_attention
    model = Model()
    replaced_modules = shared_dropout.share_masks(model, 2)
    assert (F.dropout, F.scaled_dot_product_attention) == original
    with pytest.raises(RuntimeError):
        SharedDropout(2.0, 1)(torch.ones(2, 3))  # no probability
    shared_dropout.restore_modules(model, replaced_modules)
    assert (F.dropout, F.scaled_dot_product_attention) == original
