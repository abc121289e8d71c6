"""Open answers are trained by the same loop as choices: the loss selects the epoch, texts are scored at the end."""

import json
import math

import pytest
import torch

import reference
from blipfit.adapters.bank import Bank
from blipfit.commands import evaluate
from blipfit.data.encoded_split import EncodedSplit
from blipfit.data.prompts import PromptedQuestion
from blipfit.data.question import Question
from blipfit.errors import UserError
from blipfit.evaluation import evaluate_split, text_metrics
from blipfit.recipe import AdapterConfig, DataConfig, EvaluationConfig, ModelConfig, Recipe, TrainingConfig
from blipfit.run_folder import read_lines
from blipfit.training import loop

OPEN = EvaluationConfig(method="generation", decoding="short-answer", batch_size=3)


@pytest.fixture
def encoded_split(backbone, tmp_path):
    prompted = [
        PromptedQuestion(f"What {'thing ' * (n % 3)}is number {n}?", "word " * (n % 4) + "red", ()) for n in range(7)
    ]
    questions = [Question(str(n), tmp_path / str(n), p.prompt, p.target) for n, p in enumerate(prompted)]
    return EncodedSplit(questions, prompted, backbone.text.encode(prompted))


def _features_of(backbone, encoded_split):
    features = dict(
        zip((q.id for q in encoded_split.questions), backbone.see(reference.pictures(backbone, 7)), strict=True)
    )
    return lambda questions: torch.stack([features[q.id] for q in questions])


def test_the_loss_equals_that_of_single_answers(backbone, encoded_split):
    get_features = _features_of(backbone, encoded_split)
    (loss,) = evaluate_split.compute_losses(backbone, encoded_split, get_features, 3)
    total = 0.0
    with torch.no_grad():
        for question, encoded in zip(encoded_split.questions, encoded_split.encoded, strict=True):
            batch = backbone.text.targets([encoded])
            total += backbone.losses(backbone.query(get_features([question]), batch), batch).item()
    assert loss == pytest.approx(total / sum(len(e.target) for e in encoded_split.encoded), rel=1e-5)


def test_a_higher_validation_score_means_a_lower_loss(backbone, encoded_split):
    get_features = _features_of(backbone, encoded_split)
    bank = Bank(backbone, [AdapterConfig(qformer=("ffn",), rank=1)] * 3, [0, 0, 0])
    bank.tensor(1, "language_projection.bias").add_(3.0)
    bank.tensor(2, "language_projection.bias").add_(math.nan)
    results = evaluate_split.validate(backbone, encoded_split, get_features, OPEN)
    assert [result.measure for result in results] == ["val_loss"] * 3
    assert results[0].value != results[1].value
    assert (results[0].score > results[1].score) == (results[0].value < results[1].value)
    assert [result.finite for result in results] == [True, True, False]
    assert [result.non_finite_question for result in results] == [None, None, "0"]


def _bank_with_nan(backbone):
    bank = Bank(backbone, [AdapterConfig(qformer=("ffn",), rank=1)] * 2, [0, 0])
    bank.tensor(1, "language_projection.bias").add_(math.nan)
    return bank


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_its_question(backbone, encoded_split, value):
    """Only the image features of question 4 are damaged."""
    original = _features_of(backbone, encoded_split)

    def get_features(questions):
        features = original(questions).clone()
        for row, question in enumerate(questions):
            if question.id == "4":
                features[row] = value
        return features

    (result,) = evaluate_split.validate(backbone, encoded_split, get_features, OPEN)
    assert (result.finite, result.non_finite_question) == (False, "4")
    (evaluation,) = evaluate_split.evaluate_split(backbone, encoded_split, get_features, OPEN)
    assert not evaluation.finite
    with pytest.raises(UserError, match="question 4: the model's score is NaN or infinite"):
        evaluation.require_finite()


