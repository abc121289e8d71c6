"""ROUGE against Google's own scorer and by hand, exact match, and bootstrap intervals that hold what they promise."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer

from blipfit.evaluation import text

ROWS = Path(__file__).parents[2].parent / "shared" / "data" / "vl_rewardbench" / "test_text_only.jsonl"


def random_texts(count: int) -> list[tuple[str, str]]:
    draw = random.Random(8)
    words = [
        "a",
        "star",
        "Stars",
        "red",
        "running",
        "runs",
        "the",
        "circle,",
        "(b)",
        "3",
        "naïve",
        "\n",
        "",
        "звезда",
        ".",
    ]
    return [tuple(" ".join(draw.choices(words, k=draw.randrange(12))) for _ in range(2)) for _ in range(count)]


@pytest.mark.parametrize("stemmer", [False, True])
def test_equals_googles_scorer(stemmer: bool):
    pairs = random_texts(300)
    if ROWS.is_file():
        pairs += [tuple(json.loads(line)["response"]) for line in ROWS.read_text().splitlines()[:100]]
    found = text.rouge([p for p, _ in pairs], [r for _, r in pairs], stemmer)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=stemmer)
    for name, values in found.items():
        expected = [scorer.score(target=r, prediction=p)[name].fmeasure for p, r in pairs]
        np.testing.assert_allclose(values, expected, rtol=0, atol=1e-12)


def test_rouge_by_hand():
    found = text.rouge(["the red stars", "a b c d", "", "x"], ["the red star", "a c b d e", "x", "y"])
    # Unigrams 2 of 3 and 2 of 3; then 4 of 4 and 4 of 5.
    np.testing.assert_allclose(found["rouge1"], [2 / 3, 8 / 9, 0, 0], atol=1e-12)
    np.testing.assert_allclose(found["rouge2"], [1 / 2, 0, 0, 0], atol=1e-12)
    # Longest common subsequence of the second: a b d or a c d.
    np.testing.assert_allclose(found["rougeL"], [2 / 3, 6 / 9, 0, 0], atol=1e-12)
    assert text.rouge(["the red stars"], ["the red star"], stemmer=True)["rouge1"] == 1


def test_exact_match():
    said, wanted = ["(b) The  Red star!", "red star", "a", ""], ["b red star", "Red star", "an", ""]
    assert text.exact_match(said, wanted).tolist() == [1, 1, 1, 1]
    assert text.exact_match(said, wanted, strict=True).tolist() == [0, 0, 0, 1]
    assert text.normalized("The theatre, an act: (a)") == "theatre act"


def test_texts_without_their_references_are_a_defect():
    with pytest.raises(ValueError, match="shorter"):
        text.rouge(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="shorter"):
        text.exact_match(["a", "b"], ["a"])


def test_everything_at_once_keeps_each_sample():
    record = text.judge(["a red star", "blue"], ["a red star", "green"], stemmer=True)
    assert record["stemmer"] is True
    assert record["samples"]["rougeL"] == [1, 0]
    assert record["metrics"]["exact"] == {"mean": 0.5, "interval": [0, 1], "samples": 2}
    assert set(record["metrics"]) == {"rouge1", "rouge2", "rougeL", "exact", "exact_strict"}
    json.dumps(record, allow_nan=False)


def test_interval_is_that_of_the_normal_distribution_where_it_applies():
    values = np.random.default_rng(1).normal(0.4, 0.2, 2000)
    told = text.mean(values)
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert told["mean"] == pytest.approx(values.mean())
    assert told["interval"] == pytest.approx([values.mean() - half, values.mean() + half], abs=5e-4)
    narrow = text.mean(values, level=0.5)["interval"]
    assert narrow[1] - narrow[0] == pytest.approx(2 * 0.6745 * half / 1.96, rel=0.05)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    draws = np.random.default_rng(5)
    covered = 0
    for trial in range(300):
        low, high = text.mean(draws.random(60) < 0.3, seed=trial, resamples=400)["interval"]
        covered += low <= 0.3 <= high
    assert 0.89 <= covered / 300 <= 0.98


def test_same_seed_same_interval_and_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch):
    values = np.random.default_rng(2).random(50)
    told = text.mean(values, seed=3, resamples=999)
    assert told == text.mean(values.tolist(), seed=3, resamples=999)
    assert told["interval"] != text.mean(values, seed=4, resamples=999)["interval"]
    low, high = told["interval"]
    assert low < told["mean"] < high
    monkeypatch.setattr(text, "_BLOCK", 700)  # 14 resamples at once instead of all
    assert told == text.mean(values, seed=3, resamples=999)


def test_pairing_removes_what_both_share():
    draws = np.random.default_rng(6)
    easy = draws.random(400)
    base, tuned = easy + draws.normal(0, 0.01, 400), easy + 0.02 + draws.normal(0, 0.01, 400)
    told = text.difference(base, tuned)
    assert told["difference"] == pytest.approx(0.02, abs=0.002)
    assert told["interval"][0] > 0.015
    assert told["interval"][1] < 0.025
    assert told["interval"] == pytest.approx(text.mean(tuned - base)["interval"], abs=1e-9)
    # Were they not paired, the interval would be many times as wide.
    shuffled = text.difference(base, draws.permutation(tuned))["interval"]
    assert shuffled[1] - shuffled[0] > 10 * (told["interval"][1] - told["interval"][0])
    assert text.difference(tuned, base)["difference"] == -told["difference"]


def test_ratio_of_means():
    draws = np.random.default_rng(7)
    base = draws.random(300)
    told = text.ratio(base, 0.9 * base)
    assert told["ratio"] == pytest.approx(0.9)
    assert told["interval"] == pytest.approx([0.9, 0.9])
    noisy = text.ratio(base, 0.9 * base + draws.normal(0, 0.1, 300))
    assert noisy["interval"][0] < noisy["ratio"] < noisy["interval"][1]


def test_what_has_no_value_is_none_and_not_a_number_of_json():
    assert text.mean([]) == {"mean": None, "interval": None, "samples": 0}
    assert text.difference([], []) == {"difference": None, "interval": None, "samples": 0}
    assert text.ratio([], []) == text.ratio([0.0, 0.0], [1.0, 0.0]) | {"samples": 0}
    # A base that is right once in four: many resamples have none, and their ratio is infinite.
    told = text.ratio([1, 0, 0, 0], [1, 1, 1, 1])
    assert told["ratio"] == 4
    assert told["interval"][1] is None
    assert told["interval"][0] is not None
    # 0 / 0 says nothing: what is left is 1 everywhere.
    assert text.ratio([1, 0, 0, 0], [1, 0, 0, 0])["interval"] == [1, 1]
    json.dumps(told, allow_nan=False)
    with pytest.raises(AssertionError, match="paired"):
        text.difference([1, 2], [1])
