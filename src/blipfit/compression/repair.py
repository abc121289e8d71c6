"""Least-squares repair of a shrunk Q-Former: refit its layers, one by one, to the outputs of the original Q-Former.

Both Q-Formers compute the same calibration questions. Then, in the order of computation:

1. Every linear layer of the shrunk Q-Former is refitted: from its own inputs it shall give the outputs of the original
   at the selected channels.
2. The layer norm behind it is refitted: one scale and one shift per channel.

A layer that writes to the residual path has the original's sum of output and residual as its target, so it also
compensates the error of the residual path. If the layers after it were removed, it shall give what the last of them
gave. Every fit is a ridge regression of a correction to the inherited weight: where nothing was lost, the correction is
zero.

`B` questions, `S` query and text tokens, `Q` query tokens, `P` image tokens, `D`, `E` widths, `R` rows: the tokens of
all questions without padding.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blipfit.compression.calibration import Calibration
from blipfit.compression.selection import Selection, query_scale
from blipfit.model.backbone import Backbone
from blipfit.runtime import onednn

RIDGE = 1e-3
"""Weight of the ridge penalty on a correction, relative to the variance of each input."""
NORM_RIDGE = 1e-6
"""The same for the scale of a layer norm, which has one input per channel."""
ROUNDING = 1e-5
"""Errors up to this fraction of the largest target are taken for rounding and not corrected."""

TokenKind = Literal["queries", "text", "all"]
_Records = Mapping[str, Sequence[tuple[Tensor, Tensor]]]
"""Name of a module → its input and output in every batch."""


@dataclass(slots=True)
class _LayerInputs:
    """The inputs of a Q-Former's layer for one calibration batch; `hidden` advances from layer to layer."""

    hidden: Tensor
    """`B × S × D`"""
    attention_mask: Tensor | None
    features: Tensor
    """`B × P × D_vision`, after the layer norm."""


def repair(original: Backbone, small: Any, selection: Selection, questions: Calibration) -> dict[str, float]:
    """Refit Q-Former and projection of `small` (from `cut_model`) in place.

    Returns the fraction of the visual tokens' variance over questions that is lost, `before` and `after` the repair;
    0 means that nothing is lost.
    """
    cut = Backbone(small, original.text, original.family, original.name)
    exact = Backbone(original.hf, original.text, original.family, original.name)  # without autocast
    with torch.no_grad():
        queries = selection.queries.to(original.device)
        targets = [visual[:, queries] for visual in _compute_visual(exact, questions)]
        before = lost_variance(_compute_visual(cut, questions), targets)
        with onednn.onednn_products():  # the arithmetic in which the targets were computed
            _LayerwiseFit(exact, cut, selection, questions).run(targets)
        return {"before": before, "after": lost_variance(_compute_visual(cut, questions), targets)}


def lost_variance(visual: Sequence[Tensor], targets: Sequence[Tensor]) -> float:
    """Squared distance of visual tokens `B × Q × D` from their targets, relative to the targets' variance."""
    actual, expected = torch.cat(list(visual)).double(), torch.cat(list(targets)).double()
    return float((actual - expected).square().sum() / (expected - expected.mean(0)).square().sum())


def _compute_visual(backbone: Backbone, questions: Calibration) -> list[Tensor]:
    return [backbone.query(features, batch) for features, batch in questions]


