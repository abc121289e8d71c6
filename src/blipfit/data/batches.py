"""From questions to padded token tensors: the contract of what each text tower sees.

Letters in names: `B` questions, `T` prompt tokens, `A` answer tokens, `M` candidates of all questions of a batch,
`N` label positions of a batch.

The contract (source: the original experiments):

- The Q-Former reads the prompt as BERT tokens, `[CLS] … [SEP]`, cut to `max_text` FROM THE LEFT, always.
- The language model reads the same prompt: in training cut to `max_text` from the left, in evaluation whole.
- T5: prompt `… </s>`; target `… </s>`, cut to `max_target` from the right; the decoder starts with the pad token.
- Causal (Vicuna): `BOS prompt answer </s>`, right-padded; the answer has no BOS; loss only on the answer and `</s>`.
- Candidates to rank are like targets, but a causal model's have no `</s>`: only T5's score counts the end token.
- Visual tokens stand before the prompt's first token; they are added later, by the model's answer stage.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from blipfit.data.prompts import Prompted
from blipfit.recipe import Family


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    truncation_side: str
    bos_token_id: int
    eos_token_id: int
    pad_token_id: int

    def __call__(self, text: list[str], **options: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of one question; made once, used in every epoch."""

    qformer: list[int]
    prompt: list[int]
    """Whole, for evaluation."""
    prompt_cut: list[int]
    """Cut from the left, for training."""
    target: list[int]
    candidates: list[list[int]]


class _OnDevice:
    """A frozen bundle of tensors that moves as one."""

    def to(self, device: torch.device | str) -> Any:
        """The bundle on a device. To a GPU the copies run beside it, and the host does not wait for them."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        is_gpu = torch.device(device).type == "cuda"  # page-locked first, or the copy waits for the GPU
        return type(self)(
            **{
                name: (value.pin_memory() if is_gpu else value).to(device, non_blocking=True)
                if isinstance(value, Tensor)
                else value
                for name, value in values.items()
            }
        )


@dataclass(frozen=True, slots=True)
class PromptBatch(_OnDevice):
    """What the query stage and the front of the answer stage read."""

    qformer_ids_BT: Tensor
    qformer_mask_BT: Tensor
    text_ids_BT: Tensor
    text_mask_BT: Tensor


@dataclass(frozen=True, slots=True)
class TargetBatch(_OnDevice):
    """A training batch.

    For T5 `text` is the prompt and `decoder_ids_BA` the shifted target; causal models have prompt and answer in
    `text`, and no decoder ids. `positions_N` index the flattened (B × L) outputs that predict `labels_N`, where L is
    A for T5 and T for causal models (counted without the visual tokens). Labels of −100 only fill up and are not read.
    """

    qformer_ids_BT: Tensor
    qformer_mask_BT: Tensor
    text_ids_BT: Tensor
    text_mask_BT: Tensor
    decoder_ids_BA: Tensor | None
    positions_N: Tensor
    labels_N: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors of the batch, without what is absent; `of_tensors` takes them back."""
        return tuple(value for f in fields(self) if (value := getattr(self, f.name)) is not None)

    @classmethod
    def of_tensors(cls, tensors: Sequence[Tensor]) -> "TargetBatch":
        """A batch of the tensors that `tensors` gave: seven with decoder ids, six without."""
        qformer_ids, qformer_mask, text_ids, text_mask = tensors[:4]
        decoder_ids = tensors[4] if len(tensors) == 7 else None
        positions, labels = tensors[-2:]
        return cls(qformer_ids, qformer_mask, text_ids, text_mask, decoder_ids, positions, labels)


@dataclass(frozen=True, slots=True)
class CandidateBatch(_OnDevice):
    """A ranking batch: prompts once a question, candidates as ragged rows that point to their question."""

    qformer_ids_BT: Tensor
    qformer_mask_BT: Tensor
    text_ids_BT: Tensor
    text_mask_BT: Tensor
    candidate_ids_MA: Tensor
    candidate_mask_MA: Tensor
    question_M: Tensor


