"""A model and an adapter on the same samples: every number follows from what stands in the written files."""

import json
from dataclasses import replace

import pytest
import torch

import checkpoints
from blipfit import data as datasets
from blipfit.adapters import peft_format
from blipfit.adapters.bank import Bank
from blipfit.data import icons, rewardbench
from blipfit.errors import UserError
from blipfit.evaluation import benchmarks, clip_score, generation, text
from blipfit.evaluation.benchmarks import Settings
from blipfit.evaluation.mme import score_mme
from blipfit.evaluation.rewardbench import score_rewardbench
from blipfit.model import clip
from blipfit.model.image_features import ImageFeatures
from blipfit.recipe import AdapterConfig
from blipfit.run import Evaluation, read_json, read_lines

# Random models never end by themselves, and 256 tokens of nonsense prove no more than 10.
SETTINGS = Settings(batch_size=8, decoding="short-answer")


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    icons.prepare(root / "icons", train=4, val=4, test=6)
    datasets.prepare_drawn("mme", root / "mme", 2)
    datasets.prepare_drawn("rewardbench", root / "rewardbench", 40)
    return root


@pytest.fixture
def adapter(backbone, tmp_path):
    """An adapter that changes the answers."""
    part = AdapterConfig(qformer=("ffn",), rank=2)
    bank = Bank(backbone, [part], [0])
    bank.values.add_(torch.randn(bank.values.shape, generator=torch.Generator().manual_seed(3)), alpha=0.3)
    state = bank.state(0)
    bank.remove()
    digest = peft_format.save(tmp_path / "adapter", part, state, "small")
    return tmp_path / "adapter", digest


def _take(backbone, sets, names, tmp_path, settings=SETTINGS, adapter=None, split="test"):
    tasks = [benchmarks.read(backbone, name, sets / name, split) for name in names]
    see = ImageFeatures.from_backbone(backbone, "off").features
    folder, digest = adapter or (None, None)

    def place(task):
        return Evaluation(tmp_path / "out" / task.title)

    return benchmarks.side_by_side(backbone, folder, tasks, see, settings, place, {"run": None}, digest)


def test_base_and_adapter_side_by_side(backbone, adapter, sets, tmp_path):
    names = ("icons", "mme", "rewardbench")
    records = _take(backbone, sets, names, tmp_path, adapter=adapter)
    for name, record in zip(names, records, strict=True):
        out = Evaluation(tmp_path / "out" / f"{name}-test")
        assert read_json(out.record_file) == json.loads(json.dumps(record))
        assert (record["on"], record["adapter_sha256"]) == (name, adapter[1])
        lines = read_lines(out.predictions_file)
        assert [line["who"] for line in lines] == ["base"] * record["questions"] + ["tuned"] * record["questions"]
        first, second = ([{**line, "who": ""} for line in lines if line["who"] == who] for who in ("base", "tuned"))
        assert first != second
    icons_record, mme_record, bench = records
    base = [100.0 * line["correct"] for line in read_lines(tmp_path / "out/icons-test/predictions.jsonl")[:6]]
    assert icons_record["base"]["accuracy"] == pytest.approx(sum(base) / 6, abs=1e-4)
    assert icons_record["difference"]["accuracy"]["difference"] == pytest.approx(
        icons_record["tuned"]["accuracy"] - icons_record["base"]["accuracy"], abs=1e-3
    )
    for who in ("base", "tuned"):
        official = score_mme(tmp_path / "out/mme-test" / f"answers-{who}")
        assert {k: mme_record[who][k] for k in ("perception", "subtasks")} == {
            k: official[k] for k in ("perception", "subtasks")
        }
    assert bench["tuned"]["likelihood_sum"]["pooled"]["pairs"] == 4
    # The adapter is out again: the same model answers as before.
    (again,) = _take(backbone, sets, ["icons"], tmp_path)
    assert again["base"] == icons_record["base"]
    assert "tuned" not in again


def test_another_adapter_is_refused(backbone, adapter, sets, tmp_path):
    with pytest.raises(UserError, match="is not the adapter that its result was made with"):
        _take(backbone, sets, ["icons"], tmp_path, adapter=(adapter[0], "0" * 64))
    assert not (tmp_path / "out").exists()


