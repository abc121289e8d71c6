"""A step is the same however it runs: its layers checkpointed or compiled, its batches padded to a multiple."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import checkpoints
import reference
from blipfit.adapters.bank import Bank
from blipfit.data.batches import EncodedQuestion
from blipfit.recipe import AdapterConfig, DataConfig, ModelConfig, Recipe
from blipfit.training import distillation
from blipfit.training import step as step_module
from blipfit.training.step import Stepper

LORA = [
    AdapterConfig(qformer=("self_attn", "cross_attn", "ffn"), llm=("attn", "ffn"), rank=2),
    AdapterConfig(qformer=("ffn",), llm=("attn",), rank=4),
]
FULL = [AdapterConfig(qformer="full", llm=("ffn",), rank=2), AdapterConfig(qformer="full", rank=4)]
ADALORA = [AdapterConfig(qformer=("ffn",), llm=("attn",), rank=2, method="adalora")]
DORA = [AdapterConfig(qformer=("ffn",), llm=("attn",), rank=8, method="dora")]

NO_DROPOUT = "training.dropout=false"
QUESTIONS, BATCH = 6, 2
"""So an epoch has three steps, whose texts have different lengths."""


@dataclass(frozen=True)
class Outcome:
    """What some steps of a bank left: losses and gradients of every step, and the values after the last."""

    losses: Tensor
    """Steps × K, summed over the labels."""
    gradients: list[Tensor]
    values: Tensor


class Walk:
    """A bank in training on a few questions, through the stepper."""

    def __init__(self, folder: Path, adapters: Sequence[AdapterConfig], *changes: str):
        self.backbone = checkpoints.load(folder)
        self.encoded = reference.ask(self.backbone, QUESTIONS)
        self.features = self.backbone.see(reference.pictures(self.backbone, QUESTIONS))
        self.stepper = Stepper(self.backbone, _recipes(folder, adapters, *changes), self.encoded)
        self.stepper.train_mode()

    @property
    def bank(self) -> Bank:
        return self.stepper.bank

    @property
    def layers(self) -> list[nn.Module]:
        return [*self.backbone.layers("query"), *self.backbone.layers("answer")]

    def step(self, step: int, batch: Sequence[int] | None = None, epoch: int = 0) -> Tensor:
        """Take a step on the questions of its place, or on others; losses (K)."""
        questions = batch or [(BATCH * step + i) % QUESTIONS for i in range(BATCH)]
        size = self.stepper.training.batch_size
        micros = [questions[start : start + size] for start in range(0, len(questions), size)]
        return self.stepper.step(questions, [self.features[micro] for micro in micros], epoch, step)[0]

    def steps(self, *numbers: int, epoch: int = 0) -> Outcome:
        losses, gradients = [], []
        for number in numbers or range(3):
            losses.append(self.step(number, epoch=epoch))
            gradients.append(self.bank.grads.clone())
        return Outcome(torch.stack(losses), gradients, self.bank.values.clone())


def _recipes(folder: Path, adapters: Sequence[AdapterConfig], *changes: str) -> list[Recipe]:
    data = DataConfig(name="iconqa", prompt="iconqa-v1")
    recipes = [
        Recipe(experiment=str(number), model=ModelConfig(name=str(folder)), data=data, adapter=adapter)
        for number, adapter in enumerate(adapters)
    ]
    settings = [f"training.batch_size={BATCH}", "training.learning_rate=0.001", *changes]
    return [recipe.override(settings) for recipe in recipes]


def _same_to_the_bit(outcome: Outcome, other: Outcome) -> bool:
    return (
        torch.equal(outcome.losses, other.losses)
        and all(map(torch.equal, outcome.gradients, other.gradients))
        and torch.equal(outcome.values, other.values)
    )


def _close(outcome: Outcome, other: Outcome) -> None:
    """The same up to the rounding of fp32."""
    torch.testing.assert_close(outcome.losses, other.losses, atol=1e-4, rtol=1e-5)
    for step, gradients in enumerate(zip(outcome.gradients, other.gradients, strict=True)):
        torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-3, msg=lambda text, step=step: f"{step}: {text}")
    # AdamW divides by a gradient's size, so where that is next to zero its rounding decides the direction.
    changed = (outcome.values - other.values).abs()
    assert changed.max() < 5e-3
    assert changed.mean() < 1e-6


# -------------------------------------------------------------- checkpointing

STAGES = ("[query]", "[answer]", "[query, answer]")
BANKS = {"LoRA": LORA, "full Q-Formers": FULL, "AdaLoRA": ADALORA, "DoRA": DORA}


@pytest.mark.parametrize("dropout", ["true", "false"])
@pytest.mark.parametrize("stages", STAGES)
def test_checkpointing_changes_no_bit(small, family, stages, dropout):
    """The noise of the first computation comes again in the second, and the generator goes on as without."""
    dropout = f"training.dropout={dropout}"
    expected = Walk(small[family], LORA, dropout).steps()
    outcome = Walk(small[family], LORA, dropout, f"performance.checkpointing={stages}").steps()
    assert _same_to_the_bit(outcome, expected)
    assert all(gradient.any() for gradient in outcome.gradients)


@pytest.mark.parametrize("bank", ["full Q-Formers", "AdaLoRA", "DoRA"])
def test_checkpointing_changes_no_bit_of_other_banks(small, family, bank):
    expected = Walk(small[family], BANKS[bank]).steps()
    outcome = Walk(small[family], BANKS[bank], "performance.checkpointing=[query, answer]").steps()
    assert _same_to_the_bit(outcome, expected)


def test_checkpointing_changes_no_bit_of_micro_batches(small, family):
    changes = ["training.batch_size=1", "training.accumulation=2"]
    expected = Walk(small[family], LORA, *changes).steps()
    outcome = Walk(small[family], LORA, *changes, "performance.checkpointing=[query, answer]").steps()
    assert _same_to_the_bit(outcome, expected)


@pytest.mark.parametrize("dropout", ["true", "false"])
def test_checkpointing_keeps_fewer_bytes_for_the_backward_pass(small, family, dropout):
    byte_counts = {}
    for stages in ("[]", *STAGES):
        walk = Walk(small[family], LORA, f"training.dropout={dropout}", f"performance.checkpointing={stages}")
        byte_counts[stages] = _kept_bytes(walk)
    assert 0 < byte_counts["[query, answer]"] < min(byte_counts["[query]"], byte_counts["[answer]"])
    assert max(byte_counts["[query]"], byte_counts["[answer]"]) < byte_counts["[]"]
    assert byte_counts["[query, answer]"] < 0.5 * byte_counts["[]"]


def _kept_bytes(walk: Walk) -> int:
    """Bytes that autograd keeps in a step: each storage once, weights not at all."""
    weights = {p.untyped_storage().data_ptr() for p in [*walk.backbone.hf.parameters(), walk.bank.values]}
    storages: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        walk.step(0)
    return sum(storage.nbytes() for storage in storages.values())


def test_a_bank_with_dropout_and_checkpointing_is_its_experiments_alone(small, family):
    change = "performance.checkpointing=[query, answer]"
    losses = Walk(small[family], LORA, change).steps().losses
    for k, adapter in enumerate(LORA):
        single = Walk(small[family], [adapter], change).steps().losses
        torch.testing.assert_close(losses[:, k], single[:, 0], atol=1e-3, rtol=1e-5)


def test_layers_are_changed_in_a_step_alone(small, family):
    """Judging between two steps meets the layers' own forward pass, after a step that failed too."""
    walk = Walk(small[family], LORA, "performance.checkpointing=[query, answer]")
    assert not _changed(walk)
    change_counts = []
    handle = walk.layers[0].register_forward_pre_hook(lambda *_: change_counts.append(_changed(walk)))
    walk.step(0)
    handle.remove()
    assert change_counts
    assert set(change_counts) == {len(walk.layers)}
    assert not _changed(walk)
    with pytest.raises((RuntimeError, ValueError)):
        walk.stepper.step([0, 1], [walk.features[:1]], 0, 1)  # features of one question
    assert not _changed(walk)
    walk.stepper.remove()
    assert not _changed(walk)