class TextEncoder:
    """The two tokenizers of a model with the contract above."""

    def __init__(
        self,
        qformer: Any,
        llm: Any,
        family: Family,
        decoder_start: int,
        max_text: int = 128,
        max_target: int = 256,
    ):
        self.qformer, self.llm, self.family = qformer, llm, family
        self.decoder_start = decoder_start
        self.max_text, self.max_target = max_text, max_target
        self.qformer.truncation_side = self.llm.truncation_side = "left"

    def encode(self, prompted: Sequence[Prompted]) -> list[Encoded]:
        """Tokenize prompts, targets and candidates."""
        prompts = [p.prompt for p in prompted]
        candidates = iter(self._answers([text for p in prompted for text in p.candidates], ended=self.family == "t5"))
        return [
            Encoded(qformer, prompt, prompt_cut, target, [next(candidates) for _ in p.candidates])
            for p, qformer, prompt, prompt_cut, target in zip(
                prompted,
                _ids(self.qformer, prompts, truncation=True, max_length=self.max_text),
                self._prompts(prompts),
                self._prompts(prompts, self.max_text),
                self._answers([p.target for p in prompted]),
                strict=True,
            )
        ]

    def prompts(self, encoded: Sequence[Encoded]) -> PromptBatch:
        """Whole prompts, right-padded."""
        return PromptBatch(*self._front([e.qformer for e in encoded], [e.prompt for e in encoded]))

    def targets(self, encoded: Sequence[Encoded], multiple: int = 1) -> TargetBatch:
        """Cut prompts with their targets, for training; every row has at least one label (its end token).

        Texts are padded to a multiple of `multiple` tokens (answers: of eight at most), and so is the number of labels:
        what is compiled or captured for a shape then serves many batches.
        """
        qformer = [e.qformer for e in encoded]
        if self.family == "t5":
            front = self._front(qformer, [e.prompt_cut for e in encoded], multiple)
            shifted = [[self.decoder_start, *e.target[:-1]] for e in encoded]
            decoder_ids, _ = _pad(shifted, self._pad_id, min(multiple, 8))
            positions = [row * decoder_ids.shape[1] + i for row, e in enumerate(encoded) for i in range(len(e.target))]
        else:
            front = self._front(qformer, [e.prompt_cut + e.target for e in encoded], multiple)
            decoder_ids = None
            # Output i predicts token i + 1: the first answer token is predicted where the prompt ends.
            positions = [
                row * front[2].shape[1] + len(e.prompt_cut) - 1 + i
                for row, e in enumerate(encoded)
                for i in range(len(e.target))
            ]
        labels = [token for e in encoded for token in e.target]
        more = -len(labels) % multiple
        labels, positions = labels + [-100] * more, positions + [0] * more
        return TargetBatch(*front, decoder_ids, torch.tensor(positions), torch.tensor(labels))

    def candidates(self, encoded: Sequence[Encoded]) -> CandidateBatch:
        """Whole prompts with every candidate, for ranking."""
        front = self._front([e.qformer for e in encoded], [e.prompt for e in encoded])
        ids, mask = _pad([candidate for e in encoded for candidate in e.candidates], self._pad_id)
        question = [row for row, e in enumerate(encoded) for _ in e.candidates]
        return CandidateBatch(*front, ids, mask, torch.tensor(question))

    def texts(self, ids_BA: Tensor) -> list[str]:
        """Generated ids → texts, without special tokens and outer blanks.

        Ids that no tokenizer knows are passed over: −100 and −1, which fill up labels and short beams, and the rows
        by which a language model's output is wider than its vocabulary.
        """
        known = (ids_BA >= 0) & (ids_BA < len(self.llm))
        rows = torch.where(known, ids_BA, self._pad_id).tolist()
        return [text.strip() for text in self.llm.batch_decode(rows, skip_special_tokens=True)]

    def cut_answers(self, texts: Sequence[str]) -> int:
        """How many of these answers are longer than `max_target`, so that their end is not read."""
        room = self.max_target - (1 if self.family == "t5" else 0)
        return sum(len(row) > room for row in _ids(self.llm, list(texts), add_special_tokens=False))

    @property
    def _pad_id(self) -> int:
        return self.llm.pad_token_id

    def _front(
        self, qformer: list[list[int]], text: list[list[int]], multiple: int = 1
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return *_pad(qformer, self.qformer.pad_token_id, multiple), *_pad(text, self._pad_id, multiple)

    def _prompts(self, texts: list[str], limit: int | None = None) -> list[list[int]]:
        """Ids with `</s>` at the end (T5) or BOS at the front (causal); a limit counts that token too."""
        if self.family == "t5":
            return _ids(self.llm, texts, truncation=limit is not None, max_length=limit)
        # Whether a Llama tokenizer adds its BOS depends on the copy's configuration; the original always has it.
        cut = {"truncation": True, "max_length": limit - 1} if limit else {}
        return [[self.llm.bos_token_id, *row] for row in _ids(self.llm, texts, add_special_tokens=False, **cut)]

    def _answers(self, texts: list[str], ended: bool = True) -> list[list[int]]:
        """Ids without a start token, cut from the right; `ended`: with the end token, which survives the cut."""
        end = [self.llm.eos_token_id] if ended else []
        ids = _ids(self.llm, texts, add_special_tokens=False)
        return [row[: self.max_target - len(end)] + end for row in ids]


def _ids(tokenizer: Tokenizer, texts: list[str], **options: Any) -> list[list[int]]:
    if not texts:
        return []
    # A prompt longer than the model's nominal maximum is wanted here, so no warning about it.
    return tokenizer(texts, return_attention_mask=False, verbose=False, **options)["input_ids"]


def _pad(rows: list[list[int]], pad: int, multiple: int = 1) -> tuple[Tensor, Tensor]:
    """Right-pad to the longest row, or the next multiple: ids and mask (1 = token), both int64."""
    width = max((len(row) for row in rows), default=0)
    width += -width % multiple
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows]).reshape(len(rows), width)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]).reshape(len(rows), width)
    return ids, mask
