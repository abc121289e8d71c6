"""Ranking predicts the likeliest candidate; checked where the likeliest one is known."""

import math
import random
from itertools import pairwise

import pytest
import torch

import reference
from blipfit.adapters.bank import Bank
from blipfit.data.prompts import PromptedQuestion
from blipfit.data.question import Question
from blipfit.errors import UserError
from blipfit.evaluation import ranking
from blipfit.evaluation.ranking import QuestionScores
from blipfit.recipe import AdapterConfig


def _rank(backbone, encoded, pixels, batch_size):
    return ranking.rank(backbone, encoded, lambda indices: backbone.see(pixels[list(indices)]), batch_size)


def test_the_greedy_token_ranks_first(backbone):
    """The greedy token is the likeliest, so it ranks first; with a flipped sign it would be last."""
    encoded, pixels = reference.ask(backbone, 4), reference.pictures(backbone, 4)
    batch = backbone.text.prompts(encoded)
    ids = backbone.generate(backbone.query(backbone.see(pixels), batch), batch, max_new_tokens=1, do_sample=False)
    for row, e in enumerate(encoded):
        best = int(ids[row, -1])
        e.candidates[:] = [[token] for token in (3, 7, best, 11, 30)]
    (ranked,) = _rank(backbone, encoded, pixels, 4)
    assert [scores.best for scores in ranked] == [2, 2, 2, 2]
    assert all(s < 0 for scores in ranked for s in scores.sums)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_results_are_in_the_order_of_the_questions(backbone, batch_size):
    """Batches are sorted by length; the results are not."""
    encoded, pixels = reference.ask(backbone, 5), reference.pictures(backbone, 5)
    (ranked,) = _rank(backbone, encoded, pixels, batch_size)
    lengths = [[len(candidate) for candidate in e.candidates] for e in encoded]
    assert [list(scores.lengths) for scores in ranked] == lengths
    for i, scores in enumerate(ranked):
        ((alone,),) = _rank(backbone, encoded[i : i + 1], pixels[i : i + 1], 1)
        assert scores.sums == pytest.approx(alone.sums, abs=1e-4)


def test_every_experiment_of_a_bank_is_ranked_with_its_own_adapter(backbone):
    encoded, pixels = reference.ask(backbone, 3), reference.pictures(backbone, 3)
    base = _rank(backbone, encoded, pixels, 2)
    bank = Bank(backbone, [AdapterConfig(qformer=("ffn",), rank=1)] * 2, [0, 1])
    bank.tensor(1, "language_projection.bias").add_(1.0)
    ranked = _rank(backbone, encoded, pixels, 2)
    assert len(ranked) == 2
    for row in range(3):
        assert ranked[0][row].sums == pytest.approx(base[0][row].sums, abs=1e-4)
        assert ranked[1][row].sums != pytest.approx(base[0][row].sums, abs=1e-2)


def test_the_best_candidate_is_by_sum_and_best_by_mean_beside_it():
    scores = QuestionScores(sums=(-4.0, -3.0, -9.0), lengths=(4, 2, 9))
    assert (scores.best, scores.best_by_mean) == (1, 0)
    assert scores.means == (-1.0, -1.5, -1.0)
    assert QuestionScores((-1.0, -1.0), (1, 1)).best == 0  # the first of equals, as with argmin


def test_scores_that_are_not_finite_are_detected():
    assert QuestionScores((-1.0, -2.0), (1, 1)).finite
    assert not QuestionScores((-1.0, math.nan), (1, 1)).finite
    assert not QuestionScores((-math.inf, -1.0), (1, 1)).finite


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_an_error_with_the_questions_id(value):
    ranked = [QuestionScores((-1.0, -2.0), (1, 1)), QuestionScores((-1.0, value, -2.0, -1.0), (1, 1, 1, 1))]
    assert ranking.find_non_finite(QUESTIONS, SCORES) is None
    ranking.require_finite(QUESTIONS, SCORES)
    assert ranking.find_non_finite(QUESTIONS, ranked) == "q2"
    with pytest.raises(UserError, match=r"question q2: the model's score is NaN or infinite; check the weights"):
        ranking.require_finite(QUESTIONS, ranked)


QUESTIONS = [
    Question("q1", None, "?", "y", ("x", "y"), 1),  # type: ignore[arg-type]
    Question("q2", None, "?", "x", ("x", "y", "z", "w"), 0),  # type: ignore[arg-type]
]
PROMPTED = [
    PromptedQuestion("?", "(b) y", ("(a) x", "(b) y")),
    PromptedQuestion("?", "(a) x", ("(a) x", "(b) y", "(c) z", "(d) w")),
]
SCORES = [QuestionScores((-5.0, -3.0), (2, 1)), QuestionScores((-4.0, -3.0, -8.0, -9.0), (4, 2, 2, 2))]


