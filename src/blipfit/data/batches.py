"""Tokenize questions into padded tensors; defines exactly what the Q-Former and the language model read.

Shape suffixes: `B` questions, `T` prompt tokens, `A` answer tokens, `M` candidates of all questions of a batch,
`N` label positions of a batch.

The rules (source: the original experiments):

- The Q-Former always reads the prompt as BERT tokens, `[CLS] … [SEP]`, truncated FROM THE LEFT to `max_text`.
- The language model reads the same prompt: truncated from the left to `max_text` in training, whole in evaluation (but
  at most `MAX_TOKENS`, so that the memory is bounded).
- T5: prompt `… </s>`; target `… </s>`, truncated from the right to `max_target`; the decoder starts with the pad token.
- Causal (Vicuna): `BOS prompt answer </s>`, right-padded; the answer has no BOS; loss only on the answer and `</s>`.
- Candidates to rank are tokenized like targets, but without `</s>` for causal models: only T5's score counts the end
  token.
- Visual tokens come before the prompt's first token; the model's answer stage adds them later.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from blipfit.data.prompts import PromptedQuestion
from blipfit.errors import UserError
from blipfit.recipe import Family

MAX_TOKENS = 2048
"""Maximum length of a prompt in evaluation, and of an answer after truncation: the positions of Vicuna. Memory grows
with the square of the length; the longest published prompt has 497 words."""

ALL_ROWS = slice(None)


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that this module uses."""

    truncation_side: str
    bos_token_id: int
    eos_token_id: int
    pad_token_id: int

    def __call__(self, text: list[str], **options: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class EncodedQuestion:
    """Token ids of one question, without padding; computed once and used in every epoch."""

    qformer: list[int]
    """The prompt in the Q-Former's BERT tokens, truncated from the left."""
    evaluation_prompt: list[int]
    """The whole prompt, for evaluation; truncated from the left if it has more than MAX_TOKENS."""
    training_prompt: list[int]
    """The prompt truncated from the left, for training."""
    target: list[int]
    """The answer to learn, with its end token."""
    candidates: list[list[int]]
    """All answers to rank; empty for an open question."""
    evaluation_prompt_is_cut: bool = False
    """Whether `evaluation_prompt` lacks its beginning."""
    qformer_is_cut: bool = False
    """Whether `qformer` lacks the beginning of the prompt."""
    target_is_cut: bool = False
    """Whether `target` lacks the end of the answer."""
    cut_candidates: int = 0
    """Number of candidates that lack their end."""


class _TensorBatch:
    """Base of the batches: moves all tensors of a batch to a device."""

    def to(self, device: torch.device | str) -> Any:
        """Return the batch on a device; copies to a GPU are asynchronous."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        is_gpu = torch.device(device).type == "cuda"  # a copy is asynchronous only from pinned memory
        return type(self)(
            **{
                name: (value.pin_memory() if is_gpu else value).to(device, non_blocking=True)
                if isinstance(value, Tensor)
                else value
                for name, value in values.items()
            }
        )


@dataclass(frozen=True, slots=True)
class PromptBatch(_TensorBatch):
    """Prompts for the query stage and the answer stage, without answers. Ids and masks (1 = token) are int64."""

    qformer_ids_BT: Tensor
    qformer_mask_BT: Tensor
    text_ids_BT: Tensor
    text_mask_BT: Tensor


@dataclass(frozen=True, slots=True)
class TargetBatch(_TensorBatch):
    """A training batch: prompts and targets.

    T5: `text` is the prompt and `decoder_ids_BA` the shifted target. Causal models: `text` is prompt and answer, and
    `decoder_ids_BA` is None. `positions_N` index those of the flattened (B × L) outputs that predict `labels_N`, where
    L is A for T5 and T for causal models (counted without the visual tokens). Labels of −100 are padding and ignored.
    """

    qformer_ids_BT: Tensor
    qformer_mask_BT: Tensor
    text_ids_BT: Tensor
    text_mask_BT: Tensor
    decoder_ids_BA: Tensor | None
    positions_N: Tensor
    labels_N: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the batch's tensors in order, without the absent ones; `from_tensors` restores the batch."""
        return tuple(value for f in fields(self) if (value := getattr(self, f.name)) is not None)

    @classmethod
    def from_tensors(cls, tensors: Sequence[Tensor]) -> "TargetBatch":
        """Restore a batch from the result of `tensors`: seven tensors with decoder ids, six without."""
        qformer_ids, qformer_mask, text_ids, text_mask = tensors[:4]
        decoder_ids = tensors[4] if len(tensors) == 7 else None
        positions, labels = tensors[-2:]
        return cls(qformer_ids, qformer_mask, text_ids, text_mask, decoder_ids, positions, labels)


@dataclass(frozen=True, slots=True)
class CandidateBatch(_TensorBatch):
    """A ranking batch: one prompt per question, and the candidates of all questions in one tensor.

    `question_M` is the row of each candidate's question.
    """

    qformer_ids_BT: Tensor
    qformer_mask_BT: Tensor
    text_ids_BT: Tensor
    text_mask_BT: Tensor
    candidate_ids_MA: Tensor
    candidate_mask_MA: Tensor
    question_M: Tensor


class TextEncoder:
    """Turns prompts and answers into token ids and batches, by the rules in this module's docstring.

    `qformer` and `llm` are the two tokenizers, `decoder_start` the id of T5's first decoder token. `max_text` limits
    prompts and `max_target` limits answers, in tokens.
    """

    def __init__(
        self,
        qformer: Any,
        llm: Any,
        family: Family,
        decoder_start: int,
        max_text: int = 128,
        max_target: int = 256,
    ):
        self.qformer_tokenizer, self.llm_tokenizer, self.family = qformer, llm, family
        self.decoder_start = decoder_start
        self.max_text, self.max_target = max_text, max_target
        self.qformer_tokenizer.truncation_side = self.llm_tokenizer.truncation_side = "left"

    def encode(self, prompted: Sequence[PromptedQuestion], whole_prompts: bool = False) -> list[EncodedQuestion]:
        """Tokenize prompts, targets and candidates of questions.

        What is truncated is marked in the result. Raises UserError if, after truncation, an answer or a choice has more
        than `MAX_TOKENS` tokens, or if a prompt is truncated and `whole_prompts` says that none may be.
        """
        prompts = [p.prompt for p in prompted]
        answers = [text for p in prompted for text in p.candidates]
        candidates = iter(self._answers(answers, add_end=self.family == "t5"))
        encoded = []
        for p, qformer, (prompt, prompt_length), training_prompt, (target, target_is_cut) in zip(
            prompted,
            _ids(self.qformer_tokenizer, prompts, truncation=True, max_length=self.max_text),
            self._bounded_prompts(prompts),
            self._prompts(prompts, self.max_text),
            self._answers([p.target for p in prompted]),
            strict=True,
        ):
            if whole_prompts:
                _check_length("prompt", p.prompt, prompt_length)
            _check_length("answer", p.target, len(target))
            rows = [next(candidates) for _ in p.candidates]
            for text, (row, _) in zip(p.candidates, rows, strict=True):
                _check_length("choice", text, len(row))
            encoded.append(
                EncodedQuestion(
                    qformer,
                    prompt,
                    training_prompt,
                    target,
                    [row for row, _ in rows],
                    evaluation_prompt_is_cut=prompt_length > MAX_TOKENS,
                    qformer_is_cut=len(qformer) == self.max_text and self._qformer_length(p.prompt) > self.max_text,
                    target_is_cut=target_is_cut,
                    cut_candidates=sum(is_cut for _, is_cut in rows),
                )
            )
        return encoded

    def _qformer_length(self, prompt: str) -> int:
        """Return the number of the Q-Former's tokens in a whole prompt."""
        return len(_ids(self.qformer_tokenizer, [prompt])[0])

    def prompts(self, encoded: Sequence[EncodedQuestion]) -> PromptBatch:
        """Return a batch of whole prompts, right-padded."""
        return PromptBatch(*self._pad_texts([e.qformer for e in encoded], [e.evaluation_prompt for e in encoded]))

    def targets(self, encoded: Sequence[EncodedQuestion], multiple: int = 1, rows: slice = ALL_ROWS) -> TargetBatch:
        """Return a training batch: truncated prompts and targets. Every row has at least one label (its end token).

        Text lengths and the number of labels are padded to a multiple of `multiple` (T5's decoder ids to a multiple of
        at most 8), so that few shapes occur and a compiled or captured step can be reused. `rows`: return only these
        rows, as long as in the whole batch, so that their dropout noise has the whole batch's shape.
        """
        qformer = [e.qformer for e in encoded]
        questions = encoded[rows]
        if self.family == "t5":
            text = self._pad_texts(qformer, [e.training_prompt for e in encoded], multiple)
            shifted = [[self.decoder_start, *e.target[:-1]] for e in encoded]
            decoder_ids, _ = _pad(shifted, self._pad_id, min(multiple, 8))
            positions = [
                row * decoder_ids.shape[1] + i for row, e in enumerate(questions) for i in range(len(e.target))
            ]
            decoder_ids = decoder_ids[rows]
        else:
            text = self._pad_texts(qformer, [e.training_prompt + e.target for e in encoded], multiple)
            decoder_ids = None
            # Output i predicts token i + 1: the first answer token is predicted at the prompt's last token.
            positions = [
                row * text[2].shape[1] + len(e.training_prompt) - 1 + i
                for row, e in enumerate(questions)
                for i in range(len(e.target))
            ]
        labels = [token for e in questions for token in e.target]
        padding = -len(labels) % multiple
        labels, positions = labels + [-100] * padding, positions + [0] * padding
        qformer_ids, qformer_mask, text_ids, text_mask = (tensor[rows] for tensor in text)
        own = qformer_ids, qformer_mask, text_ids, text_mask, decoder_ids
        return TargetBatch(*own, torch.tensor(positions), torch.tensor(labels))

    def candidates(self, encoded: Sequence[EncodedQuestion]) -> CandidateBatch:
        """Return a ranking batch: whole prompts and all candidates of every question."""
        text = self._pad_texts([e.qformer for e in encoded], [e.evaluation_prompt for e in encoded])
        ids, mask = _pad([candidate for e in encoded for candidate in e.candidates], self._pad_id)
        question = [row for row, e in enumerate(encoded) for _ in e.candidates]
        return CandidateBatch(*text, ids, mask, torch.tensor(question))

    def decode(self, ids_BA: Tensor) -> list[str]:
        """Decode generated token ids; special tokens and surrounding white space are removed.

        Ids outside the tokenizer's vocabulary are skipped: −100 and −1, which pad labels and short beams, and ids that
        exist only because a language model's output layer is larger than the vocabulary.
        """
        in_vocabulary = (ids_BA >= 0) & (ids_BA < len(self.llm_tokenizer))
        rows = torch.where(in_vocabulary, ids_BA, self._pad_id).tolist()
        return [text.strip() for text in self.llm_tokenizer.batch_decode(rows, skip_special_tokens=True)]

    def count_truncated_answers(self, texts: Sequence[str]) -> int:
        """Return how many answers are longer than `max_target` tokens and therefore lose their end."""
        limit = self.max_target - (1 if self.family == "t5" else 0)
        return sum(len(row) > limit for row in _ids(self.llm_tokenizer, list(texts), add_special_tokens=False))

    @property
    def _pad_id(self) -> int:
        return self.llm_tokenizer.pad_token_id

    def _pad_texts(
        self, qformer: list[list[int]], text: list[list[int]], multiple: int = 1
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pad the Q-Former's and the language model's rows; return ids and mask of each."""
        return *_pad(qformer, self.qformer_tokenizer.pad_token_id, multiple), *_pad(text, self._pad_id, multiple)

    def _prompts(self, texts: list[str], limit: int | None = None) -> list[list[int]]:
        """Tokenize prompts with `</s>` at the end (T5) or BOS at the start (causal); `limit` includes that token."""
        if self.family == "t5":
            return _ids(self.llm_tokenizer, texts, truncation=limit is not None, max_length=limit)
        # Whether a Llama tokenizer adds BOS depends on its configuration; the original experiments always have it.
        truncation = {"truncation": True, "max_length": limit - 1} if limit else {}
        return [
            [self.llm_tokenizer.bos_token_id, *row]
            for row in _ids(self.llm_tokenizer, texts, add_special_tokens=False, **truncation)
        ]

    def _bounded_prompts(self, texts: list[str]) -> list[tuple[list[int], int]]:
        """Tokenize prompts, truncated from the left to `MAX_TOKENS`; return the ids and the length of the whole prompt.

        T5's end token and a causal model's start token stay.
        """
        starts = 0 if self.family == "t5" else 1
        return [
            (row if len(row) <= MAX_TOKENS else row[:starts] + row[starts - MAX_TOKENS :], len(row))
            for row in self._prompts(texts)
        ]

    def _answers(self, texts: list[str], add_end: bool = True) -> list[tuple[list[int], bool]]:
        """Tokenize answers without a start token, truncated from the right; truncation keeps an end token.

        Returns token ids and whether they are truncated.
        """
        end = [self.llm_tokenizer.eos_token_id] if add_end else []
        limit = self.max_target - len(end)
        return [
            (row[:limit] + end, len(row) > limit) for row in _ids(self.llm_tokenizer, texts, add_special_tokens=False)
        ]


def _check_length(kind: str, text: str, tokens: int) -> None:
    """Raise UserError if a text has more tokens than a model can read in bounded memory."""
    if tokens > MAX_TOKENS:
        raise UserError(
            f"a {kind} has {tokens:,} tokens, more than the limit of {MAX_TOKENS:,}: {text[:60]!r}…; shorten the "
            "question, its context or its choices"
        )


def _ids(tokenizer: Tokenizer, texts: list[str], **options: Any) -> list[list[int]]:
    if not texts:
        return []
    # Evaluation uses prompts longer than the tokenizer's nominal maximum: `verbose=False` prevents its warning.
    return tokenizer(texts, return_attention_mask=False, verbose=False, **options)["input_ids"]


def _pad(rows: list[list[int]], pad_id: int, multiple: int = 1) -> tuple[Tensor, Tensor]:
    """Right-pad rows to the longest length, rounded up to a multiple; return ids and mask (1 = token), both int64."""
    width = max((len(row) for row in rows), default=0)
    width += -width % multiple
    ids = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows]).reshape(len(rows), width)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]).reshape(len(rows), width)
    return ids, mask
