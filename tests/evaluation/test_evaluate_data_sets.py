"""Base model and adapter are evaluated on the same samples, and every number follows from the written files."""

import json
from dataclasses import replace

import pytest
import torch

import checkpoints
from blipfit import data as blipfit_data
from blipfit.adapters import peft_format
from blipfit.adapters.bank import Bank
from blipfit.adapters.open_model import OpenedModel, Source
from blipfit.data import icons, rewardbench
from blipfit.errors import UserError
from blipfit.evaluation import clip_score, evaluate_data_sets, generation, text_metrics
from blipfit.evaluation.evaluation_task import Settings, load_task
from blipfit.evaluation.mme_scores import score_mme
from blipfit.evaluation.rewardbench_scores import score_rewardbench
from blipfit.model import clip
from blipfit.model.image_features import ImageFeatures
from blipfit.recipe import AdapterConfig, ModelConfig
from blipfit.run_folder import Evaluation, read_json, read_lines

# Random models never generate an end token, and 10 tokens test as much as 256.
SETTINGS = Settings(batch_size=8, decoding="short-answer")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    icons.prepare(root / "icons", train=4, val=4, test=6)
    blipfit_data.prepare_drawn("mme", root / "mme", 2)
    blipfit_data.prepare_drawn("rewardbench", root / "rewardbench", 40)
    return root


@pytest.fixture
def adapter(backbone, tmp_path):
    """An adapter that changes the answers."""
    config = AdapterConfig(qformer=("ffn",), rank=2)
    bank = Bank(backbone, [config], [0])
    bank.values.add_(torch.randn(bank.values.shape, generator=torch.Generator().manual_seed(3)), alpha=0.3)
    state = bank.state(0)
    bank.remove()
    digest = peft_format.save(tmp_path / "adapter", config, state, "small")
    return tmp_path / "adapter", digest


def _evaluate(backbone, data, names, tmp_path, settings=SETTINGS, adapter=None, split="test"):
    tasks = [load_task(backbone, name, data / name, split) for name in names]
    get_features = ImageFeatures.from_backbone(backbone, "off").features
    folder, digest = adapter or (None, None)
    saved = None if folder is None else peft_format.read_saved(folder)

    def get_evaluation(task):
        return Evaluation(tmp_path / "out" / task.title)

    model = OpenedModel(backbone, Source("small", ModelConfig(name="small"), folder, digest, saved=saved))
    return evaluate_data_sets.compare_with_adapter(model, tasks, get_features, settings, get_evaluation, {"run": None})


def test_a_part_of_a_split_never_replaces_the_whole(backbone, data):
    def title(name, limit):
        return load_task(backbone, name, data / name, limit=limit).title

    assert title("icons", None) == title("icons", 7) == "icons-test"  # there are 6
    assert title("icons", 2) == "icons-test-first-2"
    assert title("mme", 2) == "mme-test-first-2"
    assert title("rewardbench", 1) == "rewardbench-test-first-1"
    assert title("rewardbench", 1000) == title("rewardbench", None) == "rewardbench-test"


def test_records_of_base_and_adapter_follow_from_the_written_files(backbone, adapter, data, tmp_path):
    names = ("icons", "mme", "rewardbench")
    records = _evaluate(backbone, data, names, tmp_path, adapter=adapter)
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
    # The adapter is removed afterwards: the same model gives the same metrics.
    (record,) = _evaluate(backbone, data, ["icons"], tmp_path)
    assert record["base"] == icons_record["base"]
    assert "tuned" not in record


