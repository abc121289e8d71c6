"""The training loop through its one door: recipes in, finished run folders out."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

import checkpoints
import reference
from blipfit import data as blipfit_data
from blipfit import grid
from blipfit.adapters import bank as bank_module
from blipfit.adapters import peft_format
from blipfit.data import iconqa as iconqa_data
from blipfit.data import images
from blipfit.data.prompts import get_prompt
from blipfit.errors import UserError
from blipfit.evaluation.ranking import summarize
from blipfit.model.backbone import fingerprint, head
from blipfit.recipe import Recipe
from blipfit.run_folder import Run
from blipfit.runtime.save_interval import SaveInterval
from blipfit.training import bank_session, events, loop
from blipfit.training import step as step_module
from blipfit.training.events import Event, Listener
from blipfit.training.model_cache import ModelCache
from blipfit.training.step import Stepper

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
FILES = {"recipe.yaml", "data.json", "log.jsonl", "adapter", "predictions.jsonl", "result.json"}


@pytest.fixture
def recipe(small: dict[str, Path]) -> Callable[..., Recipe]:
    """An experiment of the grid on a small model: two epochs of six steps unless said otherwise."""

    def make(experiment: int | str, *changes: str, family: str = "t5") -> Recipe:
        own = ["training.batch_size=2", "training.accumulation=1", "training.max_epochs=2", *changes]
        return grid.recipe("iconqa", experiment, str(small[family])).override(own)

    return make


@pytest.fixture
def train(iconqa: Path, tmp_path: Path) -> Callable[..., list[Run]]:
    """Train in a folder below `tmp_path`, with a store of image features of its own."""

    def run(recipes: list[Recipe], folder: str = "results", data: Path = iconqa, **options: Any) -> list[Run]:
        shop = options.pop("model_cache", None) or ModelCache("cpu", store=tmp_path / "features")
        return loop.train(recipes, data, tmp_path / folder, model_cache=shop, **options)

    return run


def _records(file: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{file} holds {constant}, which is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in file.read_text().splitlines()]


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Results without the clock."""

    def timeless(result: dict[str, Any]) -> dict[str, Any]:
        history = [{k: v for k, v in line.items() if k != "seconds"} for line in result["history"]]
        return {k: v for k, v in result.items() if k != "seconds"} | {"history": history}

    return timeless(one) == timeless(other)


def _tensors(run: Run) -> dict[str, torch.Tensor]:
    return peft_format.read(run.adapter)[1]


def _close(one: Run, other: Run, tolerance: float) -> None:
    """The same training up to rounding: losses, accuracies, weights."""
    for mine, theirs in zip(one.result()["history"], other.result()["history"], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=tolerance)
        assert mine["val_accuracy"] == theirs["val_accuracy"]
        assert mine["learning_rate"] == theirs["learning_rate"]
    tensors = _tensors(other)
    for name, tensor in _tensors(one).items():
        torch.testing.assert_close(tensor, tensors[name], atol=tolerance, rtol=0, msg=name)


def test_a_run_folder_is_complete(recipe, train, family, iconqa):
    experiment = recipe(15 if family == "t5" else 47, family=family)
    (run,) = train([experiment])
    assert {path.name for path in run.folder.iterdir()} == FILES
    assert [p for p in run.folder.parents[1].rglob("*") if p.name.startswith(".")] == []
    assert run.state() == "finished"
    assert run.recipe() == experiment
    result = run.result()
    assert len(_records(run.log_file)) == result["epochs"] == 2
    assert _records(run.log_file) == result["history"]
    assert set(result["metrics"]) == {"val", "test"}
    assert result["counts"] == {"train": 12, "val": 6, "test": 5}
    assert (result["prompt"], result["recipe"]) == ("iconqa-v1", experiment.model_dump(mode="json"))
    assert result["prompt_example"].startswith("<Image> Question: Which")
    assert {"blipfit", "python", "torch", "transformers", "peft", "safetensors"} <= result["versions"].keys()
    assert all(result["versions"].values())
    assert result["differs_from_published"]["training.max_epochs"] == [15, 2]
    assert "adapter.rank" not in result["differs_from_published"]
    assert (result["precision"], result["seconds"] > 0) == ("float32", True)


