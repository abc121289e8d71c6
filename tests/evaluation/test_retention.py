"""Retention: the same samples for all, chance taken out, paired intervals, the front."""

import json

import numpy as np
import pytest
from PIL import Image

from blipfit.data import icons
from blipfit.errors import UserError
from blipfit.evaluation import retention, text
from blipfit.model.sight import Sight


def answers(share: float, count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random(count) < share


def test_retention_by_hand():
    base = [True] * 8 + [False] * 2
    candidate = [True] * 7 + [False] * 3
    kept = retention.retained(base, candidate, [0.5] * 10)
    assert kept["accuracy"] == 70.0
    assert kept["chance"] == 50.0
    assert kept["raw"]["ratio"] == pytest.approx(7 / 8)
    assert kept["difference"]["difference"] == pytest.approx(-0.1)
    assert kept["corrected"]["ratio"] is None  # 8 of 10 is not surely above one half


def test_chance_is_taken_out_of_both():
    base, candidate = answers(0.9, 400, 0), answers(0.7, 400, 1)
    kept = retention.retained(base, candidate, [0.5] * 400)
    assert kept["corrected"]["ratio"] == pytest.approx((candidate.mean() - 0.5) / (base.mean() - 0.5))
    assert kept["corrected"]["ratio"] < kept["raw"]["ratio"]
    low, high = kept["corrected"]["interval"]
    assert low < kept["corrected"]["ratio"] < high


def test_the_same_answers_keep_everything_for_sure():
    base = answers(0.8, 200, 0)
    kept = retention.retained(base, base, [0.25] * 200)
    assert kept["corrected"] == {"ratio": 1.0, "interval": [1.0, 1.0], "samples": 200}
    assert not retention.misses(kept, 1.0)


def test_pairing_narrows_the_interval():
    """Candidates that fail on the same samples are compared more surely than ones that fail elsewhere."""
    base = answers(0.7, 300, 0)
    alike = base & answers(0.95, 300, 1)
    apart = np.random.default_rng(2).permutation(alike)

    def width(candidate):
        low, high = retention.retained(base, candidate, [0.5] * 300)["corrected"]["interval"]
        return high - low

    assert width(alike) < 0.7 * width(apart)


def test_the_lower_end_decides():
    base, candidate = answers(0.9, 500, 0), answers(0.8, 500, 1)
    kept = retention.retained(base, candidate, [0.3] * 500)
    low = kept["corrected"]["interval"][0]
    assert not retention.misses(kept, low - 0.01)
    assert retention.misses(kept, low + 0.01)
    guess = retention.retained(answers(0.3, 500, 0), candidate, [0.3] * 500)
    assert retention.misses(guess, 0.0)  # nothing to keep is no success


def test_the_front():
    points = [((0.5, 0.5), 0.9), ((0.3, 0.3), 0.9), ((0.2, 0.4), 0.8), ((0.6, 0.1), 0.7), ((0.1, 0.1), None)]
    assert retention.pareto(points) == [False, True, True, True, False]
    assert retention.pareto([((0.5,), 0.8), ((0.5,), 0.8)]) == [True, True]


@pytest.fixture
def mme(tmp_path):
    icons.write_mme(tmp_path / "mme", 4, seed=5)
    return tmp_path / "mme"


def test_mme_is_yes_or_no(mme):
    judged = retention.judge("mme", mme)
    assert {p.candidates for p in judged.prompted} == {("Yes", "No")}
    assert {p.target for p in judged.prompted} == {"Yes", "No"}
    assert judged.chance == [0.5] * len(judged.questions)
    assert judged.prompted[0].prompt == judged.questions[0].question


def test_rewardbench_ranks_both_responses(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    row = {"id": "x", "query": "<image>\nWhat?", "response": ["bad", "good"], "human_ranking": [1, 0], "image": "a.png"}
    (tmp_path / "test.jsonl").write_text(json.dumps(row) + "\n")
    (prompted,) = retention.judge("rewardbench", tmp_path).prompted
    assert prompted.prompt == "What?"
    assert prompted.candidates == ("bad", "good")
    assert prompted.target == "good"


def test_open_questions_are_refused(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "test.jsonl").write_text(json.dumps({"image": "a.png", "question": "What?", "answer": "this"}) + "\n")
    with pytest.raises(UserError, match="has no choices to tell apart"):
        retention.judge("own", tmp_path)


def test_every_model_answers_the_same_samples(small, family, iconqa, mme):
    judges = [retention.judge("iconqa", iconqa), retention.judge("mme", mme, limit=6)]
    heard = []
    twice = retention.answers([str(small[family])] * 2, judges, "cpu", listen=heard.append)
    assert heard == [str(small[family])] * 2
    assert twice[0] == twice[1]
    assert [len(twice[0][judged.name]) for judged in judges] == [5, 6]


def test_right_is_the_likeliest_candidate(backbone, iconqa):
    judged = retention.judge("iconqa", iconqa)
    right = retention.correct(backbone, judged, Sight.from_backbone(backbone, "off"))
    for one, said in zip(range(len(judged.questions)), right, strict=True):
        batch = backbone.text.candidates(backbone.text.encode(judged.prompted[one : one + 1]))
        features = Sight.from_backbone(backbone, "off").features(judged.questions[one : one + 1])
        sums = backbone.score(backbone.query(features, batch), batch).sums_KM[0]
        written = judged.prompted[one]
        assert said == (written.candidates[int(sums.argmax())] == written.target)


def test_ratio_of_the_text_room_is_what_is_used():
    base, candidate = answers(0.9, 50, 0), answers(0.8, 50, 1)
    assert retention.retained(base, candidate, [0.5] * 50, seed=3)["raw"] == text.ratio(base, candidate, seed=3)
