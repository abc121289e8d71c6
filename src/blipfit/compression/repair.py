"""Least-squares repair of a cut Q-Former: layer by layer, what is left learns to give what the original gave.

The cut model and the original read the same calibration questions. Going through the layers in the order in which
they compute, every linear layer is refitted so that from the CUT model's inputs it gives the ORIGINAL's outputs at
the channels that are kept; then the layer norm that follows it, one scale and shift a channel. A layer that writes to
the residual path aims at the original's sum of both, so it also makes up for what the path itself has lost; the last
one before layers that were left out aims at where those layers ended. Every fit is of a correction to the inherited
weight, with a small price on its size: where nothing was lost it is zero.

`B` questions, `S` query and text tokens, `Q` query tokens, `R` rows: tokens of all questions, the padded ones left out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blipfit.compression.calibration import Calibration
from blipfit.compression.selection import Selection, query_scale
from blipfit.model.backbone import Backbone
from blipfit.runtime import cpu

RIDGE = 1e-3
"""Price of a correction, in parts of each input's variance."""
ROUNDING = 1e-5

Where = Literal["queries", "text", "all"]


@dataclass(slots=True)
class _Batch:
    """A calibration batch where it stands in a Q-Former."""

    hidden: Tensor
    """`B × S × D`"""
    attention_mask: Tensor | None
    features: Tensor
    """`B × P × D_vision`, after the layer norm."""


def repair(original: Backbone, small: Any, selection: Selection, questions: Calibration) -> dict[str, float]:
    """Refit Q-Former and projection of `small` (from `selection.cut`) in place.

    Returns the share of the visual tokens' variance over questions that is lost before and after; 0: nothing is.
    """
    cut = Backbone(small, original.text, original.family, original.name)
    exact = Backbone(original.hf, original.text, original.family, original.name)  # without autocast
    with torch.no_grad():
        kept = selection.queries.to(original.device)
        target = [visual[:, kept] for visual in _visual(exact, questions)]
        before = lost(_visual(cut, questions), target)
        with cpu.products():  # as the target was computed
            _Repair(exact, cut, selection, questions).run(target)
        return {"before": before, "after": lost(_visual(cut, questions), target)}


def lost(found: Sequence[Tensor], target: Sequence[Tensor]) -> float:
    """Squared distance of visual tokens `B × Q × D` from their targets, in parts of the targets' variance."""
    there, here = torch.cat(list(target)).double(), torch.cat(list(found)).double()
    return float((here - there).square().sum() / (there - there.mean(0)).square().sum())


def _visual(backbone: Backbone, questions: Calibration) -> list[Tensor]:
    return [backbone.query(features, batch) for features, batch in questions]