def test_rewardbench_is_scored_from_its_lines(backbone, data, tmp_path):
    (record,) = _evaluate(backbone, data, ["rewardbench"], tmp_path, split="all")
    base, lines = record["base"], read_lines(tmp_path / "out/rewardbench-all/predictions.jsonl")
    assert record["questions"] == 40
    for how, name in (("sum", "sums"), ("mean", "means")):
        right = sum(line[name][line["best"]] > line[name][1 - line["best"]] for line in lines)
        assert base[f"likelihood_{how}"]["pooled"]["right"] == right
    pairs = rewardbench.drop_duplicates(
        [
            pair
            for split in ("train", "val", "test")
            for pair in rewardbench.read_pairs(data / f"rewardbench/{split}.jsonl")
        ]
    )
    assert [line["answer"] for line in lines] == [pair.responses[pair.best] for pair in pairs]
    rouge = text_metrics.rouge([line["prediction"] for line in lines], [line["answer"] for line in lines])["rougeL"]
    assert base["answers"]["texts"]["rougeL"]["mean"] == pytest.approx(rouge.mean())
    assert base["cut_responses"] == 0


def test_response_scores_are_the_negated_training_loss(small, data):
    """T5's end token counts in both. The score is of the whole response."""
    backbone = checkpoints.load(small["t5"])
    task = load_task(backbone, "rewardbench", data / "rewardbench")
    get_features = ImageFeatures.from_backbone(backbone, "off").features
    result = evaluate_data_sets.evaluate_task(backbone, task, get_features, SETTINGS)
    for row, (pair, record) in enumerate(zip(task.pairs, result.records, strict=True)):
        batch = backbone.text.targets([task.encoded_split.encoded[row]])
        visual = backbone.query(get_features([task.encoded_split.questions[row]]), batch)
        loss = backbone.losses(visual, batch).item()
        assert record["sums"][pair.best] == pytest.approx(-loss, abs=1e-3)


def test_judgments_are_generated_in_both_orders(backbone, data, tmp_path, monkeypatch):
    monkeypatch.setitem(generation.PRESETS, "sampling", replace(generation.PRESETS["sampling"], max_tokens=4))
    (record,) = _evaluate(backbone, data, ["rewardbench"], tmp_path, replace(SETTINGS, samples=2))
    scores = record["base"]["judgments"]
    file = tmp_path / "out/rewardbench-test/judgments-base.jsonl"
    lines = read_lines(file)
    assert scores["judgments"] == len(lines) == 4 * 2 * 2
    assert sorted(line["meta"]["random_number"] for line in lines) == [0] * 8 + [1] * 8
    assert score_rewardbench(file)["pooled"] == scores["pooled"]
    assert scores["decoding"] == "sampling"


def test_the_clip_score_is_of_the_generated_answers(backbone, data, tmp_path):
    clip_model = clip.load("tiny-clip")
    (record,) = _evaluate(backbone, data, ["rewardbench"], tmp_path, replace(SETTINGS, clip=clip_model))
    lines = read_lines(tmp_path / "out/rewardbench-test/predictions.jsonl")
    pairs = rewardbench.read_pairs(data / "rewardbench/test.jsonl")
    expected = clip_score.score(clip_model, [pair.image for pair in pairs], [line["prediction"] for line in lines])
    assert [line["clip_score"] for line in lines] == pytest.approx(list(expected.values), abs=1e-3)
    assert record["base"]["answers"]["clip_score"]["mean"] == pytest.approx(sum(expected.values) / 4, abs=1e-3)
    assert record["clip"] == "tiny-clip"


def test_loading_a_task_refuses_wrong_limits_splits_and_folders(backbone, data):
    with pytest.raises(UserError, match="two questions per image, so the limit must be even; 3 is odd"):
        load_task(backbone, "mme", data / "mme", limit=3)
    with pytest.raises(UserError, match="unknown split 'tset'; known: train, val, test, all"):
        load_task(backbone, "rewardbench", data / "rewardbench", "tset")
    with pytest.raises(UserError, match=r"test.jsonl is missing; run `blipfit prepare rewardbench"):
        load_task(backbone, "rewardbench", data / "icons")
    with pytest.raises(UserError, match="cannot be drawn from icons; mme and rewardbench can"):
        blipfit_data.prepare_drawn("iconqa", data / "x")