class _LayerwiseFit:
    """Runs both models side by side, layer by layer, and refits the cut one."""

    def __init__(self, original: Backbone, cut: Backbone, selection: Selection, questions: Calibration):
        self.original, self.cut, self.selection, self.questions = original, cut, selection, questions
        self.channels, self.queries = selection.channels.to(original.device), selection.queries.to(original.device)
        self.text_masks = [batch.qformer_mask_BT.bool() for _, batch in questions]

    def run(self, visual: Sequence[Tensor]) -> None:
        """Refit all layers; `visual`: the original's visual tokens at the selected queries, the projection's target."""
        embeddings_norm = self.cut.hf.qformer.embeddings.layernorm
        original_inputs, _ = _record_layer_inputs(self.original, self.questions)
        cut_inputs, embeddings = _record_layer_inputs(self.cut, self.questions)
        target = self._rows([inputs.hidden for inputs in original_inputs], "all", of_original=True)[:, self.channels]
        _fit_norm(embeddings_norm, self._rows(embeddings, "all"), target)
        for inputs, embedding in zip(cut_inputs, embeddings, strict=True):
            inputs.hidden = embeddings_norm(embedding)
        sources, layers = self.selection.layers, self.original.hf.qformer.encoder.layer
        next_layer = 0
        for position, source in enumerate(sources):
            is_last = position == len(sources) - 1
            end = len(layers) - 1 if is_last else sources[position + 1] - 1
            records: dict[int, _Records] = {}
            for index in range(next_layer, end + 1):
                records[index] = self._run_original(layers[index], original_inputs, record=index in (source, end))
            next_layer = end + 1
            layer = self.cut.hf.qformer.encoder.layer[position]
            self._fit_layer(layer, source, records[source], records[end], cut_inputs)
        outputs = self._rows([inputs.hidden for inputs in cut_inputs], "queries")
        _fit(self.cut.hf.language_projection, outputs, torch.cat([tokens.flatten(0, 1) for tokens in visual]))

    def _fit_layer(
        self, layer: Any, source: int, records: _Records, end_records: _Records, cut_inputs: list[_LayerInputs]
    ) -> None:
        """Refit a layer of the cut model.

        `records`: what the original's layer `source` computed; `end_records`: what the last layer before the next
        selected one computed, which differs from `source` where layers were removed.
        """
        Q = self.cut.hf.config.num_query_tokens
        inner = {
            name: self.selection.inner[f"encoder.layer.{source}.{name}.dense"].to(self.channels.device)
            for name in ("attention.output", "crossattention.output", "output", "output_query")
            if f"encoder.layer.{source}.{name}.dense" in self.selection.inner
        }
        hidden = [inputs.hidden for inputs in cut_inputs]
        hidden = self._fit_attention(layer.attention, "attention", inner, records, hidden, "all", cut_inputs)
        queries, text = [h[:, :Q] for h in hidden], [h[:, Q:] for h in hidden]
        if layer.has_cross_attention:
            queries = self._fit_attention(
                layer.crossattention, "crossattention", inner, records, queries, "queries", cut_inputs
            )
        queries = self._fit_feed_forward(layer, "_query", inner, records, end_records, queries, "queries")
        text = self._fit_feed_forward(layer, "", inner, records, end_records, text, "text")
        for inputs, *parts in zip(cut_inputs, queries, text, strict=True):
            inputs.hidden = torch.cat(parts, dim=1)

    def _fit_attention(
        self,
        attention: Any,
        name: str,
        inner: Mapping[str, Tensor],
        records: _Records,
        hidden: list[Tensor],
        tokens: TokenKind,
        cut_inputs: list[_LayerInputs],
    ) -> list[Tensor]:
        """Refit an attention and the layer norm behind it; return its outputs, batch by batch."""
        channels = inner[f"{name}.output"]
        scale = query_scale(self.original.hf, self.selection.size)
        rows = self._rows(hidden, tokens)
        # Keys and values of cross-attention read the image features, which are complete.
        for part in ("query", "key", "value") if tokens == "all" else ("query",):
            target = self._recorded_outputs(records, f"{name}.attention.{part}", tokens)[:, channels]
            _fit(getattr(attention.attention, part), rows, target * (scale if part == "query" else 1))
        is_cross = tokens == "queries"
        contexts = [
            attention.attention(
                h,
                attention_mask=None if is_cross else inputs.attention_mask,
                encoder_hidden_states=inputs.features if is_cross else None,
            )[0]
            for h, inputs in zip(hidden, cut_inputs, strict=True)
        ]
        self._fit_output(attention.output, name + ".output", records, contexts, hidden, tokens)
        return [attention.output(context, h) for context, h in zip(contexts, hidden, strict=True)]

    def _fit_feed_forward(
        self,
        layer: Any,
        suffix: str,
        inner: Mapping[str, Tensor],
        records: _Records,
        end_records: _Records,
        hidden: list[Tensor],
        tokens: TokenKind,
    ) -> list[Tensor]:
        """Refit a feed-forward branch and the layer norm behind it; return its outputs, batch by batch."""
        first, second = getattr(layer, f"intermediate{suffix}"), getattr(layer, f"output{suffix}")
        target = self._recorded_outputs(records, f"intermediate{suffix}.dense", tokens)[:, inner[f"output{suffix}"]]
        _fit(first.dense, self._rows(hidden, tokens), target)
        units = [first(h) for h in hidden]
        self._fit_output(second, f"output{suffix}", end_records, units, hidden, tokens)
        return [second(u, h) for u, h in zip(units, hidden, strict=True)]

    def _fit_output(
        self,
        output: Any,
        name: str,
        records: _Records,
        inputs: list[Tensor],
        residual: list[Tensor],
        tokens: TokenKind,
    ) -> None:
        """Refit a dense layer that adds to the residual path, and the layer norm behind it."""
        norm_records = records[f"{name}.LayerNorm"]
        target = self._rows([before for before, _ in norm_records], tokens, of_original=True)[:, self.channels]
        normed = self._rows([after for _, after in norm_records], tokens, of_original=True)[:, self.channels]
        input_rows, residual_rows = self._rows(inputs, tokens), self._rows(residual, tokens)
        _fit(output.dense, input_rows, target - residual_rows)
        _fit_norm(output.LayerNorm, output.dense(input_rows) + residual_rows, normed)

    def _recorded_outputs(self, records: _Records, name: str, tokens: TokenKind) -> Tensor:
        return self._rows([output for _, output in records[name]], tokens, of_original=True)

    def _rows(self, batches: Sequence[Tensor], tokens: TokenKind, of_original: bool = False) -> Tensor:
        """Return the tokens of all batches as rows `R × D`; of the original, only the selected query tokens."""
        rows = []
        Q = (self.original if of_original else self.cut).hf.config.num_query_tokens
        for batch, mask in zip(batches, self.text_masks, strict=True):
            if tokens != "text":
                queries = batch[:, :Q]
                rows.append((queries[:, self.queries] if of_original else queries).flatten(0, 1))
            if tokens != "queries":
                rows.append((batch if tokens == "text" else batch[:, Q:])[mask])
        return torch.cat(rows)

    def _run_original(self, layer: Any, batches: list[_LayerInputs], record: bool) -> _Records:
        """Advance the original's batches by one layer; if `record`, return its modules' inputs and outputs."""
        records: dict[str, list[tuple[Tensor, Tensor]]] = {}
        hooks = []
        for name, module in layer.named_modules() if record else ():
            if isinstance(module, (nn.Linear, nn.LayerNorm)):
                hooks.append(module.register_forward_hook(_append_to(records.setdefault(name, []))))
        Q = self.original.hf.config.num_query_tokens
        for inputs in batches:
            inputs.hidden = layer(inputs.hidden, inputs.attention_mask, inputs.features, query_length=Q)
        for hook in hooks:
            hook.remove()
        return records


