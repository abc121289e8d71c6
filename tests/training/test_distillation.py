"""Learning from the original: what the losses are, and that a smaller model comes nearer to it."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F

import checkpoints
import reference
from blipfit import grid
from blipfit.commands import shrink
from blipfit.errors import UserError
from blipfit.model import loading
from blipfit.recipe import DistillationConfig, ModelConfig
from blipfit.training import bank_member, distillation
from blipfit.training.loop import train
from blipfit.training.step import Stepper

SIZES = {"hidden": 16, "heads": 2, "queries": 2}
SHORT = ["training.max_epochs=1", "training.batch_size=4", "data.images=off", "training.dropout=false"]


@pytest.fixture
def smaller(small, family, tmp_path):
    """A folder with the small model shrunk, query tokens too."""
    shrink.run(str(small[family]), SIZES, "magnitude", None, None, 8, 0, tmp_path / "smaller", torch.device("cpu"))
    return tmp_path / "smaller"


LABELS = 7.0
"""What a question counts, in labels."""


def recipe(model, teacher, experiment="baseline", **weights):
    assignments = [f"distillation.{name}={value}" for name, value in weights.items()]
    return grid.recipe("iconqa", experiment, str(model)).override(
        [*SHORT, f"distillation.teacher={teacher}", *assignments]
    )


def lesson(backbone, count=4):
    encoded = reference.ask(backbone, count)
    return encoded, backbone.see(reference.pictures(backbone, count)), backbone.text.targets(encoded)


def test_losses_by_hand(small, family, smaller):
    student = checkpoints.load(smaller)
    teacher = distillation.load_teacher(recipe(smaller, small[family], visual=3, answers=2, labels=0.5), student)
    _, features, batch = lesson(student)
    with torch.no_grad():
        visual = student.query(features, batch)
        learned, ordinary = teacher.losses(student, visual, features, batch, LABELS)
        wanted = teacher.backbone.query(features, batch)
        taught = teacher.backbone.target_logits(wanted, batch)[0].softmax(-1)
        said = student.target_logits(visual, batch)[0].log_softmax(-1)
    torch.testing.assert_close(ordinary, student.losses(visual, batch))
    divergence = (taught * (taught.log() - said)).sum()
    kept = wanted[:, teacher.queries]
    distance = F.mse_loss(visual, kept) / kept.var() * LABELS * len(visual)
    torch.testing.assert_close(learned[0], 0.5 * ordinary[0] + 2 * divergence + 3 * distance, rtol=1e-4, atol=1e-4)


def test_who_only_learns_to_see_needs_no_language_model(small, family, smaller):
    student = checkpoints.load(smaller)
    teacher = distillation.load_teacher(recipe(smaller, small[family], visual=3, labels=0, answers=0), student)
    _, features, batch = lesson(student)
    with torch.no_grad():
        visual, wanted = student.query(features, batch), teacher.backbone.query(features, batch)
        del student.language, teacher.backbone.language
        learned, told = teacher.losses(student, visual, features, batch, LABELS)
    kept = wanted[:, teacher.queries]
    torch.testing.assert_close(told[0], F.mse_loss(visual, kept) / kept.var() * LABELS * len(visual))
    torch.testing.assert_close(learned, 3 * told)


def test_an_original_that_teaches_itself_has_nothing_to_teach(backbone, small, family):
    teacher = distillation.load_teacher(recipe(small[family], small[family], labels=0), backbone)
    _, features, batch = lesson(backbone)
    learned, _ = teacher.losses(backbone, backbone.query(features, batch), features, batch, LABELS)
    torch.testing.assert_close(learned, torch.zeros(1), atol=1e-4, rtol=0)


def test_a_step_brings_the_student_nearer(small, family, smaller):
    """Without labels: all that is learned comes from the teacher."""
    student = checkpoints.load(smaller)
    chosen = recipe(smaller, small[family], labels=0).override(["training.learning_rate=0.01"])
    encoded, features, batch = lesson(student)
    stepper = Stepper(student, [chosen], encoded)

    def apart():
        with torch.no_grad():
            return float(stepper.teacher.losses(student, student.query(features, batch), features, batch, 1.0)[0])

    before = apart()
    for step in range(10):
        stepper.step(range(4), [features], 0, step)
    assert apart() < 0.8 * before


def test_a_bank_learns_as_each_alone(small, family, smaller):
    student = checkpoints.load(smaller)
    both = [recipe(smaller, small[family], 28), recipe(smaller, small[family], 26)]
    assert bank_member.bank_key(both[0]) == bank_member.bank_key(both[1])
    encoded, features, _ = lesson(student)

    def values(recipes):
        stepper = Stepper(student, recipes, encoded)
        stepper.step(range(4), [features], 0, 0)
        states = [stepper.bank.state(k) for k in range(len(recipes))]
        stepper.bank.remove()
        return [{name: tensor.clone() for name, tensor in state.items()} for state in states]

    for together, alone in zip(values(both), [values([one])[0] for one in both], strict=True):
        for name, tensor in alone.items():
            torch.testing.assert_close(together[name], tensor, atol=1e-5, rtol=1e-4)


def test_other_teachings_share_no_bank(small, smaller, family):
    with_teacher = recipe(smaller, small[family])
    assert bank_member.bank_key(with_teacher) != bank_member.bank_key(with_teacher.override(["distillation.visual=2"]))
    assert DistillationConfig() == grid.recipe("iconqa", 28).distillation


def test_weights_of_both_are_in_memory_once(small, family, smaller):
    student = checkpoints.load(smaller)
    teacher = distillation.load_teacher(recipe(smaller, small[family]), student)
    mine, its = (dict(model.hf.language_model.named_parameters()) for model in (student, teacher.backbone))
    assert all(its[name].data_ptr() == mine[name].data_ptr() for name in its)
    assert teacher.backbone.hf.qformer is not student.hf.qformer


def test_trained_by_the_loop_with_a_run_as_teacher(small, family, smaller, iconqa, tmp_path):
    taught = recipe(small[family], "null", 28)
    (original,) = train([taught], iconqa, tmp_path / "original", device="cpu")
    chosen = recipe(smaller, original.folder, 28)
    (run,) = train([chosen], iconqa, tmp_path / "smaller-results", device="cpu")
    assert run.state() == "finished"
    assert run.result()["recipe"]["distillation"]["teacher"] == str(original.folder)
    (again,) = train([chosen.override(["distillation.teacher=null"])], iconqa, tmp_path / "alone", device="cpu")
    assert again.result()["adapter_sha256"] != run.result()["adapter_sha256"]


def test_the_teacher_is_known_by_its_content(small, family, smaller, iconqa, tmp_path):
    """A continued or skipped run refuses another teacher under the same name: other weights, or another adapter."""
    shutil.copytree(small[family], tmp_path / "model")
    (taught,) = train([recipe(tmp_path / "model", "null", 28)], iconqa, tmp_path / "taught", device="cpu")
    for number, name in enumerate((tmp_path / "model", taught.folder)):
        lessons = [recipe(smaller, name, 28)]
        (run,) = train(lessons, iconqa, tmp_path / f"results-{number}", device="cpu")
        adapter = taught.result()["adapter_sha256"] if number else None
        expected = {"base_sha256": taught.result()["base_sha256"], "adapter_sha256": adapter}
        assert run.result()["teacher"] == json.loads(run.data_file.read_text())["teacher"] == expected
    shutil.rmtree(taught.folder)
    (other,) = train(
        [recipe(tmp_path / "model", "null", 28).override(["training.seed=1"])], iconqa, tmp_path / "taught"
    )
    assert other.folder == taught.folder
    with pytest.raises(UserError, match=r"holds results with another teacher than .*taught/iconqa/28 is now"):
        train(lessons, iconqa, tmp_path / "results-1", device="cpu")
    checkpoints.write(tmp_path / "new", family, checkpoints.own_tokenizers(family), seed=1)
    shutil.copyfile(tmp_path / "new" / "model.safetensors", tmp_path / "model" / "model.safetensors")
    with pytest.raises(UserError, match=r"holds results with another teacher than .*model is now"):
        train([recipe(smaller, tmp_path / "model", 28)], iconqa, tmp_path / "results-0", device="cpu")


def test_the_recipe_of_a_recovery(small, family, smaller, iconqa, tmp_path):
    fast = [*SHORT, "training.max_epochs=4", "training.learning_rate=0.01"]
    recovery = grid.recipe("iconqa", "recover", str(smaller)).override(fast)
    assert recovery.distillation.teacher == str(small[family])
    (run,) = train([recovery], iconqa, tmp_path / "results")
    assert run.state() == "finished"
    first, *_, last = (json.loads(line)["loss"] for line in run.log_file.read_text().splitlines())
    assert last < 0.9 * first


def test_a_teacher_that_is_gone_is_said_before_anything_begins(small, family, smaller, iconqa, tmp_path):
    with pytest.raises(UserError, match=r"the teacher cannot be used: \./gone is not a model folder"):
        train([recipe(smaller, "./gone")], iconqa, tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_what_would_learn_nothing_is_refused(small, family):
    with pytest.raises(UserError, match=r"only the Q-Former is trained"):
        recipe(small[family], small[family], labels=0, answers=0, visual=0)
    with pytest.raises(UserError, match=r"only the Q-Former is trained"):
        recipe(small[family], small[family], experiment=32, labels=0, answers=0)


def test_who_cannot_teach(small, family, smaller, tmp_path):
    student = checkpoints.load(smaller)
    other = checkpoints.write(tmp_path / "other", family, checkpoints.own_tokenizers(family), seed=1)
    with pytest.raises(UserError, match=r"its vision tower differs \(embeddings"):
        distillation.load_teacher(recipe(smaller, other), student)
    (smaller / "shrink.json").unlink()
    with pytest.raises(UserError, match=r"has 4 query tokens and .* 2, and no shrink.json"):
        distillation.load_teacher(recipe(smaller, small[family]), student)
    assert distillation.load_teacher(recipe(smaller, small[family], visual=0), student)
    assert loading.locate_checkpoint(ModelConfig(name=str(smaller)))
