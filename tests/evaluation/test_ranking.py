"""Ranking chooses the likeliest candidate: checked where the best answer is known."""

import math
import random
from itertools import pairwise

import pytest
import torch

import reference
from blipfit.adapters.bank import Bank
from blipfit.data.prompts import Prompted
from blipfit.data.question import Question
from blipfit.evaluation import ranking
from blipfit.evaluation.ranking import Choice
from blipfit.recipe import AdapterConfig


def _rank(backbone, encoded, pixels, batch_size):
    return ranking.rank(backbone, encoded, lambda rows: backbone.see(pixels[list(rows)]), batch_size)


def test_what_a_model_would_say_itself_ranks_first(backbone):
    """Greedy tokens are the likeliest, so a candidate made of one beats all others; a flipped sign would lose it."""
    encoded, pixels = reference.ask(backbone, 4), reference.pictures(backbone, 4)
    batch = backbone.text.prompts(encoded)
    said = backbone.generate(backbone.query(backbone.see(pixels), batch), batch, max_new_tokens=1, do_sample=False)
    for row, e in enumerate(encoded):
        best = int(said[row, -1])
        e.candidates[:] = [[token] for token in (3, 7, best, 11, 30)]
    (choices,) = _rank(backbone, encoded, pixels, 4)
    assert [choice.best for choice in choices] == [2, 2, 2, 2]
    assert all(s < 0 for choice in choices for s in choice.sums)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_answers_come_in_the_order_of_the_questions(backbone, batch_size):
    """Batches are made by length; the result does not show it."""
    encoded, pixels = reference.ask(backbone, 5), reference.pictures(backbone, 5)
    (choices,) = _rank(backbone, encoded, pixels, batch_size)
    lengths = [[len(candidate) for candidate in e.candidates] for e in encoded]
    assert [list(choice.lengths) for choice in choices] == lengths
    for i, choice in enumerate(choices):
        ((alone,),) = _rank(backbone, encoded[i : i + 1], pixels[i : i + 1], 1)
        assert choice.sums == pytest.approx(alone.sums, abs=1e-4)


def test_every_experiment_of_a_bank_is_judged(backbone):
    encoded, pixels = reference.ask(backbone, 3), reference.pictures(backbone, 3)
    base = _rank(backbone, encoded, pixels, 2)
    bank = Bank(backbone, [AdapterConfig(qformer=("ffn",), rank=1)] * 2, [0, 1])
    bank.tensor(1, "language_projection.bias").add_(1.0)
    judged = _rank(backbone, encoded, pixels, 2)
    assert len(judged) == 2
    for row in range(3):
        assert judged[0][row].sums == pytest.approx(base[0][row].sums, abs=1e-4)
        assert judged[1][row].sums != pytest.approx(base[0][row].sums, abs=1e-2)


def test_sum_decides_and_the_mean_stands_beside_it():
    choice = Choice(sums=(-4.0, -3.0, -9.0), lengths=(4, 2, 9))
    assert (choice.best, choice.best_by_mean) == (1, 0)
    assert choice.means == (-1.0, -1.5, -1.0)
    assert Choice((-1.0, -1.0), (1, 1)).best == 0  # the first of equals, as with argmin


def test_a_score_that_is_no_number_is_seen():
    assert Choice((-1.0, -2.0), (1, 1)).finite
    assert not Choice((-1.0, math.nan), (1, 1)).finite
    assert not Choice((-math.inf, -1.0), (1, 1)).finite


QUESTIONS = [
    Question("q1", None, "?", "y", ("x", "y"), 1),  # type: ignore[arg-type]
    Question("q2", None, "?", "x", ("x", "y", "z", "w"), 0),  # type: ignore[arg-type]
]
PROMPTED = [Prompted("?", "(b) y", ("(a) x", "(b) y")), Prompted("?", "(a) x", ("(a) x", "(b) y", "(c) z", "(d) w"))]
CHOICES = [Choice((-5.0, -3.0), (2, 1)), Choice((-4.0, -3.0, -8.0, -9.0), (4, 2, 2, 2))]


def test_predictions_are_records():
    first, second = ranking.predictions(QUESTIONS, PROMPTED, CHOICES)
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