def test_the_recorded_numbers_are_those_of_the_files(recipe, train, family, small, iconqa):
    """Adapter, counts, hashes and scores, taken again from what lies in the folder, in a model loaded anew."""
    (run,) = train([recipe(31 if family == "t5" else 63, family=family)])
    result, backbone = run.result(), checkpoints.load(small[family])
    assert result["head_sha256"] == fingerprint(head(backbone.hf))
    plain = sum(p.numel() for p in backbone.hf.parameters())
    adapter, state = peft_format.read(run.adapter)
    assert result["adapter_sha256"] == peft_format.digest(state)
    assert result["trained_parameters"] == sum(t.numel() for t in state.values())
    assert sum(result["trained_by_component"].values()) == result["trained_parameters"]
    lora = sum(t.numel() for n, t in state.items() if "lora_" in n)
    assert result["total_parameters"] == plain + lora
    assert result["trained_share"] == pytest.approx(result["trained_parameters"] / (plain + lora))

    records = _records(run.predictions_file)
    assert [r["split"] for r in records] == ["val"] * 6 + ["test"] * 5
    questions = {split: iconqa_data.load(iconqa, split) for split in ("val", "test")}
    assert [r["id"] for r in records] == [q.id for split in questions.values() for q in split]
    tuned = reference.merged(backbone.hf, adapter, state)
    for record, question in zip(records[6:], questions["test"], strict=True):
        written = get_prompt("iconqa-v1")(question)
        assert record["answer"] == written.target
        assert tuple(c["text"] for c in record["candidates"]) == written.candidates
        pixels = images.to_pixels([images.open_image(question.image)], backbone.image_size)
        (e,) = backbone.text.encode([written])
        for found, ids in zip(record["candidates"], e.candidates, strict=True):
            with torch.no_grad():
                _, (logits,) = reference.forward(tuned, backbone, pixels, [(e.qformer, e.evaluation_prompt, ids)])
            expected = reference.log_likelihood(logits, ids)
            assert found["sum"] == pytest.approx(expected, abs=1e-3)
            assert found["tokens"] == len(ids)
            assert found["mean"] == pytest.approx(found["sum"] / len(ids))
        best = max(record["candidates"], key=lambda c: c["sum"])
        assert record["prediction"] == best["text"]
        assert record["correct"] == (best["text"] == written.target)
    for split in questions:
        mine = [r for r in records if r["split"] == split]
        assert json.loads(json.dumps(summarize(questions[split], mine))) == result["metrics"][split]


def test_the_best_epoch_is_what_is_tested(recipe, train):
    own = ("training.max_epochs=4", "training.learning_rate=0.01", "training.patience=4")
    (run,) = train([recipe(31, *own)])
    result = run.result()
    accuracies = [line["val_accuracy"] for line in result["history"]]
    assert len(set(accuracies)) > 1
    assert result["best_epoch"] == accuracies.index(max(accuracies)) + 1
    assert result["metrics"]["val"]["accuracy"] == pytest.approx(max(accuracies), abs=1e-4)


def test_the_learning_rate_falls_by_the_epoch(recipe, train):
    (run,) = train([recipe(16, "training.max_epochs=4", "training.learning_rate=1e-3", "training.patience=4")])
    rates = [line["learning_rate"] for line in run.result()["history"]]
    assert rates == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])


def test_training_learns(recipe, train, family):
    """On questions it has seen: the loss of the last epoch is well below that of the first."""
    change = ["training.max_epochs=5", "training.learning_rate=0.03", "training.patience=5"]
    (run,) = train([recipe(32, *change, family=family)])
    losses = [line["loss"] for line in run.result()["history"]]
    assert losses[-1] < 0.8 * losses[0]


def test_nothing_of_the_model_changes(recipe, train, small, family, tmp_path):
    shop = ModelCache("cpu", store=tmp_path / "features")
    both = [recipe(9, family=family), recipe(30, family=family)]
    train(both, model_cache=shop)
    used, fresh = shop.backbone(both[0]).hf, checkpoints.load(small[family]).hf
    assert used.state_dict().keys() == fresh.state_dict().keys()
    assert all(torch.equal(t, fresh.state_dict()[n]) for n, t in used.state_dict().items())
    assert not any(module.training for module in used.modules())


def test_the_same_recipe_gives_the_same_numbers(recipe, train):
    (one,), (other,) = train([recipe(30)], "one"), train([recipe(30)], "other")
    assert _same(one.result(), other.result())
    assert one.predictions_file.read_text() == other.predictions_file.read_text()
    (seeded,) = train([recipe(30, "training.seed=1")], "seeded")
    assert seeded.result()["adapter_sha256"] != one.result()["adapter_sha256"]