def test_prediction_records_have_all_candidates():
    first, second = ranking.prediction_records(QUESTIONS, PROMPTED, SCORES)
    assert first == {
        "id": "q1",
        "prediction": "(b) y",
        "prediction_by_mean": "(a) x",
        "answer": "(b) y",
        "correct": True,
        "candidates": [
            {"text": "(a) x", "sum": -5.0, "mean": -2.5, "tokens": 2},
            {"text": "(b) y", "sum": -3.0, "mean": -3.0, "tokens": 1},
        ],
    }
    assert (second["prediction"], second["prediction_by_mean"], second["correct"]) == ("(b) y", "(a) x", False)


def test_correct_means_equal_in_upper_and_lower_case():
    prompted = [PromptedQuestion("?", "(a) X", ("(a) x", "(a) X"))]
    (record,) = ranking.prediction_records(QUESTIONS[:1], prompted, [QuestionScores((-1.0, -2.0), (1, 1))])
    assert not record["correct"]


def test_the_summary_has_accuracy_chance_and_groups():
    summary = ranking.summarize(QUESTIONS, ranking.prediction_records(QUESTIONS, PROMPTED, SCORES))
    assert (summary["method"], summary["accuracy"], summary["right"], summary["questions"]) == ("ranking", 50.0, 1, 2)
    assert summary["accuracy_by_mean"] == 50.0
    assert summary["chance"] == 37.5
    assert summary["interval"][0] < 50 < summary["interval"][1]
    assert {n: group["accuracy"] for n, group in summary["by"]["choices"].items()} == {"2": 100.0, "4": 0.0}


def test_the_scores_are_log_probabilities(backbone):
    """All one-token candidates of the vocabulary together have probability one."""
    (e,), pixels = reference.ask(backbone, 1), reference.pictures(backbone, 1)
    e.candidates[:] = [[token] for token in range(backbone.hf.config.text_config.vocab_size)]
    ((scores,),) = _rank(backbone, [e], pixels, 1)
    assert torch.tensor(scores.sums, dtype=torch.float64).exp().sum().item() == pytest.approx(1, abs=1e-4)


def _random_counts(seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.choice((1, 2, 4, 5, 40)) for _ in range(rng.randrange(30))]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("batch_size", "max_candidates"), [(1, 100), (4, 8), (16, 16), (16, 3), (100, 1), (3, 1000)])
def test_batches_have_at_most_the_maximum_of_questions_and_candidates(seed, batch_size, max_candidates):
    counts = _random_counts(seed)
    order = random.Random(seed).sample(range(len(counts)), len(counts))
    batches = ranking._batches(order, counts, batch_size, max_candidates)
    assert [i for batch in batches for i in batch] == order
    for batch in batches:
        assert 1 <= len(batch) <= batch_size
        assert sum(counts[i] for i in batch) <= max_candidates or len(batch) == 1
    # No batch could have taken the next question too.
    for batch, following in pairwise(batches):
        assert len(batch) == batch_size or sum(counts[i] for i in [*batch, following[0]]) > max_candidates


def test_with_few_candidates_the_number_of_questions_limits_a_batch():
    assert ranking._batches(range(7), [2] * 7, 3, 512) == [[0, 1, 2], [3, 4, 5], [6]]
    assert ranking._batches([], [], 3, 512) == []


@pytest.mark.parametrize("max_candidates", [1, 7, 12, 1000])
def test_a_large_bank_ranks_fewer_questions_at_once(backbone, monkeypatch, max_candidates):
    """The limit counts the candidates of all experiments; the scores do not depend on it."""
    bank_size, questions = 3, 7
    encoded, pixels = reference.ask(backbone, questions), reference.pictures(backbone, questions)
    bank = Bank(backbone, [AdapterConfig(qformer=("ffn",), rank=1)] * bank_size, [0, 1, 2])
    bank.tensor(1, "language_projection.bias").add_(1.0)
    expected = _rank(backbone, encoded, pixels, questions)
    batches, advances = [], []
    original = backbone.score_candidates

    def score(visual, batch):
        batches.append(batch)
        return original(visual, batch)

    monkeypatch.setattr(ranking, "MAX_ROWS", max_candidates)
    monkeypatch.setattr(backbone, "score_candidates", score)
    ranked = ranking.rank(
        backbone, encoded, lambda indices: backbone.see(pixels[list(indices)]), questions, advance=advances.append
    )
    for batch in batches:
        assert bank_size * len(batch.question_M) <= max_candidates or len(batch.text_ids_BT) == 1
    assert (len(batches) == 1) == (max_candidates == 1000)
    assert sum(advances) == sum(len(batch.text_ids_BT) for batch in batches) == questions
    assert [len(scores) for scores in ranked] == [questions] * bank_size
    for experiment, expected_experiment in zip(ranked, expected, strict=True):
        for scores, expected_scores in zip(experiment, expected_experiment, strict=True):
            assert scores.sums == pytest.approx(expected_scores.sums, abs=1e-4)
            assert scores.lengths == expected_scores.lengths
