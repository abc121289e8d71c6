"""From importance to weights: which parts a smaller Q-Former keeps, and the original's tensors cut to them.

`D` hidden width, `Q` query tokens. One selection of hidden channels applies to everything on the residual path:
embeddings, query tokens, layer norms, the layers that read and write it, and the projection's input.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from blipfit.compression.importance import Scores, find_attention_outputs, find_feed_forward_outputs
from blipfit.compression.qformer_size import Size, resize_config, select_layers


@dataclass(frozen=True, slots=True)
class Selection:
    """The parts of the original that a smaller Q-Former keeps, as ascending indices into the original."""

    size: Size
    """Size of the smaller Q-Former."""
    channels: Tensor
    """Hidden channels, int64."""
    queries: Tensor
    """Query tokens, int64."""
    layers: tuple[int, ...]
    """For each layer of the smaller Q-Former, the original's layer that it inherits from."""
    inner: Mapping[str, Tensor]
    """Name of an output layer (as in `Scores.inner`) → its inputs: the units of a feed-forward branch, or the channels
    of an attention's heads, head by head."""

    @property
    def record(self) -> dict[str, Any]:
        """The indices as plain lists, for a JSON file."""
        return {
            "channels": self.channels.tolist(),
            "queries": self.queries.tolist(),
            "layers": list(self.layers),
            "inner": {name: indices.tolist() for name, indices in self.inner.items()},
        }


def select_parts(hf: Any, size: Size, scores: Scores) -> Selection:
    """Select the most important parts: in every layer the same number of heads, channels per head, and units."""
    original = Size.from_config(hf.config)
    layers = select_layers(original, size, scores.layers, scores.cross_attentions)
    inner: dict[str, Tensor] = {}
    for name in find_feed_forward_outputs(hf):
        inner[name] = _top_indices(scores.inner[name], size.intermediate)
    for name in find_attention_outputs(hf):
        heads = _top_indices(scores.heads[name], size.heads)
        channel_scores = scores.inner[name].unflatten(0, (original.heads, -1))
        inner[name] = torch.cat(
            [head * original.head_width + _top_indices(channel_scores[head], size.head_width) for head in heads]
        )
    channels, queries = _top_indices(scores.channels, size.hidden), _top_indices(scores.queries, size.queries)
    return Selection(size, channels, queries, layers, inner)


def _top_indices(scores: Tensor, count: int) -> Tensor:
    """Return the indices of the `count` highest scores, ascending; of equal scores the first ones."""
    return scores.cpu().argsort(descending=True, stable=True)[:count].sort().values


def cut_model(hf: Any, selection: Selection) -> Any:
    """Return a model whose Q-Former has the selected parts only; it shares the other modules with the original."""
    from transformers import InstructBlipQFormerModel

    size, device = selection.size, hf.query_tokens.device
    channels = selection.channels.to(device)
    small = copy.copy(hf)
    small._modules, small._parameters = dict(hf._modules), dict(hf._parameters)
    small.config = resize_config(hf.config, size)
    small.query_tokens = _frozen_copy(hf.query_tokens[:, selection.queries.to(device)][:, :, channels])
    small.qformer = InstructBlipQFormerModel(small.config.qformer_config).to(device, hf.query_tokens.dtype).eval()
    small.language_projection = nn.Linear(size.hidden, hf.language_projection.out_features, device=device)
    small.language_projection.to(hf.language_projection.weight.dtype)
    _copy_weights(small.language_projection, hf.language_projection, columns=channels)
    _copy_embeddings(small.qformer.embeddings, hf.qformer.embeddings, channels)
    for layer, source in zip(small.qformer.encoder.layer, selection.layers, strict=True):
        _copy_layer(layer, hf.qformer.encoder.layer[source], selection, source)
    small.qformer.requires_grad_(False)
    small.language_projection.requires_grad_(False)
    return small


def query_scale(hf: Any, size: Size) -> float:
    """Return the factor for the attention queries of narrower heads that keeps their attention scores as they were.

    Attention divides its scores by the square root of the head width, and that width is smaller now.
    """
    return (size.head_width / Size.from_config(hf.config).head_width) ** 0.5


def _copy_embeddings(new: Any, old: Any, channels: Tensor) -> None:
    for name in ("word_embeddings", "position_embeddings"):
        getattr(new, name).weight.data.copy_(getattr(old, name).weight[:, channels])
    _copy_weights(new.layernorm, old.layernorm, rows=channels)


def _copy_layer(new: Any, old: Any, selection: Selection, source: int) -> None:
    """Copy the selected parts of the original's layer with index `source`."""
    channels = selection.channels.to(old.output.dense.weight.device)
    scale = (selection.size.head_width / old.attention.attention.attention_head_size) ** 0.5
    for name in ("attention", "crossattention") if new.has_cross_attention else ("attention",):
        inner = selection.inner[f"encoder.layer.{source}.{name}.output.dense"].to(channels.device)
        new_attention, old_attention = getattr(new, name), getattr(old, name)
        _copy_weights(new_attention.attention.query, old_attention.attention.query, inner, channels, scale)
        columns = channels if name == "attention" else None  # the image features keep all their channels
        _copy_weights(new_attention.attention.key, old_attention.attention.key, inner, columns)
        _copy_weights(new_attention.attention.value, old_attention.attention.value, inner, columns)
        _copy_weights(new_attention.output.dense, old_attention.output.dense, channels, inner)
        _copy_weights(new_attention.output.LayerNorm, old_attention.output.LayerNorm, rows=channels)
    for suffix in ("", "_query"):
        units = selection.inner[f"encoder.layer.{source}.output{suffix}.dense"].to(channels.device)
        new_output, old_output = getattr(new, f"output{suffix}"), getattr(old, f"output{suffix}")
        new_first, old_first = getattr(new, f"intermediate{suffix}"), getattr(old, f"intermediate{suffix}")
        _copy_weights(new_first.dense, old_first.dense, units, channels)
        _copy_weights(new_output.dense, old_output.dense, channels, units)
        _copy_weights(new_output.LayerNorm, old_output.LayerNorm, rows=channels)


@torch.no_grad()
def _copy_weights(
    new: Any, old: Any, rows: Tensor | None = None, columns: Tensor | None = None, scale: float = 1.0
) -> None:
    """Fill a linear layer or a layer norm from the selected outputs (rows) and inputs (columns) of another one."""
    weight = old.weight if rows is None else old.weight[rows]
    new.weight.copy_((weight if columns is None else weight[:, columns]) * scale)
    if new.bias is not None:
        new.bias.copy_((old.bias if rows is None else old.bias[rows]) * scale)


def _frozen_copy(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone(), requires_grad=False)
