"""How much each part of a Q-Former matters: heads, feed-forward units, hidden channels, layers, query tokens.

Three measures, all "higher matters more":

- `taylor`: the expected squared change of a question's loss when the part is held at its mean over all questions, to
  first order: E[(Σ (mean − a) · ∂loss/∂a)²]. (Molchanov et al., 2019, with the mean in the place of zero, because the
  repair that follows can keep a mean for nothing.)
- `activation`: how much the part varies (root mean square about its mean) times the norm of the weights that read it.
- `magnitude`: norms of the weights that write and read it; needs no questions.

`B` questions, `S` tokens, `D` width, `Q` query tokens. A site is a tensor `B × S × D` inside the Q-Former.
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

_QUERIES_ONLY = re.compile("crossing|crossattention|output_query|visual")
_TEXT_ONLY = re.compile(r"encoder\.layer\.\d+\.output\.")


@dataclass(frozen=True, slots=True)
class Scores:
    """Worth of every part of a Q-Former.

    `channels` D; `queries` Q; `layers` and `crossings` one value a layer (0 where it has no cross-attention);
    `inner`: site name → one value a channel of an attention's context or a unit of a feed-forward branch, the sites
    being the layers that read them (`…output.dense`); `heads`: site name → one value a head.
    """

    channels: Tensor
    queries: Tensor
    layers: list[float]
    crossings: list[float]
    inner: Mapping[str, Tensor]
    heads: Mapping[str, Tensor]


def measure(backbone: Backbone, method: Method, questions: Calibration | None) -> Scores:
    """Scores of a backbone's Q-Former; `questions` may be None for `magnitude` only."""
    if method == "magnitude":
        return _magnitude(backbone.hf)
    assert questions is not None
    with _Sites(backbone.hf, gradients=method == "taylor") as sites:
        for features, batch in questions:
            if method == "taylor":
                backbone.losses(backbone.query(features, batch, every_row=True), batch).sum().backward()
            else:
                with torch.no_grad():
                    backbone.query(features, batch, every_row=True)
            sites.collect(_mask(batch.qformer_mask_BT, backbone.hf.config.num_query_tokens))
    return (_taylor if method == "taylor" else _activation)(backbone.hf, sites.seen)


def by_lot(hf: Any, seed: int = 0) -> Scores:
    """Random scores: the yardstick that a measure must beat."""
    generator = torch.Generator().manual_seed(seed)
    return _filled(hf, lambda count: torch.rand(count, generator=generator))


def first(hf: Any) -> Scores:
    """Scores that keep the first of everything: plain slicing."""
    return _filled(hf, lambda count: torch.arange(count, 0, -1, dtype=torch.float32))


# ----------------------------------------------------------------- the sites


def contexts(hf: Any) -> dict[str, nn.Linear]:
    """The output layers of all attentions, by name below the Q-Former; their inputs are heads side by side."""
    return _found(hf, "attention.output.dense")


def branches(hf: Any) -> dict[str, nn.Linear]:
    """The second layers of all feed-forward branches, by name below the Q-Former; their inputs are units."""
    return {
        name: module
        for ending in ("output.dense", "output_query.dense")
        for name, module in _found(hf, ending).items()
        if "attention" not in name
    }


def readers(hf: Any) -> dict[str, list[nn.Linear]]:
    """Every layer norm on the way of the hidden channels, by name, with the linear layers that read its output."""
    layers = list(hf.qformer.encoder.layer)
    entered = [[getattr(layer.attention.attention, part) for part in ("query", "key", "value")] for layer in layers]
    after = [*entered[1:], [hf.language_projection]]
    found = {"embeddings.layernorm": entered[0]}
    for number, layer in enumerate(layers):
        name = f"encoder.layer.{number}."
        text, query = [layer.intermediate.dense], [layer.intermediate_query.dense]
        if layer.has_cross_attention:
            found[f"{name}attention.output.LayerNorm"] = [*text, layer.crossattention.attention.query]
            found[f"{name}crossattention.output.LayerNorm"] = query
        else:
            found[f"{name}attention.output.LayerNorm"] = text + query
        last = number == len(layers) - 1
        found[f"{name}output.LayerNorm"] = [] if last else after[number]
        found[f"{name}output_query.LayerNorm"] = after[number]
    return found


def _found(hf: Any, ending: str) -> dict[str, nn.Linear]:
    return {name: m for name, m in hf.qformer.named_modules() if name.endswith(ending) and isinstance(m, nn.Linear)}


# -------------------------------------------------------------- the measures