def test_a_bank_gives_what_separate_runs_give(recipe, train, family):
    """With dropout and augmentation on: an experiment sees the noise that it sees alone."""
    several = [
        recipe(13, "training.learning_rate=1e-3", family=family),
        recipe(22, family=family),
        recipe(32, "training.weight_decay=0.5", family=family),
        recipe(27, "training.max_epochs=1", family=family),
    ]
    alone = [train([r], f"alone{k}")[0] for k, r in enumerate(several)]
    for mine, theirs in zip(train(several, "bank"), alone, strict=True):
        _close(mine, theirs, 1e-4)
    losses = {run.result()["history"][0]["loss"] for run in alone}
    assert len(losses) == 4


def test_a_bank_of_full_q_formers_gives_what_separate_runs_give(recipe, train):
    several = [recipe(2), recipe(12)]
    alone = [train([r], f"alone{k}")[0] for k, r in enumerate(several)]
    for mine, theirs in zip(train(several, "bank"), alone, strict=True):
        _close(mine, theirs, 1e-4)


def test_dropout_and_augmentation_are_on(recipe, train):
    losses = []
    for change in ("data.images=shared", "training.dropout=false", "data.images=stored"):
        (run,) = train([recipe(30, "training.max_epochs=1", "data.images=shared", change)], change)
        losses.append(run.result()["history"][0]["loss"])
    assert len(set(losses)) == 3


def test_accumulation_is_only_a_matter_of_memory(recipe, train):
    """The loss is divided by the label tokens of the whole effective batch, not averaged over micro-batches."""
    whole = recipe(30, "training.batch_size=4", "training.dropout=false")
    (one,) = train([whole], "one")
    (four,) = train([whole.override(["training.batch_size=1", "training.accumulation=4"])], "four")
    _close(one, four, 1e-5)


class Interrupted(Exception):
    """The machine goes down."""


def interrupt_at(kind: type[Event], nth: int) -> Listener:
    """A listener that raises Interrupted at the nth event of a type."""
    count = 0

    def listener(event: Event) -> None:
        nonlocal count
        if isinstance(event, kind):
            count += 1
            if count == nth:
                raise Interrupted

    return listener


def collect(kind: type[Event], collected: list[Any]) -> Listener:
    """A listener that appends events of a type to a list."""
    return lambda event: collected.append(event) if isinstance(event, kind) else None


EVERY_STEP, NEVER = SaveInterval(seconds=None, steps=1), SaveInterval(seconds=1e6)

# The event and which of them, how often checkpoints are written in an epoch, and the epoch it then goes on in.
INTERRUPTIONS = {
    "before the first checkpoint": (events.EpochDone, 1, NEVER, [0]),
    "after an epoch": (events.EpochDone, 2, NEVER, [1]),
    "in the first epoch": (events.StepsDone, 5, EVERY_STEP, [0]),
    "in the last epoch": (events.StepsDone, 15, EVERY_STEP, [2]),
    "between two records": (events.RunFinished, 1, NEVER, []),
}


@pytest.mark.parametrize("where", INTERRUPTIONS)
def test_interrupted_and_resumed_is_straight(recipe, train, monkeypatch, where):
    event, nth, interval, goes_on_in = INTERRUPTIONS[where]
    both = [recipe(19, "training.max_epochs=3"), recipe(30, "training.max_epochs=3")]
    straight = train(both, "straight")
    monkeypatch.setattr(bank_session, "CHECK_EVERY", 1)
    with pytest.raises(Interrupted):
        train(both, "broken", save_interval=interval, listener=interrupt_at(event, nth))
    starts = []
    resumed = train(both, "broken", listener=collect(events.TrainingStarted, starts))
    for one, other in zip(straight, resumed, strict=True):
        assert _same(one.result(), other.result())
        assert len(_records(other.log_file)) == 3
        assert {path.name for path in other.folder.iterdir()} == FILES
    assert [event.epoch for event in starts] == goes_on_in


def test_a_bank_whose_members_left_at_different_times_resumes(recipe, train):
    """To the bit: the one that stopped early has the larger rank, and is tested in one bank with the other."""
    both = [recipe(32, "training.max_epochs=1"), recipe(13, "training.max_epochs=3")]
    straight = train(both, "straight")
    with pytest.raises(Interrupted):
        train(both, "broken", listener=interrupt_at(events.EpochDone, 3))
    for one, other in zip(straight, train(both, "broken"), strict=True):
        assert _same(one.result(), other.result())
        assert one.predictions_file.read_text() == other.predictions_file.read_text()