def test_rewardbench_is_scored_from_its_lines(backbone, sets, tmp_path):
    (record,) = _take(backbone, sets, ["rewardbench"], tmp_path, split="all")
    base, lines = record["base"], read_lines(tmp_path / "out/rewardbench-all/predictions.jsonl")
    assert record["questions"] == 40
    for how, name in (("sum", "sums"), ("mean", "means")):
        right = sum(line[name][line["best"]] > line[name][1 - line["best"]] for line in lines)
        assert base[f"likelihood_{how}"]["pooled"]["right"] == right
    pairs = rewardbench.unique(
        [pair for split in ("train", "val", "test") for pair in rewardbench.read(sets / f"rewardbench/{split}.jsonl")]
    )
    assert [line["answer"] for line in lines] == [pair.responses[pair.best] for pair in pairs]
    rouge = text.rouge([line["prediction"] for line in lines], [line["answer"] for line in lines])["rougeL"]
    assert base["answers"]["texts"]["rougeL"]["mean"] == pytest.approx(rouge.mean())
    assert base["cut_responses"] == 0


def test_responses_are_scored_whole(small, sets):
    """The likelihood is of the response itself: for T5, whose end token counts in both, the negated training loss."""
    backbone = checkpoints.load(small["t5"])
    task = benchmarks.read(backbone, "rewardbench", sets / "rewardbench")
    see = ImageFeatures.from_backbone(backbone, "off").features
    outcome = benchmarks.answer(backbone, task, see, SETTINGS)
    for row, (pair, record) in enumerate(zip(task.pairs, outcome.records, strict=True)):
        batch = backbone.text.targets([task.encoded_split.encoded[row]])
        visual = backbone.query(see([task.encoded_split.questions[row]]), batch)
        loss = backbone.losses(visual, batch).item()
        assert record["sums"][pair.best] == pytest.approx(-loss, abs=1e-3)


def test_judging_in_words_asks_in_both_orders(backbone, sets, tmp_path, monkeypatch):
    monkeypatch.setitem(generation.PRESETS, "sampling", replace(generation.PRESETS["sampling"], max_tokens=4))
    (record,) = _take(backbone, sets, ["rewardbench"], tmp_path, replace(SETTINGS, samples=2))
    found = record["base"]["judgements"]
    file = tmp_path / "out/rewardbench-test/judgements-base.jsonl"
    lines = read_lines(file)
    assert found["judgements"] == len(lines) == 4 * 2 * 2
    assert sorted(line["meta"]["random_number"] for line in lines) == [0] * 8 + [1] * 8
    assert score_rewardbench(file)["pooled"] == found["pooled"]
    assert found["decoding"] == "sampling"


def test_the_clip_score_is_of_the_models_own_words(backbone, sets, tmp_path):
    judge = clip.load("tiny-clip")
    (record,) = _take(backbone, sets, ["rewardbench"], tmp_path, replace(SETTINGS, clip=judge))
    lines = read_lines(tmp_path / "out/rewardbench-test/predictions.jsonl")
    pairs = rewardbench.read(sets / "rewardbench/test.jsonl")
    expected = clip_score.score(judge, [pair.image for pair in pairs], [line["prediction"] for line in lines])
    assert [line["clip_score"] for line in lines] == pytest.approx(list(expected.values), abs=1e-3)
    assert record["base"]["answers"]["clip_score"]["mean"] == pytest.approx(sum(expected.values) / 4, abs=1e-3)
    assert record["clip"] == "tiny-clip"


def test_what_cannot_be_asked(backbone, sets):
    with pytest.raises(UserError, match="two questions an image; give an even limit, not 3"):
        benchmarks.read(backbone, "mme", sets / "mme", limit=3)
    with pytest.raises(UserError, match="unknown split 'tset'; known: train, val, test, all"):
        benchmarks.read(backbone, "rewardbench", sets / "rewardbench", "tset")
    with pytest.raises(UserError, match=r"test.jsonl is missing; run `blipfit prepare rewardbench"):
        benchmarks.read(backbone, "rewardbench", sets / "icons")
    with pytest.raises(UserError, match="cannot be drawn from icons; mme and rewardbench can"):
        datasets.prepare_drawn("iconqa", sets / "x")