class _Repair:
    """The walk through both models side by side."""

    def __init__(self, original: Backbone, cut: Backbone, selection: Selection, questions: Calibration):
        self.old, self.new, self.selection = original.hf, cut.hf, selection
        self.channels, self.kept = selection.channels.to(original.device), selection.queries.to(original.device)
        self.text_masks = [batch.qformer_mask_BT.bool() for _, batch in questions]
        self.original, self.cut, self.questions = original, cut, questions

    def run(self, visual: Sequence[Tensor]) -> None:
        """`visual`: the original's visual tokens at the queries kept, the last thing to fit."""
        embeddings = self.new.qformer.embeddings.layernorm
        was, _ = _entered(self.original, self.questions)
        now, sums = _entered(self.cut, self.questions)
        target = self._rows([batch.hidden for batch in was], "all", old=True)[:, self.channels]
        _fit_norm(embeddings, self._rows(sums, "all"), target)
        for batch, entering in zip(now, sums, strict=True):
            batch.hidden = embeddings(entering)
        sources, layers = self.selection.sources, self.old.qformer.encoder.layer
        at = 0
        for place, source in enumerate(sources):
            last = place == len(sources) - 1
            end = len(layers) - 1 if last else sources[place + 1] - 1
            seen: dict[int, Mapping[str, list[tuple[Tensor, Tensor]]]] = {}
            for number in range(at, end + 1):
                seen[number] = self._pass(layers[number], was, watched=number in (source, end))
            at = end + 1
            self._layer(self.new.qformer.encoder.layer[place], source, seen[source], seen[end], now)
        reached = self._rows([batch.hidden for batch in now], "queries")
        _fit(self.new.language_projection, reached, torch.cat([v.flatten(0, 1) for v in visual]))

    # ------------------------------------------------------------- a layer

    def _layer(self, layer: Any, source: int, acts: Any, ends: Any, now: list[_Batch]) -> None:
        """Fit a layer of the cut model to what its source (`acts`) and the last layer before the next (`ends`) did."""
        q = self.new.config.num_query_tokens
        inner = {
            name: self.selection.inner[f"encoder.layer.{source}.{name}.dense"].to(self.channels.device)
            for name in ("attention.output", "crossattention.output", "output", "output_query")
            if f"encoder.layer.{source}.{name}.dense" in self.selection.inner
        }
        hidden = [batch.hidden for batch in now]
        hidden = self._attention(layer.attention, "attention", inner, acts, hidden, "all", now)
        queries, text = [h[:, :q] for h in hidden], [h[:, q:] for h in hidden]
        if layer.has_cross_attention:
            queries = self._attention(layer.crossattention, "crossattention", inner, acts, queries, "queries", now)
        queries = self._branch(layer, "_query", inner, acts, ends, queries, "queries")
        text = self._branch(layer, "", inner, acts, ends, text, "text")
        for batch, *halves in zip(now, queries, text, strict=True):
            batch.hidden = torch.cat(halves, dim=1)

    def _attention(
        self, attention: Any, name: str, inner: Any, acts: Any, hidden: list[Tensor], where: Where, now: list[_Batch]
    ) -> list[Tensor]:
        kept = inner[f"{name}.output"]
        scale = query_scale(self.old, self.selection.size)
        reads = self._rows(hidden, where)
        # What cross-attention makes of the image features has lost nothing.
        for part in ("query", "key", "value") if where == "all" else ("query",):
            target = self._outputs(acts, f"{name}.attention.{part}", where)[:, kept]
            _fit(getattr(attention.attention, part), reads, target * (scale if part == "query" else 1))
        across = where == "queries"
        contexts = [
            attention.attention(
                h,
                attention_mask=None if across else batch.attention_mask,
                encoder_hidden_states=batch.features if across else None,
            )[0]
            for h, batch in zip(hidden, now, strict=True)
        ]
        self._fit_output(attention.output, name + ".output", acts, contexts, hidden, where)
        return [attention.output(context, h) for context, h in zip(contexts, hidden, strict=True)]

    def _branch(
        self, layer: Any, ending: str, inner: Any, acts: Any, ends: Any, hidden: list[Tensor], where: Where
    ) -> list[Tensor]:
        first, second = getattr(layer, f"intermediate{ending}"), getattr(layer, f"output{ending}")
        target = self._outputs(acts, f"intermediate{ending}.dense", where)[:, inner[f"output{ending}"]]
        _fit(first.dense, self._rows(hidden, where), target)
        units = [first(h) for h in hidden]
        self._fit_output(second, f"output{ending}", ends, units, hidden, where)
        return [second(u, h) for u, h in zip(units, hidden, strict=True)]

    def _fit_output(
        self, output: Any, name: str, acts: Any, inputs: list[Tensor], residual: list[Tensor], where: Where
    ) -> None:
        """A dense layer that adds to the residual path, and the layer norm behind it."""
        norm = acts[f"{name}.LayerNorm"]
        there = self._rows([given for given, _ in norm], where, old=True)[:, self.channels]
        after = self._rows([result for _, result in norm], where, old=True)[:, self.channels]
        reads, path = self._rows(inputs, where), self._rows(residual, where)
        _fit(output.dense, reads, there - path)
        _fit_norm(output.LayerNorm, output.dense(reads) + path, after)

    # -------------------------------------------------------------- tokens

    def _outputs(self, acts: Any, name: str, where: Where) -> Tensor:
        return self._rows([result for _, result in acts[name]], where, old=True)

    def _rows(self, batches: Sequence[Tensor], where: Where, old: bool = False) -> Tensor:
        """The tokens of all batches as rows `R × D`: of the original only the queries that are kept."""
        rows = []
        Q = (self.old if old else self.new).config.num_query_tokens
        for tokens, mask in zip(batches, self.text_masks, strict=True):
            if where != "text":
                queries = tokens[:, :Q]
                rows.append((queries[:, self.kept] if old else queries).flatten(0, 1))
            if where != "queries":
                rows.append((tokens if where == "text" else tokens[:, Q:])[mask])
        return torch.cat(rows)

    def _pass(self, layer: Any, batches: list[_Batch], watched: bool) -> dict[str, list[tuple[Tensor, Tensor]]]:
        """Take the original's batches through a layer; return inputs and outputs of its parts, batch by batch."""
        seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
        hooks = []
        for name, module in layer.named_modules() if watched else ():
            if isinstance(module, (nn.Linear, nn.LayerNorm)):
                found = seen.setdefault(name, [])
                hooks.append(module.register_forward_hook(lambda m, i, o, found=found: found.append((i[0], o))))
        Q = self.old.config.num_query_tokens
        for batch in batches:
            batch.hidden = layer(batch.hidden, batch.attention_mask, batch.features, query_length=Q)
        for hook in hooks:
            hook.remove()
        return seen


