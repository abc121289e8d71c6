"""Importance of each part of a Q-Former: heads, feed-forward units, hidden channels, layers, query tokens.

Three methods; for each, a higher value means a more important part:

- `taylor`: the expected squared change of a question's loss when the part is replaced by its mean over all questions,
  to first order: E[(Σ (mean − a) · ∂loss/∂a)²]. Molchanov et al. (2019) replace it by zero; here it is the mean,
  because the repair that follows can put a constant into a bias at no cost.
- `activation`: the part's standard deviation times the norm of the weights that read it.
- `magnitude`: norms of the weights that write and read it; needs no questions.

`B` questions, `S` tokens, `T` text tokens, `Q` query tokens, `D` width. A site is a place inside the Q-Former where a
tensor `B × S × D` is recorded.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from blipfit.compression.calibration import Calibration
from blipfit.model.backbone import Backbone

Method = Literal["taylor", "activation", "magnitude"]
METHODS: tuple[Method, ...] = ("taylor", "activation", "magnitude")

_QUERY_SITES = re.compile("crossing|crossattention|output_query|visual")
"""Names of sites whose tensors have rows for query tokens only."""
_TEXT_SITES = re.compile(r"encoder\.layer\.\d+\.output\.")
"""Names of sites whose tensors have rows for text tokens only."""


@dataclass(frozen=True, slots=True)
class Scores:
    """Importance of every part of a Q-Former."""

    channels: Tensor
    """Hidden channels, `D`."""
    queries: Tensor
    """Query tokens, `Q`."""
    layers: list[float]
    """One value per layer."""
    cross_attentions: list[float]
    """One value per layer: its cross-attention; 0 where it has none."""
    inner: Mapping[str, Tensor]
    """Name of an output layer (`…output.dense`) → one value per input of it: a channel of an attention's heads, or a
    unit of a feed-forward branch."""
    heads: Mapping[str, Tensor]
    """Name of an attention's output layer → one value per head."""


def measure(backbone: Backbone, method: Method, questions: Calibration | None) -> Scores:
    """Measure the importance of the parts of a backbone's Q-Former; only `magnitude` works without questions."""
    if method == "magnitude":
        return _measure_magnitude(backbone.hf)
    assert questions is not None
    with _SiteRecorder(backbone.hf, gradients=method == "taylor") as recorder:
        for features, batch in questions:
            if method == "taylor":
                backbone.losses(backbone.query(features, batch, all_rows=True), batch).sum().backward()
            else:
                with torch.no_grad():
                    backbone.query(features, batch, all_rows=True)
            recorder.accumulate(_token_mask(batch.qformer_mask_BT, backbone.hf.config.num_query_tokens))
    return (_measure_taylor if method == "taylor" else _measure_activation)(backbone.hf, recorder.statistics)


def random_scores(hf: Any, seed: int = 0) -> Scores:
    """Return random scores: the baseline that a method must beat."""
    generator = torch.Generator().manual_seed(seed)
    return _fill_scores(hf, lambda count: torch.rand(count, generator=generator))


def slicing_scores(hf: Any) -> Scores:
    """Return scores that keep the first parts of each kind: plain slicing of the tensors."""
    return _fill_scores(hf, lambda count: torch.arange(count, 0, -1, dtype=torch.float32))


def find_attention_outputs(hf: Any) -> dict[str, nn.Linear]:
    """Return the output layers of all attentions by name within the Q-Former; their inputs are the heads' channels."""
    return _find_linears(hf, "attention.output.dense")


def find_feed_forward_outputs(hf: Any) -> dict[str, nn.Linear]:
    """Return the second layers of all feed-forward branches by name within the Q-Former; their inputs are the units."""
    return {
        name: linear
        for suffix in ("output.dense", "output_query.dense")
        for name, linear in _find_linears(hf, suffix).items()
        if "attention" not in name
    }


def find_norm_readers(hf: Any) -> dict[str, list[nn.Linear]]:
    """Return every layer norm on the residual path by name, with the linear layers that read its output."""
    layers = list(hf.qformer.encoder.layer)
    self_attentions = [
        [getattr(layer.attention.attention, part) for part in ("query", "key", "value")] for layer in layers
    ]
    next_readers = [*self_attentions[1:], [hf.language_projection]]
    readers = {"embeddings.layernorm": self_attentions[0]}
    for index, layer in enumerate(layers):
        name = f"encoder.layer.{index}."
        text, query = [layer.intermediate.dense], [layer.intermediate_query.dense]
        if layer.has_cross_attention:
            readers[f"{name}attention.output.LayerNorm"] = [*text, layer.crossattention.attention.query]
            readers[f"{name}crossattention.output.LayerNorm"] = query
        else:
            readers[f"{name}attention.output.LayerNorm"] = text + query
        is_last = index == len(layers) - 1
        readers[f"{name}output.LayerNorm"] = [] if is_last else next_readers[index]
        readers[f"{name}output_query.LayerNorm"] = next_readers[index]
    return readers