def _changed(walk: Walk) -> int:
    return sum("forward" in layer.__dict__ for layer in walk.layers)


def test_evaluation_between_steps_is_unaffected(small, family):
    """A trained bank has the same scores and says the same, whether its training was checkpointed or not."""

    def judge(*changes: str) -> tuple[Tensor, Tensor]:
        walk = Walk(small[family], LORA, *changes)
        walk.step(0)
        walk.backbone.hf.eval()
        backbone = walk.backbone
        candidates = backbone.text.candidates(walk.encoded)
        prompts = backbone.text.prompts(walk.encoded)
        with torch.no_grad():
            scores = backbone.score_candidates(backbone.query(walk.features, candidates), candidates).sums_KM
            texts = backbone.generate(backbone.query(walk.features, prompts), prompts, max_new_tokens=3)
        walk.step(1)
        return scores, texts

    expected = judge()
    assert all(map(torch.equal, judge("performance.checkpointing=[query, answer]"), expected))


def test_experiments_leave_a_checkpointed_bank(small, family):
    def outcome(*changes: str) -> Outcome:
        walk = Walk(small[family], LORA, *changes)
        walk.step(0)
        walk.stepper.keep_experiments([1], walk.stepper.optimizer.steps)
        return walk.steps(1, 2)

    expected = outcome()
    assert expected.losses.shape == (2, 1)
    assert _same_to_the_bit(outcome("performance.checkpointing=[query, answer]"), expected)


