"""Retention: same samples for all models, correction for chance, paired intervals, the Pareto front."""

import json

import numpy as np
import pytest
from PIL import Image

from blipfit import grid
from blipfit.data import icons
from blipfit.errors import UserError
from blipfit.evaluation import ranking, retention_vs_original
from blipfit.evaluation.evaluate_split import build_feature_lookup
from blipfit.evaluation.evaluation_task import Settings, load_task
from blipfit.evaluation.retention_vs_original import SampleScores
from blipfit.model import tiny
from blipfit.model.image_features import ImageFeatures


def random_scores(share: float, count: int, seed: int, chance: float = 0.5) -> SampleScores:
    """Scores of a model that is right on about `share` of the samples."""
    scores = np.random.default_rng(seed).random(count) < share
    return SampleScores([str(i) for i in range(count)], [float(v) for v in scores], [chance] * count)


def to_scores(scores, chance: float = 0.5) -> SampleScores:
    return SampleScores([str(i) for i in range(len(scores))], [float(v) for v in scores], [chance] * len(scores))


def test_retention_calculated_by_hand():
    record = retention_vs_original.compute_retention(to_scores([1] * 8 + [0] * 2), to_scores([1] * 7 + [0] * 3))
    assert (record["accuracy"], record["chance"], record["samples"]) == (70.0, 50.0, 10)
    assert record["raw"]["ratio"] == pytest.approx(7 / 8)
    assert record["difference"]["difference"] == pytest.approx(-0.1)
    assert record["corrected"]["ratio"] is None  # the 95 % interval of 8 of 10 includes chance


def test_chance_is_subtracted_from_both_means():
    base, candidate = random_scores(0.9, 400, 0), random_scores(0.7, 400, 1)
    record = retention_vs_original.compute_retention(base, candidate)
    means = [np.mean(scores.scores) - 0.5 for scores in (base, candidate)]
    assert record["corrected"]["ratio"] == pytest.approx(means[1] / means[0])
    assert record["corrected"]["ratio"] < record["raw"]["ratio"]
    low, high = record["corrected"]["interval"]
    assert low < record["corrected"]["ratio"] < high


def test_equal_scores_give_a_retention_of_1_with_an_interval_of_width_0():
    base = random_scores(0.8, 200, 0, chance=0.25)
    record = retention_vs_original.compute_retention(base, base)
    assert record["corrected"] == {"ratio": 1.0, "interval": [1.0, 1.0], "samples": 200}
    assert not retention_vs_original.may_be_below(record, 1.0)


def test_pairing_narrows_the_interval():
    """The interval is narrower if both models fail on the same samples."""
    base = random_scores(0.7, 300, 0)
    same_failures = [a * b for a, b in zip(base.scores, random_scores(0.95, 300, 1).scores, strict=True)]
    other_failures = np.random.default_rng(2).permutation(same_failures)

    def width(scores):
        low, high = retention_vs_original.compute_retention(base, to_scores(scores))["corrected"]["interval"]
        return high - low

    assert width(same_failures) < 0.7 * width(other_failures)


def test_the_lower_end_of_the_interval_is_compared_with_the_threshold():
    base, candidate = random_scores(0.9, 500, 0, 0.3), random_scores(0.8, 500, 1, 0.3)
    record = retention_vs_original.compute_retention(base, candidate)
    low = record["corrected"]["interval"][0]
    assert not retention_vs_original.may_be_below(record, low - 0.01)
    assert retention_vs_original.may_be_below(record, low + 0.01)
    guess = retention_vs_original.compute_retention(random_scores(0.3, 500, 0, 0.3), candidate)
    assert retention_vs_original.may_be_below(guess, 0.0)  # an original at chance level has no corrected retention


def test_the_pareto_front():
    points = [((0.5, 0.5), 0.9), ((0.3, 0.3), 0.9), ((0.2, 0.4), 0.8), ((0.6, 0.1), 0.7), ((0.1, 0.1), None)]
    assert retention_vs_original.pareto_front(points) == [False, True, True, True, False]
    assert retention_vs_original.pareto_front([((0.5,), 0.8), ((0.5,), 0.8)]) == [True, True]


@pytest.fixture
def data_sets(tmp_path, iconqa):
    """One data set of each kind, by name."""
    icons.write_mme(tmp_path / "mme", 2, seed=5)
    icons.write_preferences(tmp_path / "pairs", 6, seed=5)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    line = json.dumps({"image": "a.png", "question": "What is red?", "answer": "the star"})
    (tmp_path / "test.jsonl").write_text(line + "\n")
    return {"iconqa": iconqa, "mme": tmp_path / "mme", "rewardbench": tmp_path / "pairs", "own": tmp_path}


def test_scores_and_chance_of_every_kind_of_data_set(backbone, data_sets):
    get_features = ImageFeatures.from_backbone(backbone, "off").features
    results = {}
    for name, folder in data_sets.items():
        task = load_task(backbone, name, folder)
        results[name] = retention_vs_original.score_task(backbone, task, get_features, Settings(batch_size=4))
        assert len(results[name].scores) == len(results[name].sample_ids) == len(task.encoded_split)
        assert set(results[name].scores) <= {0.0, 0.5, 1.0} or name == "own"
    assert set(results["iconqa"].chance) <= {1 / 2, 1 / 3, 1 / 4}
    assert set(results["mme"].chance) == set(results["rewardbench"].chance) == {0.5}
    assert results["own"].chance == [0.0]


def test_a_pair_is_right_where_the_preferred_response_is_likelier(backbone, data_sets):
    get_features = ImageFeatures.from_backbone(backbone, "off").features
    task = load_task(backbone, "rewardbench", data_sets["rewardbench"])
    result = retention_vs_original.score_task(backbone, task, get_features, Settings())
    lookup = build_feature_lookup(task.encoded_split, get_features)
    (ranked,) = ranking.rank(backbone, task.encoded_split.encoded, lookup, 1)
    assert result.scores == [float(r.best == pair.best) for r, pair in zip(ranked, task.pairs, strict=True)]


def test_every_model_is_evaluated_on_the_same_samples(small, family, data_sets):
    messages = []
    pairs = [("iconqa", data_sets["iconqa"]), ("mme", data_sets["mme"])]
    results = retention_vs_original.score_models(
        [str(small[family])] * 2, pairs, "cpu", limit=4, announce=messages.append
    )
    assert results[0] == results[1]
    assert {name: len(scores.sample_ids) for name, scores in results[0].items()} == {"iconqa": 4, "mme": 4}
    assert messages[0] == f"{small[family]} on iconqa: 4 samples"


def test_a_run_that_is_not_finished_is_refused(tmp_path):
    (tmp_path / "recipe.yaml").write_text(grid.recipe("iconqa", 31).to_yaml())
    with pytest.raises(UserError, match="is not finished"):
        retention_vs_original.score_models([str(tmp_path)], [], "cpu")


def test_a_miniature_is_above_chance_on_what_it_was_trained_on(tmp_path):
    icons.prepare(tmp_path / "icons", train=4, val=2, test=60, seed=77, skills=("color", "shape", "exists"))
    (results,) = retention_vs_original.score_models([tiny.NAMES["t5"]], [("icons", tmp_path / "icons")], "cpu")
    summary = retention_vs_original.summarize(results["icons"])
    assert summary["accuracy"] == pytest.approx(100 * np.mean(results["icons"].scores))
    assert summary["interval"][0] > summary["chance"]
