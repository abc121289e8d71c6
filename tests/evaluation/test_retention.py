"""Retention: the same samples for all, chance taken out, paired intervals, the front."""

import json

import numpy as np
import pytest
from PIL import Image

from blipfit.data import icons
from blipfit.errors import UserError
from blipfit.evaluation import benchmarks, ranking, retention
from blipfit.evaluation.benchmarks import Settings
from blipfit.evaluation.retention import Answers
from blipfit.model import tiny
from blipfit.model.image_features import ImageFeatures


def drawn(share: float, count: int, seed: int, chance: float = 0.5) -> Answers:
    """A model that is right on a share of the samples."""
    values = np.random.default_rng(seed).random(count) < share
    return Answers([str(i) for i in range(count)], [float(v) for v in values], [chance] * count)


def of(values, chance: float = 0.5) -> Answers:
    return Answers([str(i) for i in range(len(values))], [float(v) for v in values], [chance] * len(values))


def test_retention_by_hand():
    kept = retention.retained(of([1] * 8 + [0] * 2), of([1] * 7 + [0] * 3))
    assert (kept["accuracy"], kept["chance"], kept["samples"]) == (70.0, 50.0, 10)
    assert kept["raw"]["ratio"] == pytest.approx(7 / 8)
    assert kept["difference"]["difference"] == pytest.approx(-0.1)
    assert kept["corrected"]["ratio"] is None  # 8 of 10 is not surely above one half


def test_chance_is_taken_out_of_both():
    base, candidate = drawn(0.9, 400, 0), drawn(0.7, 400, 1)
    kept = retention.retained(base, candidate)
    means = [np.mean(one.values) - 0.5 for one in (base, candidate)]
    assert kept["corrected"]["ratio"] == pytest.approx(means[1] / means[0])
    assert kept["corrected"]["ratio"] < kept["raw"]["ratio"]
    low, high = kept["corrected"]["interval"]
    assert low < kept["corrected"]["ratio"] < high


def test_the_same_answers_keep_everything_for_sure():
    base = drawn(0.8, 200, 0, chance=0.25)
    kept = retention.retained(base, base)
    assert kept["corrected"] == {"ratio": 1.0, "interval": [1.0, 1.0], "samples": 200}
    assert not retention.misses(kept, 1.0)


def test_pairing_narrows_the_interval():
    """Candidates that fail on the same samples are compared more surely than ones that fail elsewhere."""
    base = drawn(0.7, 300, 0)
    alike = [a * b for a, b in zip(base.values, drawn(0.95, 300, 1).values, strict=True)]
    apart = np.random.default_rng(2).permutation(alike)

    def width(values):
        low, high = retention.retained(base, of(values))["corrected"]["interval"]
        return high - low

    assert width(alike) < 0.7 * width(apart)


def test_the_lower_end_decides():
    base, candidate = drawn(0.9, 500, 0, 0.3), drawn(0.8, 500, 1, 0.3)
    kept = retention.retained(base, candidate)
    low = kept["corrected"]["interval"][0]
    assert not retention.misses(kept, low - 0.01)
    assert retention.misses(kept, low + 0.01)
    guess = retention.retained(drawn(0.3, 500, 0, 0.3), candidate)
    assert retention.misses(guess, 0.0)  # nothing to keep is no success


def test_the_front():
    points = [((0.5, 0.5), 0.9), ((0.3, 0.3), 0.9), ((0.2, 0.4), 0.8), ((0.6, 0.1), 0.7), ((0.1, 0.1), None)]
    assert retention.pareto(points) == [False, True, True, True, False]
    assert retention.pareto([((0.5,), 0.8), ((0.5,), 0.8)]) == [True, True]


@pytest.fixture
def sets(tmp_path, iconqa):
    """A set of each kind."""
    icons.write_mme(tmp_path / "mme", 2, seed=5)
    icons.write_preferences(tmp_path / "pairs", 6, seed=5)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    line = json.dumps({"image": "a.png", "question": "What is red?", "answer": "the star"})
    (tmp_path / "test.jsonl").write_text(line + "\n")
    return {"iconqa": iconqa, "mme": tmp_path / "mme", "rewardbench": tmp_path / "pairs", "own": tmp_path}


def test_values_and_chance_of_every_kind(backbone, sets):
    see = ImageFeatures.from_backbone(backbone, "off").features
    found = {}
    for name, folder in sets.items():
        task = benchmarks.read(backbone, name, folder)
        found[name] = retention.answer(backbone, task, see, Settings(batch_size=4))
        assert len(found[name].values) == len(found[name].samples) == len(task.encoded_split)
        assert set(found[name].values) <= {0.0, 0.5, 1.0} or name == "own"
    assert set(found["iconqa"].chance) <= {1 / 2, 1 / 3, 1 / 4}
    assert set(found["mme"].chance) == set(found["rewardbench"].chance) == {0.5}
    assert found["own"].chance == [0.0]


def test_a_pair_is_right_where_the_preferred_response_is_likelier(backbone, sets):
    see = ImageFeatures.from_backbone(backbone, "off").features
    task = benchmarks.read(backbone, "rewardbench", sets["rewardbench"])
    found = retention.answer(backbone, task, see, Settings())
    chosen = task.encoded_split
    (choices,) = ranking.rank(backbone, chosen.encoded, lambda rows: see([chosen.questions[i] for i in rows]), 1)
    assert found.values == [float(c.best == pair.best) for c, pair in zip(choices, task.pairs, strict=True)]


def test_every_model_answers_the_same_samples(small, family, sets):
    heard = []
    asked = [("iconqa", sets["iconqa"]), ("mme", sets["mme"])]
    twice = retention.answers([str(small[family])] * 2, asked, "cpu", limit=4, listen=heard.append)
    assert twice[0] == twice[1]
    assert {name: len(found.samples) for name, found in twice[0].items()} == {"iconqa": 4, "mme": 4}
    assert heard[0] == f"{small[family]} on iconqa: 4 samples"


def test_a_run_that_is_not_finished_is_refused(tmp_path):
    (tmp_path / "recipe.yaml").write_text("")
    with pytest.raises(UserError, match="is not finished"), retention.opened(str(tmp_path), "cpu"):
        pass


def test_a_miniature_is_above_chance_and_its_mean_is_told(tmp_path):
    """The trained miniature on what it was taught."""
    icons.prepare(tmp_path / "icons", train=4, val=2, test=60, seed=77, skills=("color", "shape", "exists"))
    (found,) = retention.answers([tiny.NAMES["t5"]], [("icons", tmp_path / "icons")], "cpu")
    facts = retention.told(found["icons"])
    assert facts["accuracy"] == pytest.approx(100 * np.mean(found["icons"].values))
    assert facts["interval"][0] > facts["chance"]