def _entered(backbone: Backbone, questions: Calibration) -> tuple[list[_Batch], list[Tensor]]:
    """What a Q-Former's first layer is given, batch by batch, and what the layer norm of its embeddings is."""
    batches: list[_Batch] = []
    sums: list[Tensor] = []
    qformer = backbone.hf.qformer

    def enter(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        batches.append(_Batch(*inputs[:3]))

    def add(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        sums.append(inputs[0])

    hooks = [
        qformer.encoder.layer[0].register_forward_pre_hook(enter),
        qformer.embeddings.layernorm.register_forward_pre_hook(add),
    ]
    try:
        _visual(backbone, questions)
    finally:
        for hook in hooks:
            hook.remove()
    return batches, sums


def _fit(linear: nn.Linear, inputs_RD: Tensor, targets_RE: Tensor) -> None:
    """Correct a linear layer so that it gives the targets from the inputs: ridge regression of what is missing."""
    missing = _missing(targets_RE, linear(inputs_RD))
    if missing is None:
        return
    inputs = inputs_RD.double()
    center, shift = inputs.mean(0), missing.mean(0)
    inputs, missing = inputs - center, missing - shift
    spread = inputs.square().mean(0).sqrt().clamp_min(1e-12)
    inputs = inputs / spread  # or the ridge would ask little of loud channels and much of quiet ones
    gram = inputs.T @ inputs / len(inputs)
    gram.diagonal().add_(RIDGE)
    correction = torch.linalg.solve(gram, inputs.T @ missing / len(inputs)) / spread.unsqueeze(1)
    linear.weight += correction.T.to(linear.weight.dtype)
    if linear.bias is not None:
        linear.bias += (shift - center @ correction).to(linear.bias.dtype)


def _fit_norm(norm: nn.LayerNorm, inputs_RD: Tensor, targets_RD: Tensor) -> None:
    """Correct a layer norm's scale and shift, each channel by itself."""
    missing = _missing(targets_RD, norm(inputs_RD))
    if missing is None:
        return
    normal = F.layer_norm(inputs_RD.double(), norm.normalized_shape, eps=norm.eps)
    center, shift = normal.mean(0), missing.mean(0)
    normal = normal - center
    slope = (normal * (missing - shift)).mean(0) / (normal.square().mean(0) + RIDGE * 1e-3)
    norm.weight += slope.to(norm.weight.dtype)
    norm.bias += (shift - slope * center).to(norm.bias.dtype)


def _missing(targets: Tensor, found: Tensor) -> Tensor | None:
    """What is missing, or None where it is no more than the rounding of one computation done in two shapes."""
    missing = (targets - found).double()
    return missing if missing.abs().max() > ROUNDING * targets.abs().max() else None