# -------------------------------------------------------------------- padding


class Shapes:
    """Spies on the training batches that a walk makes."""

    def __init__(self, walk: Walk, monkeypatch: pytest.MonkeyPatch):
        self.batches, original = [], walk.backbone.text.targets

        def targets(encoded: Sequence[EncodedQuestion], multiple: int, rows: slice):
            self.batches.append(original(encoded, multiple, rows))
            return self.batches[-1]

        monkeypatch.setattr(walk.backbone.text, "targets", targets)


@pytest.mark.parametrize("multiple", [4, 16, 64])
@pytest.mark.parametrize("bank", ["LoRA", "full Q-Formers"])
def test_padding_to_a_multiple_changes_rounding_alone(small, family, monkeypatch, bank, multiple):
    expected = Walk(small[family], BANKS[bank], NO_DROPOUT).steps()
    walk = Walk(small[family], BANKS[bank], NO_DROPOUT, f"performance.pad_to_multiple_of={multiple}")
    shapes = Shapes(walk, monkeypatch)
    outcome = walk.steps()
    _close(outcome, expected)
    assert len(shapes.batches) == 3
    for batch in shapes.batches:
        assert batch.qformer_ids_BT.shape[1] % multiple == batch.text_ids_BT.shape[1] % multiple == 0
        assert len(batch.labels_N) % multiple == 0
        assert batch.decoder_ids_BA is None or batch.decoder_ids_BA.shape[1] % min(multiple, 8) == 0
    assert any((batch.labels_N == -100).any() for batch in shapes.batches)


