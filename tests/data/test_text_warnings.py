"""Texts that a model does not read as a whole, and questions without a clear answer, are counted and said."""

import json
from pathlib import Path

import pytest

from blipfit.data import text_warnings
from blipfit.data.batches import MAX_TOKENS
from blipfit.data.encoded_split import EncodedSplit
from blipfit.data.prompts import PromptedQuestion
from blipfit.data.question import Question
from blipfit.errors import UserError
from blipfit.recipe import Recipe, TrainingConfig
from blipfit.run_folder import Run
from blipfit.training import events, loop

SHORT = ("What is it?", "a star", ("a star", "a heart"))
ROWS = [
    SHORT,
    ("word " * 300 + "What?", "a star", ("a star", "a heart")),
    ("What is it?", "star " * 300, ("star " * 300, "heart " * 300)),
    (" ", "a star", ("a star", "a star")),
]


def build_split(backbone, rows) -> EncodedSplit:
    questions = [Question(str(n), Path("x"), text, answer, choices) for n, (text, answer, choices) in enumerate(rows)]
    prompted = [PromptedQuestion(q.question, q.answer, q.choices) for q in questions]
    return EncodedSplit(questions, prompted, backbone.text.encode(prompted))


def test_texts_are_counted(backbone):
    assert text_warnings.count_texts(build_split(backbone, ROWS)) == {
        "questions": 4,
        "cut_prompts": 1,
        "very_long_prompts": 0,
        "cut_qformer_prompts": 1,
        "cut_answers": 1,
        "choices": 8,
        "cut_choices": 2,
        "empty_questions": 1,
        "equal_choices": 1,
    }
    clean = text_warnings.count_texts(build_split(backbone, [SHORT] * 3))
    assert {name for name, count in clean.items() if count} == {"questions", "choices"}
    assert text_warnings.describe_training(clean, 128, 256) == []
    assert text_warnings.describe_reading(clean, 128, 256, "vqa-v1") == []


def test_a_text_of_exactly_the_limit_is_not_cut(backbone):
    for words in range(100, 140):
        split = build_split(backbone, [("word " * words, "a star", ())])
        counts, (encoded,) = text_warnings.count_texts(split), split.encoded
        assert counts["cut_prompts"] == (len(encoded.evaluation_prompt) > 128)
        whole = backbone.text.qformer_tokenizer(["word " * words])["input_ids"][0]
        if len(whole) <= 128:
            assert encoded.qformer == whole
        assert counts["cut_qformer_prompts"] == (len(whole) > 128)


def test_answers_are_counted_as_they_are_cut(backbone):
    texts = ["star " * count for count in range(200, 300, 7)]
    split = build_split(backbone, [("What?", text, ()) for text in texts])
    assert text_warnings.count_texts(split)["cut_answers"] == backbone.text.count_truncated_answers(texts) > 0


def test_every_count_is_a_sentence(backbone):
    counts = text_warnings.count_texts(build_split(backbone, ROWS))
    assert text_warnings.describe_training(counts, 128, 256) == [
        "1 of 4 prompts are longer than 128 tokens and lose their beginning in training",
        "1 of 4 answers are longer than 256 tokens and lose their end in training",
    ]
    assert text_warnings.describe_reading(counts, 128, 256, "vqa-v1") == [
        "1 of 4 prompts are longer than 128 tokens of the Q-Former, which does not read their beginning",
        "2 of 8 choices are longer than 256 tokens and scored without their end",
        "1 of 4 questions are empty",
        "1 of 4 questions have two equal choices, and only the labeled one counts as right",
    ]
    # A caption needs no question.
    assert not any("empty" in text for text in text_warnings.describe_reading(counts, 128, 256, "caption-v1"))


