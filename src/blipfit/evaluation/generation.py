"""Generate answers for many questions at once, with named decoding presets.

A question gets the same text alone as in any batch, also with sampling. Shapes: `K` experiments of the backbone's
bank, `B` questions of a batch, `A` new tokens, `V` vocabulary.
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

from blipfit.data.batches import EncodedQuestion, PromptBatch
from blipfit.errors import UserError
from blipfit.evaluation.partial_scores import PartialScores
from blipfit.model.backbone import Backbone


@dataclass(frozen=True, slots=True)
class Decoding:
    """How tokens are selected; the defaults are the published InstructBLIP settings.

    `min_tokens` and `max_tokens` count new tokens. `repetition_penalty` applies to generated tokens, not to the prompt.
    `sample` turns on nucleus sampling; `temperature`, `top_p` and `seed` have an effect only then. Raises UserError if
    a value is out of range.
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
            raise UserError(
                f"decoding has beams={self.beams}, min_tokens={self.min_tokens}, max_tokens={self.max_tokens}; it "
                "needs at least 1 beam, max_tokens of at least 1, and 0 ≤ min_tokens ≤ max_tokens"
            )
        if self.repetition_penalty <= 0 or self.temperature <= 0 or not 0 < self.top_p <= 1:
            raise UserError(
                f"decoding has repetition_penalty={self.repetition_penalty}, temperature={self.temperature}, "
                f"top_p={self.top_p}; it needs a repetition penalty and a temperature above 0, and 0 < top_p ≤ 1"
            )
        if self.sample and self.beams > 1:
            raise UserError(
                f"decoding has sample=true and beams={self.beams}; sampling works with one beam only: set beams to 1 "
                "or sample to false"
            )


PRESETS = {
    "greedy": Decoding(beams=1, repetition_penalty=1.0),
    "published": Decoding(),
    "short-answer": Decoding(max_tokens=10, repetition_penalty=1.0, length_penalty=-1.0),
    "caption": Decoding(max_tokens=30, repetition_penalty=1.0),
    "sampling": Decoding(beams=1, repetition_penalty=1.0, sample=True),
}
"""`published`: the defaults of InstructBLIP's own `generate`. `short-answer`: its settings for visual question
answering. `caption`: one sentence, as in its captioning benchmarks."""


def get_preset(name: str) -> Decoding:
    """Return the decoding preset with this name; raises UserError if there is none."""
    if name not in PRESETS:
        matches = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.5)
        hint = f"did you mean {matches[0]!r}?" if matches else f"known: {', '.join(PRESETS)}"
        raise UserError(f"unknown decoding {name!r}; {hint}")
    return PRESETS[name]


@torch.no_grad()
def generate(
    backbone: Backbone,
    encoded: Sequence[EncodedQuestion],
    features_at: Callable[[Sequence[int]], Tensor],
    decoding: Decoding,
    batch_size: int,
    advance: Callable[[int], None] = lambda count: None,
    partial: PartialScores | None = None,
) -> list[list[str]]:
    """Generate answers for all `K` experiments of the backbone's bank: `K` lists of texts in the questions' order.

    `features_at(indices)` returns image features `B × P × D`. `advance(count)` is called after each batch with its
    number of questions. Questions of similar length share a batch, which keeps padding small. Prompts are not
    truncated. `partial`: answers of an evaluation that was interrupted; those that it has are not generated again.
    """
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i].evaluation_prompt))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

    def generate_batch(indices: Sequence[int]) -> list[list[str]]:
        batch = backbone.text.prompts([encoded[i] for i in indices]).to(backbone.device)
        ids = generate_ids(backbone, backbone.query(features_at(indices), batch), batch, decoding)
        texts, B = backbone.text.decode(ids), len(indices)
        return [texts[start : start + B] for start in range(0, len(texts), B)]

    texts = (partial or PartialScores()).evaluate("texts", batches, generate_batch, advance, backbone.is_sharded)
    return [[texts[k, i] for i in range(len(encoded))] for k in range(backbone.experiments)]


def generate_ids(backbone: Backbone, visual: Tensor, batch: PromptBatch, decoding: Decoding) -> Tensor:
    """Generate new token ids `K·B × A` from the visual tokens and prompts of one batch."""
    options: dict[str, Any] = {
        "num_beams": decoding.beams,
        "max_new_tokens": decoding.max_tokens,
        "min_new_tokens": decoding.min_tokens,
        "do_sample": False,  # `GumbelSampling` samples instead
        "repetition_penalty": 1.0,  # a logits processor of `_logits_processors` applies the penalty
        "early_stopping": False,
        "logits_processor": LogitsProcessorList(_logits_processors(visual, batch, decoding)),
    }
    if decoding.beams > 1:
        options["length_penalty"] = decoding.length_penalty
    return backbone.generate(visual, batch, **options)


def _logits_processors(visual: Tensor, batch: PromptBatch, decoding: Decoding) -> list[LogitsProcessor]:
    processors: list[LogitsProcessor] = []
    if decoding.repetition_penalty != 1:
        # The `repetition_penalty` option of transformers ignores as many NEW tokens of a row as it has left pads.
        processors.append(RepetitionPenaltyLogitsProcessor(decoding.repetition_penalty))
    if decoding.sample:
        processors += [TemperatureLogitsWarper(decoding.temperature), TopPLogitsWarper(decoding.top_p)]
        B = len(batch.text_ids_BT)
        prompts = [ids[mask.bool()].tolist() for ids, mask in zip(batch.text_ids_BT, batch.text_mask_BT, strict=True)]
        seeds = [_row_seed(decoding.seed, prompts[row % B]) for row in range(len(visual))]
        processors.append(GumbelSampling(seeds))
    return processors


class GumbelSampling(LogitsProcessor):
    """Adds Gumbel noise to the scores, so that the argmax is a sample from their softmax.

    Every row has its own generator, so its sample does not depend on the other rows of the batch. The noise is
    generated on the CPU, so it does not depend on the device.
    """

    def __init__(self, seeds: Sequence[int]):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores_BV: Tensor) -> Tensor:
        width = scores_BV.shape[1]
        noise = torch.stack([torch.empty(width).exponential_(generator=g) for g in self.generators])
        return scores_BV - noise.log().to(scores_BV)


def _row_seed(seed: int, prompt: Sequence[int]) -> int:
    """Derive a row's seed from the decoding seed and the prompt; equal prompts share their noise on all images."""
    digest = hashlib.sha256(f"{seed}/{prompt}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
