"""Compiled or checkpointed layers compute the same as ordinary ones, and their forward pass is restored."""

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import reference
from blipfit.runtime import layer_execution
from blipfit.runtime.layer_execution import LayerExecution
from blipfit.runtime.shared_dropout import SharedDropout

WIDTH = 8


class Layer(nn.Module):
    """A small layer with noise, a positional input and an option."""

    def __init__(self, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.wide, self.narrow = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.dropout = SharedDropout(0.5, 1)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return x + scale * self.dropout(self.narrow(torch.tanh(self.wide(x))))


class CallCounter:
    """A replacement of `torch.utils.checkpoint.checkpoint` that counts its calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.count, self.original = 0, layer_execution.checkpoint
        monkeypatch.setattr(layer_execution, "checkpoint", self)

    def __call__(self, *arguments, **options):
        self.count += 1
        return self.original(*arguments, **options)


@pytest.fixture
def checkpoint_calls(monkeypatch) -> CallCounter:
    return CallCounter(monkeypatch)


def _inputs(rows: int = 3) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(rows)).requires_grad_()


def _run(stack: list[Layer], x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients of a stack of layers, with the same noise at every call."""
    torch.manual_seed(3)
    y = x
    for layer in stack:
        y = layer(y, scale=0.7)
    parameters = [parameter for layer in stack for parameter in layer.parameters()]
    return y.detach(), list(torch.autograd.grad(y.square().sum(), [x, *parameters]))


def _is_plain(stack: list[Layer]) -> bool:
    """Whether the layers have the forward pass of their class."""
    return not any("forward" in layer.__dict__ for layer in stack)


@pytest.mark.parametrize("training", [True, False])
def test_a_checkpointed_layer_computes_the_same_to_the_bit(checkpoint_calls, training):
    stack, x = [Layer(0).train(training), Layer(1).train(training)], _inputs()
    expected, expected_gradients = _run(stack, x)
    execution = LayerExecution(checkpointed=stack)
    execution.install()
    output, gradients = _run(stack, x)
    execution.remove()
    assert checkpoint_calls.count == 2
    assert torch.equal(output, expected)
    assert all(map(torch.equal, gradients, expected_gradients))


def test_the_noise_after_a_checkpointed_layer_is_the_same():
    """Computing a layer again in the backward pass does not move the generator."""
    stack, x = [Layer()], _inputs()

    def next_noise() -> Tensor:
        _run(stack, x)
        return torch.rand(4)

    expected = next_noise()
    execution = LayerExecution(checkpointed=stack)
    execution.install()
    assert torch.equal(next_noise(), expected)
    execution.remove()


def test_a_checkpointed_layer_saves_only_its_input():
    stack, x = [Layer()], _inputs()

    def saved_shapes() -> list[tuple[int, ...]]:
        shapes = []

        def pack(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, nn.Parameter):
                shapes.append(tuple(tensor.shape))
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            stack[0](x)
        return shapes

    assert (3, 4 * WIDTH) in saved_shapes()
    execution = LayerExecution(checkpointed=stack)
    execution.install()
    # Torch also saves an empty tensor for its own use.
    assert [shape for shape in saved_shapes() if shape != (0,)] == [(3, WIDTH)]
    execution.remove()


def test_without_gradients_nothing_is_checkpointed(checkpoint_calls):
    layer, x = Layer().eval(), _inputs()
    execution = LayerExecution(checkpointed=[layer])
    execution.install()
    with torch.no_grad():
        output = layer(x, scale=0.3)
    execution.remove()
    assert checkpoint_calls.count == 0
    assert torch.equal(output, layer(x, scale=0.3))


def test_removal_restores_the_forward_pass_of_the_layers(fresh_compiler):
    stack = [Layer(0), Layer(1)]
    execution = LayerExecution(compiled=stack[:1], checkpointed=stack)
    execution.install()
    assert all("forward" in layer.__dict__ for layer in stack)
    execution.remove()
    assert _is_plain(stack)
    assert all(layer.forward.__func__ is Layer.forward for layer in stack)
    execution.remove()
    assert _is_plain(stack)


def test_other_layers_of_the_class_do_not_change(checkpoint_calls):
    layer, other_layer = Layer(0), Layer(1)
    execution = LayerExecution(checkpointed=[layer])
    execution.install()
    assert _is_plain([other_layer])
    other_layer(_inputs())
    assert checkpoint_calls.count == 0
    execution.remove()


def test_installing_a_second_time_does_nothing(checkpoint_calls):
    stack, x = [Layer()], _inputs()
    expected, expected_gradients = _run(stack, x)
    execution = LayerExecution(checkpointed=stack)
    execution.install()
    execution.install()
    output, gradients = _run(stack, x)
    assert checkpoint_calls.count == 1
    assert torch.equal(output, expected)
    assert all(map(torch.equal, gradients, expected_gradients))
    execution.remove()
    assert _is_plain(stack)


def test_without_layers_nothing_happens():
    execution = LayerExecution()
    execution.install()
    execution.remove()


def test_hooks_of_a_layer_are_still_called():
    layer, x, calls = Layer().eval(), _inputs(), []
    layer.register_forward_hook(lambda *_: calls.append("hook"))
    execution = LayerExecution(checkpointed=[layer])
    execution.install()
    layer(x).sum().backward()
    execution.remove()
    assert calls == ["hook"]  # not again in the backward pass


def test_evaluation_is_the_same_with_checkpointed_layers(backbone, checkpoint_calls):
    """Scores and generated tokens of a whole model; nothing is computed twice."""
    encoded = reference.ask(backbone, 3)
    features = backbone.see(reference.pictures(backbone, 3))
    candidates, prompts = backbone.text.candidates(encoded), backbone.text.prompts(encoded)

    def evaluate() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            scores = backbone.score_candidates(backbone.query(features, candidates), candidates).sums_KM
            return scores, backbone.generate(backbone.query(features, prompts), prompts, max_new_tokens=4)

    expected = evaluate()
    execution = LayerExecution(checkpointed=[*backbone.layers("query"), *backbone.layers("answer")])
    execution.install()
    results = evaluate()
    execution.remove()
    assert all(map(torch.equal, results, expected))
    assert checkpoint_calls.count == 0


def test_a_compiled_layer_computes_the_same(fresh_compiler):
    """Layers of a class share the compiled code: the second layer compiles nothing."""
    stack, x = [Layer(0).eval(), Layer(1).eval()], _inputs()
    expected = [_run([layer], x) for layer in stack]
    execution = LayerExecution(compiled=stack)
    execution.install()
    results = [_run(stack[:1], x)]
    with torch._dynamo.config.patch(error_on_recompile=True):
        results.append(_run(stack[1:], x))
    execution.remove()
    torch.testing.assert_close(results, expected)
    assert not torch.allclose(results[0][0], results[1][0])


@pytest.mark.slow
def test_a_compiled_layer_takes_any_number_of_rows(fresh_compiler):
    """The second number of rows is compiled again; then any number runs."""
    stack, sizes = [Layer(0).eval(), Layer(1).eval()], (3, 5, 9, 4)
    expected = [_run(stack, _inputs(rows)) for rows in sizes]
    execution = LayerExecution(compiled=stack)
    execution.install()
    results = [_run(stack, _inputs(rows)) for rows in sizes[:2]]
    with torch._dynamo.config.patch(error_on_recompile=True):
        results += [_run(stack, _inputs(rows)) for rows in sizes[2:]]
    execution.remove()
    torch.testing.assert_close(results, expected)


@pytest.mark.slow
def test_a_compiled_layer_shares_its_noise_in_a_bank(fresh_compiler):
    """Two experiments in a bank have the noise of a single run, also when the backward pass computes it again."""
    layer, x = Layer().train(), _inputs(4)

    def outputs(size: int, execution: LayerExecution) -> tuple[Tensor, Tensor]:
        layer.dropout.bank_size = size
        rows = x.detach().repeat(size, 1).requires_grad_()
        execution.install()
        torch.manual_seed(5)
        y = layer(rows)
        (gradient,) = torch.autograd.grad(y.square().sum(), rows)
        execution.remove()
        return y.detach(), gradient

    compiled = LayerExecution(compiled=[layer])
    single_output, gradient = outputs(1, compiled)
    assert not torch.allclose(single_output, layer.eval()(x))
    layer.train()
    bank_output, bank_gradient = outputs(2, compiled)
    for part, part_gradient in zip(bank_output.chunk(2), bank_gradient.chunk(2), strict=True):
        torch.testing.assert_close(part, single_output)
        torch.testing.assert_close(part_gradient, gradient)
    checkpointed_outputs = outputs(2, LayerExecution(compiled=[layer], checkpointed=[layer]))
    torch.testing.assert_close(checkpointed_outputs, (bank_output, bank_gradient))