@dataclass(slots=True)
class _Seen:
    """What was collected at a site, over all questions: sums over a question's tokens."""

    products: list[Tensor]
    """Σ_tokens a · g, `B × D` a batch."""
    gradients: list[Tensor]
    """Σ_tokens g, `B × D` a batch."""
    count: int = 0
    total: Tensor | float = 0.0
    squares: Tensor | float = 0.0

    @property
    def mean(self) -> Tensor:
        return torch.as_tensor(self.total) / max(self.count, 1)

    @property
    def spread(self) -> Tensor:
        """Root mean square about the mean, D."""
        return (torch.as_tensor(self.squares) / max(self.count, 1) - self.mean**2).clamp_min(0).sqrt()

    def effects(self) -> Tensor:
        """Change of each question's loss when each channel is held at its mean, `questions × D`."""
        return self.mean * torch.cat(self.gradients) - torch.cat(self.products)


class _Sites:
    """Watches the sites of a Q-Former through hooks, one batch at a time."""

    def __init__(self, hf: Any, gradients: bool):
        self.hf, self.gradients = hf, gradients
        self.seen: dict[str, _Seen] = {}
        self._now: dict[str, tuple[Tensor, Tensor | None]] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> "_Sites":
        qformer = self.hf.qformer
        if self.gradients:
            # Nothing here is trained: the graph must start somewhere.
            self._hooks.append(qformer.embeddings.register_forward_hook(lambda m, i, out: out.requires_grad_()))
        for name in readers(self.hf):
            self._watch(name, qformer.get_submodule(name), of_input=False)
        for name in (*contexts(self.hf), *branches(self.hf)):
            self._watch(name, qformer.get_submodule(name), of_input=True)
        for number, layer in enumerate(qformer.encoder.layer):
            self._watch_change(f"layer {number}", layer)
            if layer.has_cross_attention:
                self._watch_change(f"crossing {number}", layer.crossattention)
        self._watch("visual", self.hf.language_projection, of_input=False)
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _watch(self, name: str, module: nn.Module, of_input: bool) -> None:
        def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self._keep(name, inputs[0] if of_input else output, None)

        self._hooks.append(module.register_forward_hook(keep))

    def _watch_change(self, name: str, module: nn.Module) -> None:
        """What a module with a residual path adds to what it is given."""

        def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self._keep(name, output, inputs[0])

        self._hooks.append(module.register_forward_hook(keep))

    def _keep(self, name: str, value: Tensor, before: Tensor | None) -> None:
        if self.gradients and value.requires_grad:
            value.retain_grad()
        self._now[name] = (value, before)

    def collect(self, mask_BS: Tensor) -> None:
        """Add the current batch to what was seen; padded tokens are left out."""
        Q = self.hf.config.num_query_tokens
        for name, (value, before) in self._now.items():
            a = (value if before is None else value - before).detach().float()
            tokens = slice(0, Q) if _QUERIES_ONLY.search(name) else slice(Q if _TEXT_ONLY.match(name) else 0, None)
            mask = mask_BS[:, tokens]
            a = a * mask.unsqueeze(2)
            seen = self.seen.setdefault(name, _Seen([], []))
            if name == "visual":
                self._collect_visual(seen, a, value.grad)
                continue
            seen.count += int(mask.sum())
            seen.total = seen.total + a.sum((0, 1))
            seen.squares = seen.squares + a.square().sum((0, 1))
            if self.gradients:
                g = torch.zeros_like(a) if value.grad is None else value.grad.float() * mask.unsqueeze(2)
                seen.products.append((a * g).sum(1))
                seen.gradients.append(g.sum(1))
        self._now.clear()

    def _collect_visual(self, seen: _Seen, a_BQD: Tensor, gradient: Tensor | None) -> None:
        """Query tokens are the channels of this site: their features are summed, not their tokens."""
        seen.count += len(a_BQD)
        seen.total = seen.total + a_BQD.sum(0)
        seen.squares = seen.squares + a_BQD.square().sum(0)
        if gradient is not None:
            seen.products.append(a_BQD * gradient.float())
            seen.gradients.append(gradient.float())


