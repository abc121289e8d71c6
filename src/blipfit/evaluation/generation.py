"""Answers in the model's own words: how tokens are chosen, as named presets, and texts of many questions at once.

A question gets the same text alone as in any batch, also where tokens are drawn by lot. `K` experiments of the
backbone's bank, `B` questions of a batch, `A` new tokens, `V` vocabulary.
"""

import difflib
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from blipfit.data.batches import Encoded, PromptBatch
from blipfit.errors import UserError
from blipfit.model.backbone import Backbone
from blipfit.runtime import distributed


@dataclass(frozen=True, slots=True)
class Decoding:
    """How a text is chosen, in the field's terms; the defaults are the published InstructBLIP settings.

    With `sample`, tokens are drawn by `seed` from the likeliest ones that make up `top_p`; otherwise `temperature`
    and `top_p` are not used. `min_tokens` and `max_tokens` count new tokens. A repetition penalty is on what was
    generated, not on the prompt.
    """

    beams: int = 5
    max_tokens: int = 256
    min_tokens: int = 1
    top_p: float = 0.9
    repetition_penalty: float = 1.5
    length_penalty: float = 1.0
    temperature: float = 1.0
    sample: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.beams < 1 or not 0 <= self.min_tokens <= self.max_tokens or self.max_tokens < 1:
            raise UserError("decoding needs at least 1 beam and 0 ≤ min_tokens ≤ max_tokens, 1 at least")
        if self.repetition_penalty <= 0 or self.temperature <= 0 or not 0 < self.top_p <= 1:
            raise UserError("decoding needs a repetition penalty and a temperature above 0, and 0 < top_p ≤ 1")
        if self.sample and self.beams > 1:
            raise UserError("decoding draws by lot with one beam only; set beams to 1 or sample to false")


PRESETS = {
    "greedy": Decoding(beams=1, repetition_penalty=1.0),
    "published": Decoding(),
    "short-answer": Decoding(max_tokens=10, repetition_penalty=1.0, length_penalty=-1.0),
    "caption": Decoding(max_tokens=30, repetition_penalty=1.0),
    "sampling": Decoding(beams=1, repetition_penalty=1.0, sample=True),
}
"""`published`: the defaults of InstructBLIP's own `generate`. `short-answer`: its settings for visual question
answering. `caption`: one sentence, as in its captioning benchmarks."""


def preset(name: str) -> Decoding:
    """Return the preset of that name."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.5)
        mend = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(PRESETS)}"
        raise UserError(f"unknown decoding {name!r}; {mend}")
    return PRESETS[name]


@torch.no_grad()
def generate(
    backbone: Backbone,
    encoded: Sequence[Encoded],
    features: Callable[[Sequence[int]], Tensor],
    decoding: Decoding,
    batch_size: int,
    advance: Callable[[int], None] = lambda done: None,
) -> list[list[str]]:
    """Answer questions for all K experiments of the backbone's bank: K lists of texts in the questions' order.

    `features(indices)` gives image features `B × P × D`. Questions are batched by length, so little is padded. Prompts
    are read whole.
    """
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i].prompt))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    found: list[tuple[int, int, str]] = []
    for chosen in distributed.shard(batches):
        rows = [encoded[i] for i in chosen]
        batch = backbone.text.prompts(rows).to(backbone.device)
        ids = write(backbone, backbone.query(features(chosen), batch), batch, decoding)
        for place, text in enumerate(backbone.text.texts(ids)):
            found.append((place // len(chosen), chosen[place % len(chosen)], text))
        advance(len(chosen))
    said = {(k, i): text for k, i, text in distributed.all_gather(found)}
    return [[said[k, i] for i in range(len(encoded))] for k in range(backbone.experiments)]


def write(backbone: Backbone, visual: Tensor, batch: PromptBatch, decoding: Decoding) -> Tensor:
    """Visual tokens + prompts → new token ids `K·B × A`, chosen as `decoding` says."""
    options: dict[str, Any] = {
        "num_beams": decoding.beams,
        "max_new_tokens": decoding.max_tokens,
        "min_new_tokens": decoding.min_tokens,
        "do_sample": False,  # drawing by lot is ours: see `GumbelSampling`
        "repetition_penalty": 1.0,  # and so is this, below
        "early_stopping": False,
        "logits_processor": LogitsProcessorList(_processors(visual, batch, decoding)),
    }
    if decoding.beams > 1:
        options["length_penalty"] = decoding.length_penalty
    return backbone.generate(visual, batch, **options)


def _processors(visual: Tensor, batch: PromptBatch, decoding: Decoding) -> list[LogitsProcessor]:
    made: list[LogitsProcessor] = []
    if decoding.repetition_penalty != 1:
        # transformers' own setting passes over as many NEW tokens of a row as it has pads on its left.
        made.append(RepetitionPenaltyLogitsProcessor(decoding.repetition_penalty))
    if decoding.sample:
        made += [TemperatureLogitsWarper(decoding.temperature), TopPLogitsWarper(decoding.top_p)]
        B = len(batch.text_ids_BT)
        prompts = [ids[mask.bool()].tolist() for ids, mask in zip(batch.text_ids_BT, batch.text_mask_BT, strict=True)]
        made.append(GumbelSampling([_seed(decoding.seed, prompts[row % B]) for row in range(len(visual))]))
    return made


class GumbelSampling(LogitsProcessor):
    """Adds Gumbel noise to the scores, so that the highest is a draw from their softmax.

    Every row has a generator of its own, whatever stands beside it in the batch; the noise is drawn on the CPU, so it
    does not depend on the device.
    """

    def __init__(self, seeds: Sequence[int]):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores_BV: Tensor) -> Tensor:
        width = scores_BV.shape[1]
        noise = torch.stack([torch.empty(width).exponential_(generator=g) for g in self.generators])
        return scores_BV - noise.log().to(scores_BV)


def _seed(seed: int, prompt: Sequence[int]) -> int:
    """Of a row: from the seed and its prompt, so that equal prompts about other pictures share their noise."""
    digest = hashlib.sha256(f"{seed}/{prompt}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