def test_right_is_equal_to_the_letter():
    written = [Prompted("?", "(a) X", ("(a) x", "(a) X"))]
    (record,) = ranking.predictions(QUESTIONS[:1], written, [Choice((-1.0, -2.0), (1, 1))])
    assert not record["correct"]


def test_summary():
    summary = ranking.summarize(QUESTIONS, ranking.predictions(QUESTIONS, PROMPTED, CHOICES))
    assert (summary["method"], summary["accuracy"], summary["right"], summary["questions"]) == ("ranking", 50.0, 1, 2)
    assert summary["accuracy_by_mean"] == 50.0
    assert summary["chance"] == 37.5
    assert summary["interval"][0] < 50 < summary["interval"][1]
    assert {n: part["accuracy"] for n, part in summary["by"]["choices"].items()} == {"2": 100.0, "4": 0.0}


def test_the_scores_are_of_the_log_softmax(backbone):
    """All one-token candidates of the vocabulary together have probability one."""
    (e,), pixels = reference.ask(backbone, 1), reference.pictures(backbone, 1)
    e.candidates[:] = [[token] for token in range(backbone.hf.config.text_config.vocab_size)]
    ((choice,),) = _rank(backbone, [e], pixels, 1)
    assert torch.tensor(choice.sums, dtype=torch.float64).exp().sum().item() == pytest.approx(1, abs=1e-4)


# -------------------------------------------------------- size of a batch


def _random_counts(seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.choice((1, 2, 4, 5, 40)) for _ in range(rng.randrange(30))]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("batch_size", "most"), [(1, 100), (4, 8), (16, 16), (16, 3), (100, 1), (3, 1000)])
def test_batches_hold_few_candidates(seed, batch_size, most):
    counts = _random_counts(seed)
    order = random.Random(seed).sample(range(len(counts)), len(counts))
    batches = ranking._batches(order, counts, batch_size, most)
    assert [i for batch in batches for i in batch] == order
    for batch in batches:
        assert 1 <= len(batch) <= batch_size
        assert sum(counts[i] for i in batch) <= most or len(batch) == 1
    # No batch could have taken the next question too.
    for batch, following in pairwise(batches):
        assert len(batch) == batch_size or sum(counts[i] for i in [*batch, following[0]]) > most


def test_few_candidates_are_cut_by_questions_alone():
    assert ranking._batches(range(7), [2] * 7, 3, 512) == [[0, 1, 2], [3, 4, 5], [6]]
    assert ranking._batches([], [], 3, 512) == []


@pytest.mark.parametrize("most", [1, 7, 12, 1000])
def test_a_large_bank_ranks_fewer_questions_at_once(backbone, monkeypatch, most):
    """The limit is of the candidates of all experiments; what is judged does not show it."""
    bank_size, questions = 3, 7
    encoded, pixels = reference.ask(backbone, questions), reference.pictures(backbone, questions)
    bank = Bank(backbone, [AdapterConfig(qformer=("ffn",), rank=1)] * bank_size, [0, 1, 2])
    bank.tensor(1, "language_projection.bias").add_(1.0)
    expected = _rank(backbone, encoded, pixels, questions)
    batches, advances = [], []
    original = backbone.score

    def score(visual, batch):
        batches.append(batch)
        return original(visual, batch)

    monkeypatch.setattr(ranking, "MOST_ROWS", most)
    monkeypatch.setattr(backbone, "score", score)
    judged = ranking.rank(
        backbone, encoded, lambda rows: backbone.see(pixels[list(rows)]), questions, advance=advances.append
    )
    for batch in batches:
        assert bank_size * len(batch.question_M) <= most or len(batch.text_ids_BT) == 1
    assert (len(batches) == 1) == (most == 1000)
    assert sum(advances) == sum(len(batch.text_ids_BT) for batch in batches) == questions
    assert [len(choices) for choices in judged] == [questions] * bank_size
    for choices, expected_choices in zip(judged, expected, strict=True):
        for choice, expected_choice in zip(choices, expected_choices, strict=True):
            assert choice.sums == pytest.approx(expected_choice.sums, abs=1e-4)
            assert choice.lengths == expected_choice.lengths