def _taylor(hf: Any, seen: Mapping[str, _Seen]) -> Scores:
    number = len(hf.qformer.encoder.layer)
    effects = {name: found.effects() for name, found in seen.items()}

    def whole(name: str) -> float:
        """A part that is left out, not held at its mean."""
        return float(torch.cat(seen[name].products).sum(1).square().mean()) if name in seen else 0.0

    crossings = [whole(f"crossing {layer}") for layer in range(number)]
    return Scores(
        channels=torch.stack([effects[name].square().mean(0) for name in readers(hf)]).sum(0),
        queries=effects["visual"].sum(2).square().mean(0),
        layers=[whole(f"layer {layer}") for layer in range(number)],
        crossings=crossings,
        inner={name: effects[name].square().mean(0) for name in (*contexts(hf), *branches(hf))},
        heads={name: _by_head(hf, effects[name]).sum(2).square().mean(0) for name in contexts(hf)},
    )


def _activation(hf: Any, seen: Mapping[str, _Seen]) -> Scores:
    channels = []
    for name, linears in readers(hf).items():
        if linears:
            read = torch.stack([linear.weight.detach().float().square().sum(0) for linear in linears]).sum(0).sqrt()
            channels.append(_shares(seen[name].spread * read))
    inner = {name: seen[name].spread * _norms(linear, 0) for name, linear in (contexts(hf) | branches(hf)).items()}
    number = len(hf.qformer.encoder.layer)

    def change(name: str) -> float:
        return float(torch.as_tensor(seen[name].squares).sum() / seen[name].count) ** 0.5 if name in seen else 0.0

    return Scores(
        channels=torch.stack(channels).sum(0),
        queries=seen["visual"].spread.square().sum(1).sqrt(),
        layers=[change(f"layer {layer}") for layer in range(number)],
        crossings=[change(f"crossing {layer}") for layer in range(number)],
        inner=inner,
        heads={name: _by_head(hf, inner[name].square().unsqueeze(0)).sum(2)[0].sqrt() for name in contexts(hf)},
    )


def _magnitude(hf: Any) -> Scores:
    qformer = hf.qformer
    channels = [
        _shares(torch.stack([_norms(linear, 0).square() for linear in linears]).sum(0).sqrt())
        for linears in readers(hf).values()
        if linears
    ]
    channels += [_shares(_norms(linear, 1)) for linear in (contexts(hf) | branches(hf)).values()]
    inner = {}
    for name, linear in contexts(hf).items():
        inner[name] = _norms(qformer.get_submodule(name.replace("output.dense", "attention.value")), 1) * _norms(
            linear, 0
        )
    for name, linear in branches(hf).items():
        inner[name] = _norms(qformer.get_submodule(name.replace("output", "intermediate")), 1) * _norms(linear, 0)

    def weight(layer: Any, crossing: bool) -> float:
        if crossing and not layer.has_cross_attention:
            return 0.0
        part = [layer.crossattention] if crossing else [layer.attention, layer.intermediate_query, layer.output_query]
        return float(sum(p.detach().float().square().sum() for module in part for p in module.parameters()))

    return Scores(
        channels=torch.stack(channels).sum(0),
        queries=hf.query_tokens.detach()[0].float().norm(dim=1),
        layers=[weight(layer, crossing=False) for layer in qformer.encoder.layer],
        crossings=[weight(layer, crossing=True) for layer in qformer.encoder.layer],
        inner=inner,
        heads={name: _by_head(hf, inner[name].square().unsqueeze(0)).sum(2)[0].sqrt() for name in contexts(hf)},
    )


def _filled(hf: Any, values: Callable[[int], Tensor]) -> Scores:
    c, number = hf.config.qformer_config, len(hf.qformer.encoder.layer)
    return Scores(
        channels=values(c.hidden_size),
        queries=values(hf.config.num_query_tokens),
        layers=values(number).tolist(),
        crossings=[0.0] * number,
        inner={name: values(linear.in_features) for name, linear in (contexts(hf) | branches(hf)).items()},
        heads={name: values(c.num_attention_heads) for name in contexts(hf)},
    )


def _by_head(hf: Any, values_RD: Tensor) -> Tensor:
    """`R × D` as `R × heads × width`."""
    return values_RD.unflatten(1, (hf.config.qformer_config.num_attention_heads, -1))


def _norms(linear: nn.Linear, over: int) -> Tensor:
    """Norms of a weight matrix: `over` 0, of what reads each input; 1, of what writes each output."""
    return linear.weight.detach().float().norm(dim=over)


def _shares(values: Tensor) -> Tensor:
    """Sites differ in scale: each has one vote to share."""
    return values / values.sum()


def _mask(text_BT: Tensor, Q: int) -> Tensor:
    """1 for query tokens and unpadded text tokens, `B × (Q + T)`."""
    return torch.cat([text_BT.new_ones(len(text_BT), Q), text_BT], dim=1).float()
