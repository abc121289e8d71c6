"""On a GPU, in bf16 as users train there: the same numbers whichever way a step is executed, and no waiting in it."""

import copy
from collections.abc import Sequence

import pytest
import torch

import checkpoints
import reference
from blipfit import grid
from blipfit.evaluation import ranking
from blipfit.model.backbone import Backbone
from blipfit.recipe import Recipe
from blipfit.training.loop import train
from blipfit.training.step import Stepper

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible here"),
]
FIRST = {"t5": 13, "vicuna": 45}
SMALL = ["training.batch_size=4", "training.accumulation=1", "training.learning_rate=1e-3"]
# Everything but the sums in the order of the kernels is the same; a bf16 number has eight bits.
LOSS, GRADIENT = 0.003, 0.05
# The compiler keeps in fp32 what eager code rounds to bf16 between two operations; seen on an H200: 0.098.
COMPILED_GRADIENT = 0.15


@pytest.fixture
def gpu_backbone(small, family) -> Backbone:
    return checkpoints.load(small[family], device="cuda")


def recipes(family: str, ids: Sequence[int], *assignments: str) -> list[Recipe]:
    """Experiments of a family by their place in the grid, counted from its first with LoRA alone."""
    return [grid.recipe("icons", FIRST[family] + i, "tiny").override([*SMALL, *assignments]) for i in ids]


def run_steps(backbone: Backbone, experiments: Sequence[Recipe], steps: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses `steps × K` and the bank's values after training on two batches in turn."""
    questions = reference.ask(backbone, 8)
    features = backbone.see(reference.pictures(backbone, 8).to("cuda", torch.bfloat16))
    stepper = Stepper(backbone, experiments, questions)
    try:
        stepper.train_mode()
        losses = []
        for step in range(steps):
            rows = [4 * (step % 2) + i for i in range(4)]
            total, labels = stepper.step(rows, [features[rows]], 0, step)
            losses.append(total / labels)
        return torch.stack(losses), stepper.bank.values.clone()
    finally:
        stepper.remove()
        backbone.hf.eval()


def assert_alike(
    first: tuple[torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor], gradient: float = GRADIENT
) -> None:
    """Equal losses within bf16's rounding, and values that moved alike."""
    torch.testing.assert_close(first[0], second[0], atol=LOSS * float(second[0].max()), rtol=LOSS)
    # AdamW makes steps of a size of its own of gradients that are rounding alone, so single values may differ.
    assert float((first[1] - second[1]).abs().mean()) < gradient * 1e-3


def test_stages_give_the_logits_of_hugging_face_in_bf16(gpu_backbone, small, family):
    backbone = gpu_backbone
    questions, pixels = reference.ask(backbone, 4), reference.pictures(backbone, 4).to("cuda", torch.bfloat16)
    batch = backbone.text.targets(questions).to("cuda")
    with torch.no_grad():
        logits = backbone.target_logits(backbone.query(backbone.see(pixels), batch), batch)[0].float()
    exact = checkpoints.load(small[family])  # fp32 on the CPU
    rows = [(e.qformer, e.training_prompt, e.target) for e in questions]
    with torch.no_grad():
        expected = torch.cat(reference.forward(exact.hf, exact, pixels.float().cpu(), rows)[1])
    difference = (logits.cpu() - expected).norm() / expected.norm()
    assert float(difference) < 0.03


def test_a_bank_trains_as_separate_runs_in_bf16(gpu_backbone, family):
    experiments = recipes(family, (0, 7, 15))
    losses, _ = run_steps(gpu_backbone, experiments)
    for k, experiment in enumerate(experiments):
        alone, _ = run_steps(gpu_backbone, [experiment])
        torch.testing.assert_close(losses[:, k], alone[:, 0], atol=LOSS * float(alone.max()), rtol=LOSS)
    assert float((losses[0] - losses[-2]).abs().min()) > 0


def test_a_fully_trained_q_former_in_a_bank_in_bf16(gpu_backbone, family):
    first = 1 if family == "t5" else 33
    experiments = [grid.recipe("icons", first + i, "tiny").override(SMALL) for i in (0, 4)]
    losses, _ = run_steps(gpu_backbone, experiments)
    for k, experiment in enumerate(experiments):
        alone, _ = run_steps(gpu_backbone, [experiment])
        torch.testing.assert_close(losses[:, k], alone[:, 0], atol=0.1, rtol=0)


def test_a_batch_ranks_as_each_question_alone_in_bf16(gpu_backbone):
    backbone = gpu_backbone
    questions, pixels = reference.ask(backbone, 6), reference.pictures(backbone, 6).to("cuda", torch.bfloat16)

    def rank(rows: list[int]) -> list[ranking.QuestionScores]:
        return ranking.rank(backbone, [questions[i] for i in rows], lambda at: backbone.see(pixels[rows][list(at)]), 4)[
            0
        ]

    together = rank(list(range(6)))
    for i, choice in enumerate(together):
        (alone,) = rank([i])
        assert choice.sums == pytest.approx(alone.sums, abs=0.05, rel=0.01)


@pytest.mark.parametrize(
    "assignments",
    [
        ["performance.pad_to_multiple_of=32"],
        ["performance.checkpointing=[query,answer]"],
        ["performance.cuda_graphs=true"],
        ["performance.cuda_graphs=true", "performance.pad_to_multiple_of=32"],
    ],
    ids=["padded", "checkpointed", "captured", "captured and padded"],
)
def test_a_setting_changes_no_number(gpu_backbone, family, assignments):
    """With dropout, except where padding draws other noise."""
    dropout = [] if "performance.pad_to_multiple_of=32" not in assignments else ["training.dropout=false"]
    plain = run_steps(gpu_backbone, recipes(family, (3, 15), *dropout))
    assert_alike(run_steps(gpu_backbone, recipes(family, (3, 15), *dropout, *assignments)), plain)


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["performance.cuda_graphs=true"]], ids=["compiled", "compiled and captured"])
def test_a_compiled_step_changes_no_number(gpu_backbone, family, more):
    options = ["training.dropout=false", "performance.pad_to_multiple_of=32"]
    plain = run_steps(gpu_backbone, recipes(family, (3, 15), *options))
    compiled = run_steps(gpu_backbone, recipes(family, (3, 15), *options, "performance.compile=true", *more))
    assert_alike(compiled, plain, COMPILED_GRADIENT)