def test_padding_of_labels_adds_nothing(small, family):
    """Neither to a loss nor to a gradient, wherever it points; in float64, so that no rounding hides anything."""
    backbone = checkpoints.load(small[family])
    backbone.hf.double()
    bank = Bank(backbone, LORA, [0, 1], dtype=torch.float64)
    for k in range(bank.K):
        for name, tensor in bank.state(k).items():
            if name.endswith("lora_B"):
                bank.tensor(k, name).copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(k)) / 10)
    encoded = reference.ask(backbone, 3)
    features = backbone.see(reference.pictures(backbone, 3))
    plain_batch = backbone.text.targets(encoded)

    def outcome(padding: list[int]) -> tuple[Tensor, Tensor]:
        positions = torch.cat([plain_batch.positions_N, torch.tensor(padding, dtype=torch.long)])
        labels = torch.cat([plain_batch.labels_N, torch.full((len(padding),), -100)])
        batch = replace(plain_batch, positions_N=positions, labels_N=labels)
        bank.grads.zero_()
        losses = backbone.losses(backbone.query(features, batch), batch)
        bank.backward(losses.sum())
        return losses.detach(), bank.grads.clone()

    losses, gradients = outcome([])
    assert gradients.any(dim=1).all()
    for padding in ([0], [0] * 9, [3, 1, 4]):
        padded_losses, padded_gradients = outcome(padding)
        torch.testing.assert_close(padded_losses, losses, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(padded_gradients, gradients, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("weights", [{"labels": 0}, {"visual": 0}, {}], ids=str)
def test_padding_adds_nothing_to_what_a_teacher_teaches(small, family, tmp_path, weights):
    """A padding label has no teacher's answer to come near to."""
    student = checkpoints.load(small[family])
    original = checkpoints.load(
        checkpoints.write(tmp_path / "teacher", family, checkpoints.own_tokenizers(family), seed=1)
    )
    changes = [NO_DROPOUT, *(f"distillation.{name}={value}" for name, value in weights.items())]
    (recipe,) = _recipes(small[family], LORA[:1], *changes)
    teacher = distillation.Teacher(original, recipe.distillation, torch.arange(checkpoints.QUERY_TOKENS))
    encoded, features = reference.ask(student, 3), student.see(reference.pictures(student, 3))

    def losses(multiple: int) -> tuple[Tensor, Tensor]:
        batch = student.text.targets(encoded, multiple)
        with torch.no_grad():
            return teacher.losses(student, student.query(features, batch), features, batch, 7.0)

    torch.testing.assert_close(losses(32), losses(1), atol=1e-3, rtol=1e-5)


def test_the_multiple_of_the_last_bank_is_not_the_next_ones(small, family, monkeypatch):
    """Banks of a sweep share a model, and with it the encoder of texts."""
    walk = Walk(small[family], LORA, "performance.pad_to_multiple_of=64")
    walk.step(0)
    walk.stepper.remove()
    walk.stepper = Stepper(walk.backbone, _recipes(small[family], LORA), walk.encoded)
    shapes = Shapes(walk, monkeypatch)
    walk.step(0)
    (batch,) = shapes.batches
    assert batch.text_mask_BT.any(dim=0).all()
    assert not (batch.labels_N == -100).any()


def test_cuda_graphs_do_nothing_on_a_cpu(small, family):
    expected = Walk(small[family], LORA).steps()
    assert _same_to_the_bit(Walk(small[family], LORA, "performance.cuda_graphs=true").steps(), expected)


# ------------------------------------------------------------ out of memory


@pytest.mark.parametrize(
    ("bank", "component"), [*((bank, "BankAdamW") for bank in BANKS), ("AdaLoRA", "Allocator")], ids="-".join
)
def test_where_memory_does_not_suffice_for_a_bank_the_backbone_is_whole(small, family, monkeypatch, bank, component):
    """The bank itself fits, and what comes after it does not."""
    backbone = checkpoints.load(small[family])
    encoded, recipes = reference.ask(backbone, QUESTIONS), _recipes(small[family], BANKS[bank])
    modules, queries = dict(backbone.hf.named_modules()), backbone.hf.query_tokens
    with monkeypatch.context() as patch:
        patch.setattr(step_module, component, _out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            Stepper(backbone, recipes, encoded)
    assert dict(backbone.hf.named_modules()) == modules
    assert backbone.hf.query_tokens is queries
    assert not any(parameter.requires_grad for parameter in backbone.hf.parameters())
    Stepper(backbone, recipes, encoded).remove()  # as if nothing had been


def _out_of_memory(*_, **__) -> None:
    raise torch.OutOfMemoryError("no memory is left")


# ------------------------------------------------------------------ compiling

COMPILED = "performance.compile=true"


@pytest.mark.slow
def test_compiled_layers_compute_the_same(small, family, fresh_compiler):
    """Over steps of different lengths; a second epoch compiles nothing."""
    expected = Walk(small[family], LORA, NO_DROPOUT).steps(0, 1, 2, 0, 1, 2)
    walk = Walk(small[family], LORA, NO_DROPOUT, COMPILED)
    first_epoch = walk.steps(0, 1, 2)
    with torch._dynamo.config.patch(error_on_recompile=True):
        second_epoch = walk.steps(0, 1, 2)
    outcome = Outcome(
        torch.cat([first_epoch.losses, second_epoch.losses]),
        first_epoch.gradients + second_epoch.gradients,
        walk.bank.values.clone(),
    )
    _close(outcome, expected)
    assert not _changed(walk)
    assert not torch.equal(outcome.values, Walk(small[family], LORA).bank.values)


@pytest.mark.slow
def test_compiled_experiments_share_their_noise(small, family, fresh_compiler):
    """A compiled bank of two is two compiled banks of one; dropout is on."""
    adapters = [AdapterConfig(qformer=("ffn",), llm=("attn",), rank=2, alpha=alpha) for alpha in (4, 32)]
    bank = Walk(small[family], adapters, COMPILED)
    outcome = bank.steps(0, 0)
    assert outcome.losses.isfinite().all()
    assert (outcome.losses[1, 0] - outcome.losses[1, 1]).abs() > 1e-3
    plain = Walk(small[family], adapters, NO_DROPOUT).steps(0, 0)
    assert ((outcome.losses - plain.losses).abs() > 1e-3).all()
    for k, adapter in enumerate(adapters):
        single = Walk(small[family], [adapter], COMPILED)
        torch.testing.assert_close(single.steps(0, 0).losses[:, 0], outcome.losses[:, k], atol=1e-3, rtol=1e-5)
        torch.testing.assert_close(single.bank.grads[0], outcome.gradients[1][k], atol=1e-4, rtol=1e-3)
        for name, tensor in single.bank.state(0).items():
            assert (tensor - bank.bank.tensor(k, name)).abs().mean() < 1e-5, name


@pytest.mark.slow
def test_full_q_formers_compiled_checkpointed_and_padded(small, fresh_compiler):
    """All performance settings of a CPU together."""
    settings = [COMPILED, "performance.pad_to_multiple_of=64", "performance.checkpointing=[query, answer]"]
    expected = Walk(small["t5"], FULL, NO_DROPOUT).steps()
    _close(Walk(small["t5"], FULL, NO_DROPOUT, *settings).steps(), expected)
