"""ROUGE against Google's scorer and by hand, exact match, and the coverage of bootstrap intervals."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer

from blipfit.evaluation import bootstrap, text_metrics

ROWS = Path(__file__).parents[2].parent / "shared" / "data" / "vl_rewardbench" / "test_text_only.jsonl"


def random_texts(count: int) -> list[tuple[str, str]]:
    generator = random.Random(8)
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
    return [
        tuple(" ".join(generator.choices(words, k=generator.randrange(12))) for _ in range(2)) for _ in range(count)
    ]


@pytest.mark.parametrize("stemmer", [False, True])
def test_equals_googles_scorer(stemmer: bool):
    pairs = random_texts(300)
    if ROWS.is_file():
        pairs += [tuple(json.loads(line)["response"]) for line in ROWS.read_text().splitlines()[:100]]
    values = text_metrics.rouge([p for p, _ in pairs], [r for _, r in pairs], stemmer)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=stemmer)
    for name, metric_values in values.items():
        expected = [scorer.score(target=r, prediction=p)[name].fmeasure for p, r in pairs]
        np.testing.assert_allclose(metric_values, expected, rtol=0, atol=1e-12)


def test_rouge_calculated_by_hand():
    values = text_metrics.rouge(["the red stars", "a b c d", "", "x"], ["the red star", "a c b d e", "x", "y"])
    # Unigrams 2 of 3 and 2 of 3; then 4 of 4 and 4 of 5.
    np.testing.assert_allclose(values["rouge1"], [2 / 3, 8 / 9, 0, 0], atol=1e-12)
    np.testing.assert_allclose(values["rouge2"], [1 / 2, 0, 0, 0], atol=1e-12)
    # Longest common subsequence of the second: a b d or a c d.
    np.testing.assert_allclose(values["rougeL"], [2 / 3, 6 / 9, 0, 0], atol=1e-12)
    assert text_metrics.rouge(["the red stars"], ["the red star"], stemmer=True)["rouge1"] == 1


@pytest.mark.parametrize(
    ("sample", "kind"),
    [
        ("a red star", "read"),
        ("Красная звезда", "unread"),
        ("红色的星", "unread"),
        ("नमस्ते", "unread"),
        ("نجمة حمراء!", "unread"),
        ("٣", "unread"),
        ("Łódź", "partly_read"),
        ("naïve", "partly_read"),
        ("звезда 3", "partly_read"),
        ("", "empty"),
        (" …!\n", "empty"),
        ("🙂", "empty"),
    ],
)
def test_texts_that_rouge_cannot_read_are_counted(sample: str, kind: str):
    expected = {"unread": 0, "partly_read": 0, "empty": 0} | ({kind: 1} if kind != "read" else {})
    assert text_metrics.count_unread([sample]) == {"texts": 1, **expected}
    if kind in ("unread", "empty"):  # the answer is right, and ROUGE is 0
        assert text_metrics.rouge([sample], [sample])["rouge1"] == 0
    else:
        assert text_metrics.rouge([sample], [sample])["rouge1"] == 1


def test_what_rouge_cannot_read_is_said():
    record = text_metrics.score_texts(["звезда", "star", "star", "é à"], ["звезда", "звезда", "star", "naïve"])
    assert record["rouge_unread"] == {
        "references": {"texts": 4, "unread": 2, "partly_read": 1, "empty": 0},
        "predictions": {"texts": 4, "unread": 2, "partly_read": 0, "empty": 0},
    }
    sentences = text_metrics.describe_unread(record["rouge_unread"])
    assert sentences[0].startswith("ROUGE cannot read 2 of 4 references: its tokenizer keeps only a–z and 0–9")
    assert sentences[1] == "ROUGE cannot read letters other than a–z and 0–9 in 1 of 4 references"
    assert len(sentences) == 3
    assert text_metrics.describe_unread(text_metrics.score_texts(["a"], ["b"])["rouge_unread"]) == []


def test_exact_match():
    predictions, references = ["(b) The  Red star!", "red star", "a", ""], ["b red star", "Red star", "an", ""]
    assert text_metrics.exact_match(predictions, references).tolist() == [1, 1, 1, 1]
    assert text_metrics.exact_match(predictions, references, strict=True).tolist() == [0, 0, 0, 1]
    assert text_metrics.normalize("The theatre, an act: (a)") == "theatre act"


def test_texts_without_references_are_an_error():
    with pytest.raises(ValueError, match="shorter"):
        text_metrics.rouge(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="shorter"):
        text_metrics.exact_match(["a", "b"], ["a"])


def test_score_texts_returns_means_and_the_values_of_each_sample():
    record = text_metrics.score_texts(["a red star", "blue"], ["a red star", "green"], stemmer=True)
    assert record["stemmer"] is True
    assert record["samples"]["rougeL"] == [1, 0]
    assert record["metrics"]["exact"] == {"mean": 0.5, "interval": [0, 1], "samples": 2}
    assert set(record["metrics"]) == {"rouge1", "rouge2", "rougeL", "exact", "exact_strict"}
    json.dumps(record, allow_nan=False)


def test_the_interval_equals_that_of_the_normal_distribution_for_many_values():
    values = np.random.default_rng(1).normal(0.4, 0.2, 2000)
    result = bootstrap.mean(values)
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert result["mean"] == pytest.approx(values.mean())
    assert result["interval"] == pytest.approx([values.mean() - half, values.mean() + half], abs=5e-4)
    narrow = bootstrap.mean(values, level=0.5)["interval"]
    assert narrow[1] - narrow[0] == pytest.approx(2 * 0.6745 * half / 1.96, rel=0.05)


def test_intervals_cover_the_true_mean_in_about_95_percent_of_trials():
    generator = np.random.default_rng(5)
    covered = 0
    for trial in range(300):
        low, high = bootstrap.mean(generator.random(60) < 0.3, seed=trial, resamples=400)["interval"]
        covered += low <= 0.3 <= high
    assert 0.89 <= covered / 300 <= 0.98


def test_the_same_seed_gives_the_same_interval_with_any_block_size(monkeypatch: pytest.MonkeyPatch):
    values = np.random.default_rng(2).random(50)
    result = bootstrap.mean(values, seed=3, resamples=999)
    assert result == bootstrap.mean(values.tolist(), seed=3, resamples=999)
    assert result["interval"] != bootstrap.mean(values, seed=4, resamples=999)["interval"]
    low, high = result["interval"]
    assert low < result["mean"] < high
    monkeypatch.setattr(bootstrap, "_BLOCK", 700)  # 14 resamples at once instead of all
    assert result == bootstrap.mean(values, seed=3, resamples=999)


def test_pairing_removes_the_difficulty_of_samples():
    generator = np.random.default_rng(6)
    difficulty = generator.random(400)
    base, tuned = difficulty + generator.normal(0, 0.01, 400), difficulty + 0.02 + generator.normal(0, 0.01, 400)
    result = bootstrap.difference(base, tuned)
    assert result["difference"] == pytest.approx(0.02, abs=0.002)
    assert result["interval"][0] > 0.015
    assert result["interval"][1] < 0.025
    assert result["interval"] == pytest.approx(bootstrap.mean(tuned - base)["interval"], abs=1e-9)
    # Without pairing the interval is many times as wide.
    shuffled = bootstrap.difference(base, generator.permutation(tuned))["interval"]
    assert shuffled[1] - shuffled[0] > 10 * (result["interval"][1] - result["interval"][0])
    assert bootstrap.difference(tuned, base)["difference"] == -result["difference"]


def test_ratio_of_means():
    generator = np.random.default_rng(7)
    base = generator.random(300)
    result = bootstrap.ratio(base, 0.9 * base)
    assert result["ratio"] == pytest.approx(0.9)
    assert result["interval"] == pytest.approx([0.9, 0.9])
    noisy = bootstrap.ratio(base, 0.9 * base + generator.normal(0, 0.1, 300))
    assert noisy["interval"][0] < noisy["ratio"] < noisy["interval"][1]


def test_undefined_values_are_none_and_never_nan():
    assert bootstrap.mean([]) == {"mean": None, "interval": None, "samples": 0}
    assert bootstrap.difference([], []) == {"difference": None, "interval": None, "samples": 0}
    assert bootstrap.ratio([], []) == bootstrap.ratio([0.0, 0.0], [1.0, 0.0]) | {"samples": 0}
    # With one right sample of four many resamples of the base have a mean of 0, so their ratio is infinite.
    result = bootstrap.ratio([1, 0, 0, 0], [1, 1, 1, 1])
    assert result["ratio"] == 4
    assert result["interval"][1] is None
    assert result["interval"][0] is not None
    # Resamples with 0 / 0 are left out; all others have a ratio of 1.
    assert bootstrap.ratio([1, 0, 0, 0], [1, 0, 0, 0])["interval"] == [1, 1]
    json.dumps(result, allow_nan=False)
    with pytest.raises(AssertionError, match="paired"):
        bootstrap.difference([1, 2], [1])