def _append_to(record: list[tuple[Tensor, Tensor]]) -> Callable[[nn.Module, Any, Tensor], None]:
    """Return a forward hook that appends a module's input and output to a list."""

    def append(module: nn.Module, inputs: Any, output: Tensor) -> None:
        record.append((inputs[0], output))

    return append


def _record_layer_inputs(backbone: Backbone, questions: Calibration) -> tuple[list[_LayerInputs], list[Tensor]]:
    """Return the inputs of a Q-Former's first layer and those of the layer norm of its embeddings, batch by batch."""
    layer_inputs: list[_LayerInputs] = []
    embeddings: list[Tensor] = []
    qformer = backbone.hf.qformer

    def record_layer(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        layer_inputs.append(_LayerInputs(*inputs[:3]))

    def record_embeddings(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        embeddings.append(inputs[0])

    hooks = [
        qformer.encoder.layer[0].register_forward_pre_hook(record_layer),
        qformer.embeddings.layernorm.register_forward_pre_hook(record_embeddings),
    ]
    try:
        _compute_visual(backbone, questions)
    finally:
        for hook in hooks:
            hook.remove()
    return layer_inputs, embeddings


def _fit(linear: nn.Linear, inputs_RD: Tensor, targets_RE: Tensor) -> None:
    """Correct a linear layer in place so that it gives the targets: ridge regression of the remaining error."""
    error = _error_or_none(targets_RE, linear(inputs_RD))
    if error is None:
        return
    inputs = inputs_RD.double()
    center, shift = inputs.mean(0), error.mean(0)
    inputs, error = inputs - center, error - shift
    deviation = inputs.square().mean(0).sqrt().clamp_min(1e-12)
    inputs = inputs / deviation  # so that the penalty does not depend on a channel's scale
    gram = inputs.T @ inputs / len(inputs)
    gram.diagonal().add_(RIDGE)
    correction = torch.linalg.solve(gram, inputs.T @ error / len(inputs)) / deviation.unsqueeze(1)
    linear.weight += correction.T.to(linear.weight.dtype)
    if linear.bias is not None:
        linear.bias += (shift - center @ correction).to(linear.bias.dtype)


def _fit_norm(norm: nn.LayerNorm, inputs_RD: Tensor, targets_RD: Tensor) -> None:
    """Correct the scale and the shift of a layer norm in place, each channel by itself."""
    error = _error_or_none(targets_RD, norm(inputs_RD))
    if error is None:
        return
    normal = F.layer_norm(inputs_RD.double(), norm.normalized_shape, eps=norm.eps)
    center, shift = normal.mean(0), error.mean(0)
    normal = normal - center
    slope = (normal * (error - shift)).mean(0) / (normal.square().mean(0) + NORM_RIDGE)
    norm.weight += slope.to(norm.weight.dtype)
    norm.bias += (shift - slope * center).to(norm.bias.dtype)


def _error_or_none(targets: Tensor, outputs: Tensor) -> Tensor | None:
    """Return targets minus outputs, or None where that is only the rounding of different matrix shapes."""
    error = (targets - outputs).double()
    return error if error.abs().max() > ROUNDING * targets.abs().max() else None