@pytest.mark.parametrize("length", [100_000, 1_000_000])
def test_a_text_that_needs_too_much_memory_is_refused_before_the_model_reads_it(backbone, length):
    words = "ab " * (length // 3)
    for text in ("x" * length, words):
        with pytest.raises(UserError, match=r"a prompt has [\d,]+ tokens, more than the limit of 2,048: '.{60}'…"):
            backbone.text.encode([PromptedQuestion(text, "a", ())], whole_prompts=True)
        (encoded,) = backbone.text.encode([PromptedQuestion(text, "a", ())])
        assert (encoded.evaluation_prompt_is_cut, len(encoded.evaluation_prompt)) == (True, MAX_TOKENS)
    (encoded,) = backbone.text.encode([PromptedQuestion("What?", words, (words, "b"))])
    assert (encoded.target_is_cut, encoded.cut_candidates) == (True, 1)
    assert max(map(len, [encoded.target, *encoded.candidates])) <= backbone.text.max_target
    backbone.text.max_target = 10 * MAX_TOKENS
    with pytest.raises(UserError, match=r"an? (answer|choice) has [\d,]+ tokens"):
        backbone.text.encode([PromptedQuestion("What?", words, (words, "b"))])


def test_a_very_long_prompt_loses_its_beginning_and_keeps_its_special_token(backbone):
    short, long = (PromptedQuestion("ab " * count + "Which?", "a", ()) for count in (20, 3 * MAX_TOKENS))
    whole, cut = backbone.text.encode([short, long])
    assert (whole.evaluation_prompt_is_cut, cut.evaluation_prompt_is_cut, len(cut.evaluation_prompt)) == (
        False,
        True,
        MAX_TOKENS,
    )
    special = -1 if backbone.text.family == "t5" else 0
    assert cut.evaluation_prompt[-8:] == whole.evaluation_prompt[-8:]
    assert cut.evaluation_prompt[special] == whole.evaluation_prompt[special], "T5's end token, Vicuna's start token"
    assert cut.training_prompt[-8:] == whole.evaluation_prompt[-8:]
    split = EncodedSplit([Question("1", Path(), "q", "a")] * 2, [short, long], [whole, cut])
    counts = text_warnings.count_texts(split)
    assert counts["very_long_prompts"] == 1
    sentences = text_warnings.describe_reading(counts, 128, 256, "vqa-v1")
    assert "1 of 2 prompts are longer than 2048 tokens and lose their beginning in evaluation too" in sentences


@pytest.fixture
def long_data(iconqa: Path, tmp_path: Path) -> Path:
    """The small IconQA; of its training questions, three are too long and one has two equal choices."""
    folder = tmp_path / "data"
    for source in iconqa.rglob("image.png"):
        target = folder / source.relative_to(iconqa)
        target.parent.mkdir(parents=True)
        target.write_bytes(source.read_bytes())
    (folder / "annotations").mkdir()
    for file in (iconqa / "annotations").iterdir():
        entries = json.loads(file.read_text())
        if file.stem == "train":
            for entry in entries[:3]:
                entry["question"] = "Look at the picture and think. " * 60 + entry["question"]
            entries[4]["choices"] = ["red", *entries[4]["choices"][1:-1], "red"]
        (folder / "annotations" / file.name).write_text(json.dumps(entries))
    return folder


def test_training_says_what_it_cuts_and_the_result_records_it(small, family, long_data, tmp_path):
    recipe = Recipe.model_validate(
        {
            "experiment": "cut",
            "model": {"name": str(small[family])},
            "data": {"name": "iconqa", "prompt": "iconqa-v1", "images": "off"},
            "adapter": {"qformer": ["ffn"], "rank": 1},
            "training": TrainingConfig(batch_size=4, max_epochs=1).model_dump(),
        }
    )
    starts: list[events.TrainingStarted] = []

    def listen(event: events.Event) -> None:
        if isinstance(event, events.TrainingStarted):
            starts.append(event)

    (run,) = loop.train([recipe], long_data, tmp_path / "results", device="cpu", listener=listen)
    assert isinstance(run, Run)
    (start,) = starts
    assert start.notes[0] == "3 of 12 prompts are longer than 128 tokens and lose their beginning in training"
    assert "train: 3 of 12 prompts are longer than 128 tokens of the Q-Former" in start.notes[1]
    assert start.notes[2].startswith("train: 1 of 12 questions have two equal choices")
    assert len(start.notes) == 3
    texts = run.result()["texts"]
    assert (texts["max_text_tokens"], texts["max_target_tokens"]) == (128, 256)
    assert (texts["train"]["cut_prompts"], texts["train"]["equal_choices"], texts["val"]["cut_prompts"]) == (3, 1, 0)