def _find_linears(hf: Any, suffix: str) -> dict[str, nn.Linear]:
    return {
        name: module
        for name, module in hf.qformer.named_modules()
        if name.endswith(suffix) and isinstance(module, nn.Linear)
    }


@dataclass(slots=True)
class _SiteStatistics:
    """Statistics of one site over all questions; sums run over the tokens of a question."""

    products: list[Tensor]
    """Σ_tokens a · g, one tensor `B × D` per batch, with activation a and gradient g."""
    gradients: list[Tensor]
    """Σ_tokens g, one tensor `B × D` per batch."""
    count: int = 0
    total: Tensor | float = 0.0
    squares: Tensor | float = 0.0

    @property
    def mean(self) -> Tensor:
        return torch.as_tensor(self.total) / max(self.count, 1)

    @property
    def deviation(self) -> Tensor:
        """Standard deviation of each channel, `D`."""
        return (torch.as_tensor(self.squares) / max(self.count, 1) - self.mean**2).clamp_min(0).sqrt()

    def effects(self) -> Tensor:
        """Return the change of each question's loss when a channel is replaced by its mean, `questions × D`."""
        return self.mean * torch.cat(self.gradients) - torch.cat(self.products)


class _SiteRecorder:
    """Records the sites of a Q-Former through hooks, one batch at a time."""

    def __init__(self, hf: Any, gradients: bool):
        self.hf, self.gradients = hf, gradients
        self.statistics: dict[str, _SiteStatistics] = {}
        self._batch: dict[str, tuple[Tensor, Tensor | None]] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> "_SiteRecorder":
        qformer = self.hf.qformer
        if self.gradients:
            # All weights are frozen, so autograd needs a tensor that the graph starts from.
            self._hooks.append(
                qformer.embeddings.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
            )
        for name in find_norm_readers(self.hf):
            self._hook_value(name, qformer.get_submodule(name), of_input=False)
        for name in (*find_attention_outputs(self.hf), *find_feed_forward_outputs(self.hf)):
            self._hook_value(name, qformer.get_submodule(name), of_input=True)
        for index, layer in enumerate(qformer.encoder.layer):
            self._hook_change(f"layer {index}", layer)
            if layer.has_cross_attention:
                self._hook_change(f"crossing {index}", layer.crossattention)
        self._hook_value("visual", self.hf.language_projection, of_input=False)
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _hook_value(self, name: str, module: nn.Module, of_input: bool) -> None:
        """Record the input or the output of a module."""

        def record(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self._record(name, inputs[0] if of_input else output, None)

        self._hooks.append(module.register_forward_hook(record))

    def _hook_change(self, name: str, module: nn.Module) -> None:
        """Record what a module with a residual connection adds to its input."""

        def record(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self._record(name, output, inputs[0])

        self._hooks.append(module.register_forward_hook(record))

    def _record(self, name: str, value: Tensor, residual: Tensor | None) -> None:
        if self.gradients and value.requires_grad:
            value.retain_grad()
        self._batch[name] = (value, residual)

    def accumulate(self, mask_BS: Tensor) -> None:
        """Add the recorded batch to the statistics; padded tokens are left out."""
        Q = self.hf.config.num_query_tokens
        for name, (value, residual) in self._batch.items():
            activation = (value if residual is None else value - residual).detach().float()
            tokens = slice(0, Q) if _QUERY_SITES.search(name) else slice(Q if _TEXT_SITES.match(name) else 0, None)
            mask = mask_BS[:, tokens]
            activation = activation * mask.unsqueeze(2)
            site = self.statistics.setdefault(name, _SiteStatistics([], []))
            if name == "visual":
                self._accumulate_visual(site, activation, value.grad)
                continue
            site.count += int(mask.sum())
            site.total = site.total + activation.sum((0, 1))
            site.squares = site.squares + activation.square().sum((0, 1))
            if self.gradients:
                gradient = (
                    torch.zeros_like(activation) if value.grad is None else value.grad.float() * mask.unsqueeze(2)
                )
                site.products.append((activation * gradient).sum(1))
                site.gradients.append(gradient.sum(1))
        self._batch.clear()

    def _accumulate_visual(self, site: _SiteStatistics, activation_BQD: Tensor, gradient: Tensor | None) -> None:
        """Keep a value per query token, because query tokens are the parts that this site measures."""
        site.count += len(activation_BQD)
        site.total = site.total + activation_BQD.sum(0)
        site.squares = site.squares + activation_BQD.square().sum(0)
        if gradient is not None:
            site.products.append(activation_BQD * gradient.float())
            site.gradients.append(gradient.float())


def _measure_taylor(hf: Any, statistics: Mapping[str, _SiteStatistics]) -> Scores:
    layer_count = len(hf.qformer.encoder.layer)
    effects = {name: site.effects() for name, site in statistics.items()}

    def removal_effect(name: str) -> float:
        """Return the effect of removing a module: its residual contribution becomes zero, not its mean."""
        return float(torch.cat(statistics[name].products).sum(1).square().mean()) if name in statistics else 0.0

    return Scores(
        channels=torch.stack([effects[name].square().mean(0) for name in find_norm_readers(hf)]).sum(0),
        queries=effects["visual"].sum(2).square().mean(0),
        layers=[removal_effect(f"layer {index}") for index in range(layer_count)],
        cross_attentions=[removal_effect(f"crossing {index}") for index in range(layer_count)],
        inner={name: effects[name].square().mean(0) for name in _find_output_layers(hf)},
        heads={name: _split_heads(hf, effects[name]).sum(2).square().mean(0) for name in find_attention_outputs(hf)},
    )


def _measure_activation(hf: Any, statistics: Mapping[str, _SiteStatistics]) -> Scores:
    channels = []
    for name, linears in find_norm_readers(hf).items():
        if linears:
            squares = torch.stack([linear.weight.detach().float().square().sum(0) for linear in linears])
            channels.append(_normalize(statistics[name].deviation * squares.sum(0).sqrt()))
    inner = {
        name: statistics[name].deviation * _weight_norms(linear, 0) for name, linear in _find_output_layers(hf).items()
    }
    layer_count = len(hf.qformer.encoder.layer)

    def change(name: str) -> float:
        """Return the root mean square of what a module adds to its input."""
        if name not in statistics:
            return 0.0
        return float(torch.as_tensor(statistics[name].squares).sum() / statistics[name].count) ** 0.5

    return Scores(
        channels=torch.stack(channels).sum(0),
        queries=statistics["visual"].deviation.square().sum(1).sqrt(),
        layers=[change(f"layer {index}") for index in range(layer_count)],
        cross_attentions=[change(f"crossing {index}") for index in range(layer_count)],
        inner=inner,
        heads=_head_norms(hf, inner),
    )


def _measure_magnitude(hf: Any) -> Scores:
    qformer = hf.qformer
    channels = [
        _normalize(torch.stack([_weight_norms(linear, 0).square() for linear in linears]).sum(0).sqrt())
        for linears in find_norm_readers(hf).values()
        if linears
    ]
    channels += [_normalize(_weight_norms(linear, 1)) for linear in _find_output_layers(hf).values()]
    inner = {}
    for name, linear in find_attention_outputs(hf).items():
        value = qformer.get_submodule(name.replace("output.dense", "attention.value"))
        inner[name] = _weight_norms(value, 1) * _weight_norms(linear, 0)
    for name, linear in find_feed_forward_outputs(hf).items():
        first = qformer.get_submodule(name.replace("output", "intermediate"))
        inner[name] = _weight_norms(first, 1) * _weight_norms(linear, 0)
    layers = list(qformer.encoder.layer)
    return Scores(
        channels=torch.stack(channels).sum(0),
        queries=hf.query_tokens.detach()[0].float().norm(dim=1),
        layers=[_squared_norm(layer.attention, layer.intermediate_query, layer.output_query) for layer in layers],
        cross_attentions=[
            _squared_norm(layer.crossattention) if layer.has_cross_attention else 0.0 for layer in layers
        ],
        inner=inner,
        heads=_head_norms(hf, inner),
    )


def _fill_scores(hf: Any, values: Callable[[int], Tensor]) -> Scores:
    """Return scores that `values(count)` gives for each kind of part, without looking at weights or activations."""
    config, layer_count = hf.config.qformer_config, len(hf.qformer.encoder.layer)
    return Scores(
        channels=values(config.hidden_size),
        queries=values(hf.config.num_query_tokens),
        layers=values(layer_count).tolist(),
        cross_attentions=[0.0] * layer_count,
        inner={name: values(linear.in_features) for name, linear in _find_output_layers(hf).items()},
        heads={name: values(config.num_attention_heads) for name in find_attention_outputs(hf)},
    )


def _find_output_layers(hf: Any) -> dict[str, nn.Linear]:
    return find_attention_outputs(hf) | find_feed_forward_outputs(hf)


def _split_heads(hf: Any, values_RD: Tensor) -> Tensor:
    """`R × D` → `R × heads × width`."""
    return values_RD.unflatten(1, (hf.config.qformer_config.num_attention_heads, -1))


def _head_norms(hf: Any, inner: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Combine the scores of each head's channels into one value per head: their norm."""
    return {
        name: _split_heads(hf, inner[name].square().unsqueeze(0)).sum(2)[0].sqrt()
        for name in find_attention_outputs(hf)
    }


def _weight_norms(linear: nn.Linear, dim: int) -> Tensor:
    """Norms of a weight matrix: with `dim` 0, of the weights that read each input; with 1, that write each output."""
    return linear.weight.detach().float().norm(dim=dim)


def _squared_norm(*modules: nn.Module) -> float:
    return float(sum(p.detach().float().square().sum() for module in modules for p in module.parameters()))


def _normalize(values: Tensor) -> Tensor:
    """Scale values to a sum of one, because sites of different scale count equally."""
    return values / values.sum()


def _token_mask(text_mask_BT: Tensor, Q: int) -> Tensor:
    """1 for query tokens and text tokens that are not padding, `B × (Q + T)`."""
    return torch.cat([text_mask_BT.new_ones(len(text_mask_BT), Q), text_mask_BT], dim=1).float()
