"""Count a split's texts that are cut and its questions without a clear answer, and describe them for the user."""

from collections.abc import Mapping
from typing import Any

from blipfit.data.batches import MAX_TOKENS, TextEncoder
from blipfit.data.encoded_split import EncodedSplit

PROMPTS_WITHOUT_QUESTION = ("caption-v1",)
"""Prompts that ignore the question, so that an empty one is no mistake."""


def count_texts(split: EncodedSplit) -> dict[str, int]:
    """Count texts that are cut, empty questions, and questions with two equal choices.

    `cut_prompts` and `cut_answers` lose tokens in training only; `cut_qformer_prompts` (the Q-Former's reading of the
    prompt), `very_long_prompts` (more than MAX_TOKENS) and `cut_choices` always.
    """
    return {
        "questions": len(split),
        "cut_prompts": sum(len(e.training_prompt) < len(e.evaluation_prompt) for e in split.encoded),
        "very_long_prompts": sum(e.evaluation_prompt_is_cut for e in split.encoded),
        "cut_qformer_prompts": sum(e.qformer_is_cut for e in split.encoded),
        "cut_answers": sum(e.target_is_cut for e in split.encoded),
        "choices": sum(len(e.candidates) for e in split.encoded),
        "cut_choices": sum(e.cut_candidates for e in split.encoded),
        "empty_questions": sum(not question.question.strip() for question in split.questions),
        "equal_choices": sum(len(set(q.choices)) < len(q.choices) for q in split.questions),
    }


def summarize_texts(text: TextEncoder, splits: Mapping[str, EncodedSplit]) -> dict[str, Any]:
    """Return the limits of prompts and answers in tokens, and `count_texts` of every split."""
    limits = {"max_text_tokens": text.max_text, "max_target_tokens": text.max_target}
    return {**limits, **{name: count_texts(split) for name, split in splits.items()}}


def describe_training(counts: Mapping[str, int], max_text: int, max_target: int) -> list[str]:
    """Return a sentence for every kind of text that training cuts; `counts` is the result of `count_texts`.

    `max_text` and `max_target` are the limits of prompts and answers, in tokens.
    """
    total, sentences = counts["questions"], []
    if count := counts["cut_prompts"]:
        sentences.append(
            f"{count} of {total} prompts are longer than {max_text} tokens and lose their beginning in training"
        )
    if count := counts["cut_answers"]:
        sentences.append(
            f"{count} of {total} answers are longer than {max_target} tokens and lose their end in training"
        )
    return sentences


def describe_reading(counts: Mapping[str, int], max_text: int, max_target: int, prompt_name: str) -> list[str]:
    """Return a sentence for every kind of text that is cut in training and evaluation, or that has no clear answer.

    The arguments are those of `describe_training`, and the name of the prompt.
    """
    total, sentences = counts["questions"], []
    if count := counts.get("very_long_prompts"):  # records of an older blipfit have none
        sentences.append(
            f"{count} of {total} prompts are longer than {MAX_TOKENS} tokens and lose their beginning in evaluation too"
        )
    if count := counts["cut_qformer_prompts"]:
        sentences.append(
            f"{count} of {total} prompts are longer than {max_text} tokens of the Q-Former, which does not read their "
            "beginning"
        )
    if count := counts["cut_choices"]:
        sentences.append(
            f"{count} of {counts['choices']} choices are longer than {max_target} tokens and scored without their end"
        )
    if (count := counts["empty_questions"]) and prompt_name not in PROMPTS_WITHOUT_QUESTION:
        sentences.append(f"{count} of {total} questions are empty")
    if count := counts["equal_choices"]:
        sentences.append(
            f"{count} of {total} questions have two equal choices, and only the labeled one counts as right"
        )
    return sentences