def test_a_finished_run_is_skipped(recipe, train):
    (run,) = train([recipe(30)])
    before = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")}
    reported = []
    train([recipe(30)], listener=reported.append)
    assert [type(event) for event in reported] == [events.RunSkipped]
    assert {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")} == before


def test_a_folder_of_another_recipe_is_refused(recipe, train, tmp_path):
    (run,) = train([recipe(30)])
    before = run.result()
    with pytest.raises(UserError, match=r"another recipe \(training.seed is 42 there and 1 here\).*--results"):
        train([recipe(13), recipe(30, "training.seed=1")])
    assert run.result() == before
    assert not (tmp_path / "results" / "iconqa" / "13").exists()


def test_two_recipes_of_one_name_are_refused(recipe, train, tmp_path):
    with pytest.raises(UserError, match="two of the recipes have the same"):
        train([recipe(30), recipe(30, "training.seed=1")])
    assert not (tmp_path / "results").exists()


def test_early_stop_leaves_the_bank_alone(recipe, train):
    """One stops for want of progress, one goes on to its end as if it had been alone."""
    still = recipe(13, "training.learning_rate=1e-9", "training.max_epochs=4", "training.patience=2")
    going = recipe(32, "training.max_epochs=4", "training.patience=4")
    epochs = []
    runs = train([still, going], listener=collect(events.EpochDone, epochs))
    stopped, went = (run.result() for run in runs)
    assert (stopped["epochs"], stopped["best_epoch"]) == (3, 1)
    assert went["epochs"] == 4
    last = [[result.experiment for result in epoch.results if result.is_last] for epoch in epochs]
    assert last == [[], [], ["13"], ["32"]]
    (alone,) = train([going], "alone")
    _close(runs[1], alone, 1e-4)


@pytest.mark.parametrize(
    ("batch", "what"),
    [(2, "loss in epoch 1, in the batch of questions 1"), (12, "scores in the validation of epoch 1")],
)
def test_a_broken_experiment_leaves_with_a_reason_and_the_others_go_on(recipe, train, batch, what):
    size = f"training.batch_size={batch}"
    good, bad = recipe(13, size), recipe(30, size, "training.learning_rate=1e30")
    failures = []
    runs = train([good, bad], listener=collect(events.RunFailed, failures))
    assert [event.recipe.experiment for event in failures] == ["30"]
    reason = json.loads(runs[1].failure_file.read_text())["reason"]
    assert reason == failures[0].reason == runs[1].failure()
    assert reason.startswith(f"non-finite {what}")
    assert "lower training.learning_rate" in reason
    assert (runs[0].state(), runs[1].state()) == ("finished", "new"), "what failed at once leaves its folder free"
    assert not runs[0].failure_file.exists()
    (alone,) = train([good], "alone")
    _close(runs[0], alone, 1e-4)


@pytest.mark.parametrize(("interval", "state"), [(NEVER, "new"), (EVERY_STEP, "started")])
def test_all_experiments_may_break(recipe, train, interval, state):
    """Before or after their first checkpoint, which is of the step before the loss is known."""
    runs = train([recipe(n, "training.learning_rate=1e30") for n in (13, 30)], save_interval=interval)
    assert [run.state() for run in runs] == [state, state]
    assert all(run.failure_file.exists() for run in runs)


def test_a_failure_of_before_is_forgotten(recipe, train):
    (run,) = train([recipe(13)])
    run.result_file.unlink()
    run.fail("the machine went down")
    train([recipe(13)])
    assert run.state() == "finished"
    assert not run.failure_file.exists()


CHECKPOINTING = "performance.checkpointing=[query, answer]"


def _facts(run: Run) -> dict[str, Any]:
    """What a run recorded of its training, without the clock and the recipe's performance."""
    result = run.result()
    history = [{k: v for k, v in line.items() if k != "seconds"} for line in result["history"]]
    return {"history": history, "metrics": result["metrics"], "adapter": result["adapter_sha256"]}


def test_a_run_with_checkpointing_is_the_run_without(recipe, train, family):
    experiment = recipe(15 if family == "t5" else 47, family=family)
    (expected,) = train([experiment], "plain")
    (run,) = train([experiment.override([CHECKPOINTING])], "checkpointed")
    assert _facts(run) == _facts(expected)
    assert run.predictions_file.read_text() == expected.predictions_file.read_text()
    assert run.recipe().performance.checkpointing == ("query", "answer")


def test_a_run_with_padding_is_the_run_without_but_for_rounding(recipe, train, family):
    experiment = recipe(15 if family == "t5" else 47, "training.dropout=false", family=family)
    (expected,) = train([experiment], "plain")
    (run,) = train([experiment.override(["performance.pad_to_multiple_of=16"])], "padded")
    _close(run, expected, 1e-4)


def test_a_checkpointed_and_padded_run_is_resumed(recipe, train, monkeypatch):
    experiment = recipe(30, CHECKPOINTING, "performance.pad_to_multiple_of=8")
    (straight,) = train([experiment], "straight")
    monkeypatch.setattr(bank_session, "CHECK_EVERY", 1)
    with pytest.raises(Interrupted):
        train([experiment], "broken", save_interval=EVERY_STEP, listener=interrupt_at(events.StepsDone, 4))
    (resumed,) = train([experiment], "broken")
    assert _same(straight.result(), resumed.result())


def test_recipes_of_different_performance_train_in_banks_of_their_own(recipe, train):
    """On the one model of a model_cache: what a bank changes in it is gone when the next begins."""
    recipes = [recipe(13), recipe(19, CHECKPOINTING), recipe(30), recipe(32, "performance.pad_to_multiple_of=64")]
    starts = []
    runs = train(recipes, listener=collect(events.TrainingStarted, starts))
    banks = [event.recipes for event in starts]
    assert sorted(len(bank) for bank in banks) == [1, 1, 2]
    assert all(len({member.performance for member in bank}) == 1 for bank in banks)
    for run, experiment in zip(runs, recipes, strict=True):
        (single_run,) = train([experiment], "alone")
        _close(run, single_run, 1e-4)


def test_a_run_of_version_0_1_is_finished_or_goes_on(recipe, train):
    """Its recipe has no section for performance, which means the defaults."""
    experiment, interrupted = recipe(30), recipe(13)
    (run,) = train([experiment])
    with pytest.raises(Interrupted):
        train([interrupted], listener=interrupt_at(events.EpochDone, 1))
    interrupted_run = Run(run.folder.parent / "13")
    for folder in (run, interrupted_run):
        values = yaml.safe_load(folder.recipe_file.read_text())
        del values["performance"]
        folder.recipe_file.write_text(yaml.safe_dump(values))
    reported = []
    train([experiment, interrupted], listener=reported.append)
    ends = [type(event) for event in reported if isinstance(event, events.RunSkipped | events.RunFinished)]
    assert ends == [events.RunSkipped, events.RunFinished]
    assert interrupted_run.state() == "finished"
    with pytest.raises(UserError, match=r"another recipe \(performance.pad_to_multiple_of is 1 there and 8 here\)"):
        train([experiment.override(["performance.pad_to_multiple_of=8"])])


@pytest.mark.slow
def test_a_compiled_run_is_the_run_without_but_for_rounding(recipe, train, fresh_compiler):
    experiment = recipe(15, "training.dropout=false")
    (expected,) = train([experiment], "plain")
    (run,) = train([experiment.override(["performance.compile=true", "performance.pad_to_multiple_of=64"])], "compiled")
    _close(run, expected, 1e-4)


def _out_of_memory(*_: Any, **__: Any) -> None:
    raise torch.OutOfMemoryError("no memory is left")


class Full(torch.Tensor):
    """Values of a bank that memory has no room to copy."""

    clone = _out_of_memory


def _without_room_for_the_best_epoch(*arguments: Any) -> Stepper:
    stepper = Stepper(*arguments)
    stepper.bank.values = stepper.bank.values.as_subclass(Full)
    return stepper


# What memory is too small for, and what fails then.
PLACES = {
    "the trained tensors": (bank_module.Bank, "_allocate", _out_of_memory),
    "the optimizer": (step_module, "BankAdamW", _out_of_memory),
    "the best epoch": (bank_session, "Stepper", _without_room_for_the_best_epoch),
    "the first step": (Stepper, "step", _out_of_memory),
    "validation": (bank_session.evaluate_split, "validate", _out_of_memory),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_bank_too_large_for_memory_is_told_and_the_model_is_whole(recipe, train, tmp_path, monkeypatch, place):
    """The sentence says what to do, and the model of the model_cache trains the next experiments as a fresh one."""
    model_cache = ModelCache("cpu", store=tmp_path / "features")
    recipes = [recipe(13), recipe(30)]
    backbone = model_cache.backbone(recipes[0])
    modules, queries = dict(backbone.hf.named_modules()), backbone.hf.query_tokens
    owner, name, failure = PLACES[place]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failure)
        with pytest.raises(UserError, match="2 experiments at once need more memory than cpu has; train") as error:
            train(recipes, model_cache=model_cache)
    assert "\n" not in str(error.value)
    assert dict(backbone.hf.named_modules()) == modules
    assert backbone.hf.query_tokens is queries
    assert not any(parameter.requires_grad for parameter in backbone.hf.parameters())
    assert not backbone.hf.training
    runs = train(recipes, model_cache=model_cache)
    for run, expected in zip(runs, train(recipes, "fresh"), strict=True):
        assert _facts(run) == _facts(expected)


def test_too_few_questions_for_a_batch(recipe, train, tmp_path):
    with pytest.raises(UserError, match=r"12 training questions are fewer than one batch of 16; .*training.batch_size"):
        train([recipe(13, "training.batch_size=8", "training.accumulation=2")])
    assert not (tmp_path / "results").exists()


def test_open_questions_cannot_be_ranked(recipe, train, tmp_path):
    data = tmp_path / "own"
    data.mkdir()
    Image.new("RGB", (8, 8)).save(data / "a.png")
    line = {"image": "a.png", "question": "What?", "answer": "this"}
    for split in ("train", "val", "test"):
        lines = [{"id": f"{split}{n}", **line} for n in range(2)]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in lines))
    mine = recipe(13, "data.name=own", "data.prompt=vqa-v1", "experiment=mine")
    with pytest.raises(UserError, match="own val val0 has no choices, but ranking needs them"):
        train([mine], data=data)
    assert not (tmp_path / "results").exists()


