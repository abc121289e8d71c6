"""Any question is written as a prompt and tokenized within the limits, or refused with a UserError."""

from pathlib import Path

import pytest
from hypothesis import strategies as st

from blipfit import inference
from blipfit.data.batches import MAX_TOKENS
from blipfit.data.prompts import PROMPTS, PromptedQuestion
from blipfit.data.question import Question
from blipfit.errors import UserError
from blipfit.model import loading
from blipfit.model.backbone import Backbone
from blipfit.recipe import ModelConfig
from hostile_inputs import is_user_error, texts


@pytest.fixture(scope="module", params=["tiny-t5", "tiny-vicuna"])
def miniature(request) -> Backbone:
    return loading.load(ModelConfig(name=request.param))


def is_whole(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


@st.composite
def questions(draw: st.DrawFn) -> Question:
    """A question with any texts; with choices, one of them is the answer."""
    choices = tuple(draw(st.lists(texts(), max_size=28) if draw(st.booleans()) else st.just([])))
    index = draw(st.integers(0, len(choices) - 1)) if choices else None
    answer = draw(texts()) if index is None else choices[index]
    return Question("1", Path("x.png"), draw(texts()), answer, choices, index, draw(texts()))


def prompted(name: str, question: Question) -> PromptedQuestion | None:
    """The question in a prompt, or None if it is refused."""
    written: list[PromptedQuestion] = []
    is_user_error(lambda: written.append(PROMPTS[name](question)))
    return written[0] if written else None


def test_a_prompt_keeps_question_and_choices(for_all):
    def check(name: str, question: Question) -> None:
        text = prompted(name, question)
        assert (text is None) == (len(question.choices) > 26)
        if text is not None and question.choices:
            assert len(text.candidates) == len(question.choices)
            assert text.candidates[question.answer_index] == text.target
            assert all(choice in candidate for choice, candidate in zip(question.choices, text.candidates, strict=True))

    for_all(60, check, st.sampled_from(sorted(PROMPTS)), questions())


def test_texts_are_tokenized_within_the_limits(for_all, miniature):
    text = miniature.text
    sizes = miniature.hf.config.qformer_config.vocab_size, miniature.hf.config.text_config.vocab_size

    def check(name: str, question: Question) -> None:
        written = prompted(name, question)
        if written is None or not all(map(is_whole, (written.prompt, written.target, *written.candidates))):
            return
        if is_user_error(lambda: text.encode([written])):
            assert max(map(len, (written.prompt, written.target, *written.candidates))) > 2000
            return
        (encoded,) = text.encode([written])
        assert 0 < len(encoded.qformer) <= text.max_text
        assert 0 < len(encoded.evaluation_prompt) <= MAX_TOKENS
        assert 0 < len(encoded.training_prompt) <= text.max_text
        assert 0 < len(encoded.target) <= text.max_target
        assert len(encoded.candidates) == len(written.candidates)
        assert max(encoded.qformer) < sizes[0]
        assert (
            max(max(ids, default=0) for ids in (encoded.evaluation_prompt, encoded.target, *encoded.candidates))
            < sizes[1]
        )
        batch = text.targets([encoded])
        assert batch.labels_N.tolist() == encoded.target
        if encoded.candidates:
            assert len(text.candidates([encoded]).candidate_ids_MA) == len(question.choices)

    for_all(40, check, st.sampled_from(sorted(PROMPTS)), questions())


def test_texts_from_python_are_checked_first(for_all):
    any_value = texts() | st.none() | st.integers() | st.binary(max_size=3)

    def check(name: str, question: object, context: object, choices: list[object]) -> None:
        is_user_error(lambda: inference._prompted(name, question, tuple(choices), context))
        is_user_error(lambda: inference.wordings(question) if isinstance(question, str) else None)

    for_all(
        100, check, st.sampled_from(sorted(PROMPTS)) | texts(), any_value, any_value, st.lists(any_value, max_size=3)
    )


def test_a_very_long_prompt_is_truncated_or_refused_in_few_words(miniature):
    prompts = [PROMPTS["vqa-v1"](Question("1", Path("x.png"), "red " * 9000, "x"))]
    (encoded,) = miniature.text.encode(prompts)
    assert encoded.evaluation_prompt_is_cut
    assert len(encoded.evaluation_prompt) == MAX_TOKENS
    with pytest.raises(UserError, match="tokens, more than the limit") as refusal:
        miniature.text.encode(prompts, whole_prompts=True)
    assert len(str(refusal.value)) < 300