@pytest.mark.slow
def test_a_compiled_bank_shares_its_noise(gpu_backbone, family):
    options = ["performance.pad_to_multiple_of=32", "performance.compile=true"]
    losses, _ = run_steps(gpu_backbone, recipes(family, (3, 15), *options))
    for k, i in enumerate((3, 15)):
        alone, _ = run_steps(gpu_backbone, recipes(family, (i,), *options))
        torch.testing.assert_close(losses[:, k], alone[:, 0], atol=LOSS * float(alone.max()), rtol=LOSS)


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_the_host_never_waits_within_a_step(gpu_backbone, family, method):
    adaptive = ["adapter.method=adalora", "adapter.rank=4", "adapter.adalora.tinit=1", "adapter.adalora.tfinal=1"]
    experiments = recipes(family, (15,), *(adaptive if method == "adalora" else []))
    backbone = gpu_backbone
    questions = reference.ask(backbone, 8)
    features = backbone.see(reference.pictures(backbone, 8).to("cuda", torch.bfloat16))
    stepper = Stepper(backbone, experiments, questions)
    stepper.train_mode()
    try:
        for step in range(2):
            stepper.step([0, 1, 2, 3], [features[:4]], 0, step)
        torch.cuda.set_sync_debug_mode("error")
        stepper.step([4, 5, 6, 7], [features[4:]], 0, 2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        stepper.remove()


def test_adalora_continues_on_a_gpu(gpu_backbone, family):
    """The history of its ranks comes back from a file on the CPU, and goes on with tensors on the GPU."""
    experiments = recipes(
        family,
        (15,),
        *["adapter.method=adalora", "adapter.rank=4", "adapter.adalora.tinit=1", "adapter.adalora.tfinal=1"],
        *["adapter.adalora.delta_t=1", "training.max_epochs=4"],
    )
    backbone = gpu_backbone
    questions = reference.ask(backbone, 8)
    features = backbone.see(reference.pictures(backbone, 8).to("cuda", torch.bfloat16))
    stepper = Stepper(backbone, experiments, questions)
    stepper.train_mode()
    try:
        allocator = stepper.allocator
        for step in range(4):
            stepper.step([0, 1, 2, 3], [features[:4]], 0, step)
        state = {group: {n: t.cpu() for n, t in part.items()} for group, part in allocator.state(0).items()}
        allocator.load_state(0, copy.deepcopy(state))
        for step in range(4, 7):
            stepper.step([4, 5, 6, 7], [features[4:]], 0, step)
        assert len(allocator.history(0)["steps"]) > len(state["allocated"]["steps"])
        assert allocator.state(0)["allocated"]["ranks"].shape[0] == len(allocator.history(0)["steps"])
    finally:
        stepper.remove()


def test_a_whole_training_with_a_resume(small, family, iconqa, tmp_path):
    """`train` on a GPU, from features to results, and the same command again finds it finished."""
    first = FIRST[family]
    experiments = [
        grid.recipe("iconqa", first + i, str(small[family])).override(
            ["training.batch_size=4", "training.accumulation=1", "training.max_epochs=2"]
        )
        for i in (3, 15)
    ]
    runs = train(experiments, iconqa, tmp_path, device="cuda")
    for run in runs:
        result = run.result()
        assert result["metrics"]["test"]["accuracy"] >= 0
        assert torch.cuda.get_device_name() in str(result)
    assert [run.state() for run in train(experiments, iconqa, tmp_path, device="cuda")] == ["finished", "finished"]