def test_a_damaged_picture_leaves_no_half_written_file(recipe, train, iconqa, tmp_path):
    import shutil

    data = Path(shutil.copytree(iconqa, tmp_path / "data"))
    picture = sorted((data / "train").rglob("*.png"))[3]
    picture.write_bytes(picture.read_bytes()[:-50])
    with pytest.raises(UserError, match=rf"{picture.parent.name}/image.png is damaged"):
        train([recipe(13)], data=data)
    left = {path.name for path in (tmp_path / "results" / "iconqa" / "13").iterdir()}
    assert left <= {"recipe.yaml", "data.json"}


@pytest.mark.parametrize("change", ["data.prompt=scienceqa", "model.name=nowhere", "training.precision=fp16"])
def test_a_wrong_recipe_is_told(recipe, train, change):
    with pytest.raises(UserError):
        train([recipe(13, change)])


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real data at {SHARED}")
def test_a_checkpoint_of_the_hubs_format_trains_on_real_questions(hub_like, family, train, tmp_path):
    blipfit_data.prepare("scienceqa", SHARED / "scienceqa", tmp_path / "sqa")
    recipe = grid.recipe("scienceqa", 15 if family == "t5" else 47, str(hub_like[family]))
    recipe = recipe.override(["training.batch_size=2", "training.max_epochs=1", "data.limit=4"])
    (run,) = train([recipe], data=tmp_path / "sqa")
    result = run.result()
    assert math.isfinite(result["history"][0]["loss"])
    assert result["metrics"]["test"]["questions"] == 4
    assert result["prompt_example"].startswith("Context: {")
    assert result["metrics"]["test"]["by"]["leaderboard"]["IMG"]["questions"] == 4


