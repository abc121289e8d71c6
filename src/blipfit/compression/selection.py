"""From worth to weights: what a smaller Q-Former keeps, and the bigger one's tensors cut to it.

`D` width before and `d` after, `S` tokens, `Q` query tokens. One choice of hidden channels holds for everything on
the residual path: embeddings, query tokens, layer norms, what reads and writes it, the projection's input.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from blipfit.compression import importance
from blipfit.compression import size as shrink_size
from blipfit.compression.importance import Scores
from blipfit.compression.size import Size


@dataclass(frozen=True, slots=True)
class Selection:
    """Indices into the original, ascending.

    `sources` has one of its layers for each layer kept. `inner` has, by the names of `Scores.inner`, the units of a
    feed-forward branch, or the channels of an attention's heads, head by head.
    """

    size: Size
    channels: Tensor
    queries: Tensor
    sources: tuple[int, ...]
    inner: Mapping[str, Tensor]

    @property
    def record(self) -> dict[str, Any]:
        """As plain lists, for a file."""
        return {
            "channels": self.channels.tolist(),
            "queries": self.queries.tolist(),
            "layers": list(self.sources),
            "inner": {name: kept.tolist() for name, kept in self.inner.items()},
        }


def choose(hf: Any, size: Size, scores: Scores) -> Selection:
    """Keep what scores highest: in every layer the same number of heads, of channels a head, and of units."""
    there = shrink_size.of(hf.config)
    sources = shrink_size.sources(there, size, scores.layers, scores.crossings)
    inner: dict[str, Tensor] = {}
    for name in importance.branches(hf):
        inner[name] = _best(scores.inner[name], size.intermediate)
    for name in importance.contexts(hf):
        heads = _best(scores.heads[name], size.heads)
        within = scores.inner[name].unflatten(0, (there.heads, -1))
        inner[name] = torch.cat([head * there.head_width + _best(within[head], size.head_width) for head in heads])
    return Selection(size, _best(scores.channels, size.hidden), _best(scores.queries, size.queries), sources, inner)


def _best(scores: Tensor, count: int) -> Tensor:
    return scores.cpu().argsort(descending=True, stable=True)[:count].sort().values


def cut(hf: Any, selection: Selection) -> Any:
    """A model with the selected part of the Q-Former; it shares vision tower and language model with the original."""
    from transformers import InstructBlipQFormerModel

    size, device = selection.size, hf.query_tokens.device
    c = selection.channels.to(device)
    small = copy.copy(hf)
    small._modules, small._parameters = dict(hf._modules), dict(hf._parameters)
    small.config = shrink_size.configured(hf.config, size)
    small.query_tokens = _frozen(hf.query_tokens[:, selection.queries.to(device)][:, :, c])
    small.qformer = InstructBlipQFormerModel(small.config.qformer_config).to(device, hf.query_tokens.dtype).eval()
    small.language_projection = nn.Linear(size.hidden, hf.language_projection.out_features, device=device)
    small.language_projection.to(hf.language_projection.weight.dtype)
    _copy(small.language_projection, hf.language_projection, columns=c)
    _copy_embeddings(small.qformer.embeddings, hf.qformer.embeddings, c)
    for place, source in enumerate(selection.sources):
        _copy_layer(small.qformer.encoder.layer[place], hf.qformer.encoder.layer[source], selection, source)
    small.qformer.requires_grad_(False)
    small.language_projection.requires_grad_(False)
    return small


def query_scale(hf: Any, size: Size) -> float:
    """Attention divides by the root of a head's width: what a query must be multiplied with to keep its scores."""
    return (size.head_width / shrink_size.of(hf.config).head_width) ** 0.5


def _copy_embeddings(new: Any, old: Any, c: Tensor) -> None:
    for name in ("word_embeddings", "position_embeddings"):
        getattr(new, name).weight.data.copy_(getattr(old, name).weight[:, c])
    _copy(new.layernorm, old.layernorm, rows=c)


def _copy_layer(new: Any, old: Any, selection: Selection, source: int) -> None:
    c = selection.channels.to(old.output.dense.weight.device)
    scale = (selection.size.head_width / old.attention.attention.attention_head_size) ** 0.5
    for name in ("attention", "crossattention") if new.has_cross_attention else ("attention",):
        inner = selection.inner[f"encoder.layer.{source}.{name}.output.dense"].to(c.device)
        attention, there = getattr(new, name), getattr(old, name)
        _copy(attention.attention.query, there.attention.query, inner, c, scale)
        reads = c if name == "attention" else None  # the image features keep their channels
        _copy(attention.attention.key, there.attention.key, inner, reads)
        _copy(attention.attention.value, there.attention.value, inner, reads)
        _copy(attention.output.dense, there.output.dense, c, inner)
        _copy(attention.output.LayerNorm, there.output.LayerNorm, rows=c)
    for ending in ("", "_query"):
        units = selection.inner[f"encoder.layer.{source}.output{ending}.dense"].to(c.device)
        _copy(getattr(new, f"intermediate{ending}").dense, getattr(old, f"intermediate{ending}").dense, units, c)
        _copy(getattr(new, f"output{ending}").dense, getattr(old, f"output{ending}").dense, c, units)
        _copy(getattr(new, f"output{ending}").LayerNorm, getattr(old, f"output{ending}").LayerNorm, rows=c)


@torch.no_grad()
def _copy(new: Any, old: Any, rows: Tensor | None = None, columns: Tensor | None = None, scale: float = 1.0) -> None:
    """Fill a layer from the selected outputs (rows) and inputs (columns) of another."""
    weight = old.weight if rows is None else old.weight[rows]
    new.weight.copy_((weight if columns is None else weight[:, columns]) * scale)
    if new.bias is not None:
        new.bias.copy_((old.bias if rows is None else old.bias[rows]) * scale)


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone(), requires_grad=False)