def test_a_ranking_that_is_not_finite_names_its_question(backbone, encoded_split):
    prompted = [PromptedQuestion(p.prompt, "(b) y", ("(a) x", "(b) y")) for p in encoded_split.prompted]
    split = EncodedSplit(encoded_split.questions, prompted, backbone.text.encode(prompted))
    _bank_with_nan(backbone)
    config = EvaluationConfig(batch_size=3)
    results = evaluate_split.validate(backbone, split, _features_of(backbone, split), config)
    assert [(result.finite, result.non_finite_question) for result in results] == [(True, None), (False, "0")]
    good, bad = evaluate_split.evaluate_split(backbone, split, _features_of(backbone, split), config)
    good.require_finite()
    assert (good.finite, bad.finite) == (True, False)
    with pytest.raises(UserError, match="question 0: the model's score"):
        bad.require_finite()


def test_generated_texts_are_compared_with_the_reference_answers(backbone, encoded_split):
    get_features = _features_of(backbone, encoded_split)
    (evaluation,) = evaluate_split.evaluate_split(backbone, encoded_split, get_features, OPEN)
    (texts,) = evaluate_split.generate_texts(backbone, encoded_split, get_features, OPEN)
    assert [record["prediction"] for record in evaluation.records] == texts
    rouge = text_metrics.rouge(texts, [p.target for p in encoded_split.prompted])
    assert [record["rougeL"] for record in evaluation.records] == pytest.approx(rouge["rougeL"].tolist(), abs=1e-6)
    metrics = evaluation.metrics
    assert (metrics["method"], metrics["decoding"], metrics["stemmer"]) == ("generation", "short-answer", False)
    assert metrics["texts"]["rougeL"]["mean"] == pytest.approx(rouge["rougeL"].mean())
    assert metrics["questions"] == 7


@pytest.fixture
def open_data(iconqa, tmp_path):
    """Own data without choices, over the pictures of the small IconQA."""
    folder = tmp_path / "own"
    folder.mkdir()
    for split in ("train", "val", "test"):
        images = sorted((iconqa / split).rglob("image.png"))
        lines = [{"image": str(image), "question": "What is it?", "answer": "a red star"} for image in images]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def _recipe(model, **evaluation):
    return Recipe(
        experiment="open",
        model=ModelConfig(name=str(model)),
        data=DataConfig(name="own", prompt="vqa-v1", images="off"),
        adapter=AdapterConfig(qformer=("self_attn", "ffn"), rank=4),
        training=TrainingConfig(batch_size=4, max_epochs=4, learning_rate=0.01, patience=4),
        evaluation=EvaluationConfig(**evaluation),
    )


def test_open_answers_are_trained_by_the_same_loop(small, family, open_data, tmp_path):
    recipe = _recipe(small[family], method="generation", decoding="short-answer")
    (run,) = loop.train([recipe], open_data, tmp_path / "results", device="cpu")
    result = run.result()
    losses = [line["val_loss"] for line in result["history"]]
    assert result["best_epoch"] == 1 + losses.index(min(losses))
    assert losses[-1] < losses[0]
    assert result["metrics"]["val"]["loss"] == pytest.approx(min(losses), rel=1e-4)
    records = read_lines(run.predictions_file)
    assert {"split", "id", "prediction", "answer", "rougeL"} <= records[0].keys()
    assert [record["answer"] for record in records] == ["a red star"] * 11
    again = evaluate.run(run.folder, open_data, "test", "cpu", base=True)
    assert again["tuned"] == result["metrics"]["test"]
    assert again["base"]["loss"] > again["tuned"]["loss"]


def test_open_questions_and_unknown_decodings_are_refused_before_training(small, open_data, tmp_path):
    with pytest.raises(UserError, match=r"has no choices, .* evaluation.method=generation"):
        loop.train([_recipe(small["t5"])], open_data, tmp_path / "results", device="cpu")
    with pytest.raises(UserError, match="unknown decoding 'greed'; did you mean 'greedy'"):
        loop.train([_recipe(small["t5"], method="generation", decoding="greed")], open_data, tmp_path, device="cpu")
    assert not (tmp_path / "results").exists()