ADALORA = ("adapter.method=adalora", "adapter.adalora.delta_t=2", "training.max_epochs=3")


def test_adalora_interrupted_and_resumed_is_straight(recipe, train, monkeypatch):
    """Bit for bit: importances, masks and ranks live in the checkpoint, here of a step between two allocations."""
    both = [recipe(22, *ADALORA), recipe(30, *ADALORA)]
    straight = train(both, "straight")
    monkeypatch.setattr(bank_session, "CHECK_EVERY", 1)
    with pytest.raises(Interrupted):
        train(both, "broken", save_interval=EVERY_STEP, listener=interrupt_at(events.StepsDone, 8))
    for one, other in zip(straight, train(both, "broken"), strict=True):
        assert _same(one.result(), other.result())
        assert one.ranks_file.read_text() == other.ranks_file.read_text()
        assert one.predictions_file.read_text() == other.predictions_file.read_text()


def test_adalora_runs_end_at_their_budget(recipe, train):
    """In a bank as alone; the tested epoch has the final ranks, and no better epoch before counts."""
    several = [recipe(22, *ADALORA), recipe(31, *ADALORA, "training.patience=1"), recipe(16)]
    runs = train(several)
    for run, mine in zip(runs[:2], several, strict=False):
        result = run.result()
        layers = len(result["ranks"])
        assert sum(result["ranks"].values()) == round(mine.adapter.mean_rank * layers)
        kept = json.loads(run.ranks_file.read_text())["ranks"]
        assert sum(kept[0]) > sum(kept[-1]) == result["history"][-1]["ranks_kept"]
        assert result["best_epoch"] >= 2  # 18 steps: the ranks are final after the ninth
        values = {n: t for n, t in _tensors(run).items() if n.endswith("lora_E")}
        for name, tensor in values.items():
            assert tensor.count_nonzero() <= result["ranks"][name.removesuffix(".lora_E")]
    (alone,) = train(several[:1], "alone")
    _close(runs[0], alone, 1e-4)
    assert alone.ranks_file.read_text() == runs[0].ranks_file.read_text()
    assert "ranks" not in runs[2].result()


def test_a_training_too_short_for_adalora_is_told(recipe, train, tmp_path):
    with pytest.raises(UserError, match="none of the 18 optimizer steps is left"):
        train([recipe(30, *ADALORA, "adapter.adalora.tinit=18")])
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("method", ["dora", "rslora", "pissa", "ia3"])
def test_a_peft_method_interrupted_and_resumed_is_straight(recipe, train, monkeypatch, method):
    """Two runs of it, each in a bank of its own; the second is stopped between two steps."""
    both = [recipe(n, f"adapter.method={method}", "adapter.rank=8", "training.max_epochs=3") for n in (20, 32)]
    straight = train(both, "straight")
    monkeypatch.setattr(bank_session, "CHECK_EVERY", 1)
    with pytest.raises(Interrupted):
        train(both, "broken", save_interval=EVERY_STEP, listener=interrupt_at(events.StepsDone, 26))
    starts = []
    resumed = train(both, "broken", listener=collect(events.TrainingStarted, starts))
    assert [(len(event.runs), event.epoch, event.step) for event in starts] == [(1, 1, 1)]
    for one, other in zip(straight, resumed, strict=True):
        assert _same(one.result(), other.result())
        assert one.predictions_file.read_text() == other.predictions_file.read_text()
        assert {path.name for path in other.folder.iterdir()} == FILES


@pytest.mark.parametrize("method", ["dora", "rslora", "pissa", "ia3"])
def test_a_run_of_a_peft_method_is_used_like_any_other(recipe, train, family, small, iconqa, method):
    """SplitEvaluation again from its folder, counted, and loaded by hand it is what was recorded."""
    import blipfit
    from blipfit.commands import evaluate, show

    mine = recipe(
        32 if family == "t5" else 64, f"adapter.method={method}", "training.learning_rate=5e-3", family=family
    )
    (run,) = train([mine])
    result, plain = run.result(), checkpoints.load(small[family])
    assert result["trained_parameters"] == show.run(mine)["trained_parameters"]
    shared = sum(p.numel() for n, p in plain.hf.named_parameters() if n in _tensors(run))
    added = result["total_parameters"] - sum(p.numel() for p in plain.hf.parameters())
    assert added == result["trained_parameters"] - shared > 0
    again = evaluate.run(run.folder, iconqa, "test", torch.device("cpu"), base=True)
    assert again["tuned"] == result["metrics"]["test"]
    line = next(line for line in _records(run.predictions_file) if line["split"] == "test")
    (question,) = (q for q in iconqa_data.load(iconqa, "test") if q.id == line["id"])
    model = blipfit.load(adapter=run.folder, device="cpu")
    ranked = {one.choice: one.log_likelihood for one in model.rank(question.image, question.question, question.choices)}
    recorded = [candidate["sum"] for candidate in line["candidates"]]
    # Recorded from stored features, which have 16 bits.
    assert [ranked[choice] for choice in question.choices] == pytest.approx(recorded, rel=1e-4)
