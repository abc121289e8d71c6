"""The one training loop: a list of recipes in, finished run folders out. A single run is a list of one.

`K` experiments of the bank, `B` questions of a forward pass.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blipfit import data as datasets
from blipfit.adapters import peft_format
from blipfit.adapters.adalora import Schedule
from blipfit.adapters.bank import Bank
from blipfit.data import prompts
from blipfit.data.encoded_split import EncodedSplit
from blipfit.data.question import Question
from blipfit.errors import UserError
from blipfit.evaluation import protocol
from blipfit.model import loading
from blipfit.model.backbone import Backbone, fingerprint, head
from blipfit.model.image_features import ImageFeatures
from blipfit.recipe import Recipe
from blipfit.run import Run
from blipfit.runtime import distributed, memory
from blipfit.training import checkpoint, distillation, plan, record
from blipfit.training.checkpoint import Progress
from blipfit.training.model_cache import SPLITS, ModelCache
from blipfit.training.optimizer import rate_at
from blipfit.training.record import Finished
from blipfit.training.step import Stepper

Listener = Callable[[str, dict[str, Any]], None]
"""Called with an event's name and facts: `building`, `start`, `step`, `epoch`, `finished`, `failed`, `skipped`."""

CHECK_EVERY = 10
SAVE_SECONDS = 300.0


def train(
    recipes: Sequence[Recipe],
    data: Path,
    results: Path,
    *,
    device: str | torch.device | None = None,
    model_cache: ModelCache | None = None,
    listen: Listener = lambda event, facts: None,
) -> list[Run]:
    """Train, judge and record experiments; those that can share a bank do.

    Finished runs are skipped, interrupted ones continue where they stopped. Before anything is trained, UserError
    where a folder holds another recipe's results. A `model_cache` lends its device, loaded model and features to
    several calls. Returns the runs in the recipes' order; a failed one has `failure.json` and no result.
    """
    runs = [Run.of(results, recipe) for recipe in recipes]
    if len({run.folder for run in runs}) < len(runs):
        raise UserError("two of the recipes have the same data set and experiment name; give each its own name")
    model_cache = model_cache or ModelCache(device)
    if not distributed.is_main():
        listen = _silent
    hashes = check_inputs(recipes, data)
    for run, recipe, digest in zip(runs, recipes, hashes, strict=True):
        run.refuse_other(recipe, digest)
    with ExitStack() as held:
        for run in runs:
            if distributed.is_main() and run.state() != "finished":
                held.enter_context(run.held())
        _train(list(zip(runs, recipes, hashes, strict=True)), model_cache, data, listen)
    memory.give_back()
    return runs


def _train(chosen: Sequence[tuple[Run, Recipe, str]], model_cache: ModelCache, data: Path, listen: Listener) -> None:
    """Claim the folders of what is not finished, and train it; `chosen` with the hashes of its questions."""
    todo: list[Member] = []
    for run, recipe, digest in chosen:
        with distributed.main_first():
            state = run.claim(recipe, digest)
        if state == "finished":
            listen("skipped", {"run": run, "recipe": recipe})
        else:
            run.failure_file.unlink(missing_ok=True)
            todo.append((run, recipe, checkpoint.load(run.checkpoint)))
    distributed.wait()
    with tempfile.TemporaryDirectory() as aside:
        if not distributed.is_main():  # does the same work and writes it where nobody validations
            todo = [(Run.of(Path(aside), recipe).made(), recipe, resumed) for _, recipe, resumed in todo]
        for members in _banks(todo):
            _train_bank(model_cache, members, data, listen)
        distributed.wait()


def _silent(event: str, facts: dict[str, Any]) -> None:
    """What processes beside the main one say."""


Member = tuple[Run, Recipe, tuple[Progress, dict[str, dict[str, Tensor]]] | None]


def _banks(todo: Sequence[Member]) -> list[list[Member]]:
    """Groups that can share a bank: equal keys, equal position."""

    def key(member: Member) -> tuple[Any, ...]:
        resumed = member[2]
        at = (resumed[0].done, resumed[0].epoch, resumed[0].step) if resumed else (False, 0, 0)
        return (*plan.bank_key(member[1]), at)

    return [list(group) for _, group in groupby(sorted(todo, key=key), key=key)]


def check_inputs(recipes: Sequence[Recipe], data: Path) -> list[str]:
    """Fail on broken data or an absent model before a folder is claimed or a model loaded.

    Returns the hash of the questions that each recipe trains and is judged on.
    """
    sets: dict[tuple[str, int | None], tuple[str, dict[str, list[Question]]]] = {}
    for recipe in recipes:
        part = recipe.data
        if (part.name, part.limit) not in sets:
            read = {split: datasets.load(part.name, data, split, part.limit) for split in SPLITS}
            sets[part.name, part.limit] = datasets.fingerprint(read.values()), read
        prompts.prompt(part.prompt)
        _check_questions(recipe, sets[part.name, part.limit][1])
    for model in {recipe.model for recipe in recipes}:
        loading.locate(model)
    for name in {recipe.distillation.teacher for recipe in recipes} - {None}:
        distillation.locate(str(name))
    return [sets[recipe.data.name, recipe.data.limit][0] for recipe in recipes]


def _check_questions(recipe: Recipe, questions: Mapping[str, Sequence[Question]]) -> None:
    """UserError where the questions do not make one batch, or cannot be judged."""
    size, count = recipe.training.batch_size * recipe.training.accumulation, len(questions["train"])
    if recipe.training.batch_size < (several := distributed.state().num_processes):
        raise UserError(f"{several} processes cannot share batches of {recipe.training.batch_size}; launch fewer")
    if count < size:
        raise UserError(
            f"{count} training questions are fewer than one batch of {size}; lower it with --set training.batch_size=…"
        )
    if recipe.adapter.method == "adalora":
        Schedule.of(recipe.adapter, 1, plan.total_steps(count, recipe.training))
    protocol.refuse(recipe.evaluation, recipe.data.name, questions)


def _build_features(image_features: ImageFeatures, encoded_split: EncodedSplit, listen: Listener) -> None:
    """Fill the feature store, saying first how much that is."""
    done = 0

    def progress(count: int) -> None:
        nonlocal done
        done += count
        listen("building", {"done": done})

    image_features.announce = lambda sentence: listen("building", {"sentence": sentence})
    image_features.prepare(encoded_split.questions, progress)


def _train_bank(model_cache: ModelCache, members: Sequence[Member], data: Path, listen: Listener) -> None:
    recipes = [recipe for _, recipe, _ in members]
    backbone = model_cache.backbone(recipes[0])
    head_before = fingerprint(head(backbone.hf))
    splits = model_cache.splits(recipes[0], data)
    training_features, evaluation_features = model_cache.image_features(recipes[0])
    for split, source in zip(SPLITS, (training_features, evaluation_features, evaluation_features), strict=True):
        with distributed.main_first():
            _build_features(source, splits[split], listen)
    session = None
    try:
        session = BankSession(backbone, members, splits, (training_features, evaluation_features), listen)
        session.run()
    except torch.OutOfMemoryError:
        raise UserError(
            f"{len(members)} experiments at once need more memory than {model_cache.device} has; train fewer together "
            "(`blipfit sweep --bank K`), or lower training.batch_size and raise training.accumulation"
        ) from None
    finally:
        if session is not None:
            session.release()
    if fingerprint(head(backbone.hf)) != head_before:
        raise AssertionError("the language model's head changed during training")
    _test(session, head_before)


def _test(session: "BankSession", head_hash: str) -> None:
    """Judge the best epoch of all finished experiments on validation and test, and write their results."""
    done, backbone = session.finished, session.backbone
    if not done:
        return
    bank = Bank(backbone, [one.recipe.adapter for one in done], [0] * len(done))
    try:
        for k, one in enumerate(done):
            before = bank.state(k)
            bank.load_state(k, one.state)
            if not peft_format.changes(one.recipe.adapter, before, one.state):
                raise AssertionError(f"{one.recipe.title}: training changed nothing")  # a defect of ours, never data
        part, see = done[0].recipe.evaluation, session.evaluation_features.features
        judged = {
            split: protocol.evaluate_split(backbone, session.splits[split], see, part) for split in ("val", "test")
        }
    finally:
        bank.remove()
    for k, one in enumerate(done):
        mine = {split: judged[split][k] for split in judged}
        if not all(part.finite for part in mine.values()):
            _fail(one.run, one.recipe, "scores in the test", session.listen)
            continue
        facts = record.write(one, backbone, session.splits, mine, head_hash)
        session.listen("finished", {"run": one.run, "recipe": one.recipe, "result": facts})


def _fail(run: Run, recipe: Recipe, what: str, listen: Listener) -> None:
    reason = f"non-finite {what}; lower training.learning_rate or use precision fp32"
    run.fail(reason)
    listen("failed", {"run": run, "recipe": recipe, "reason": reason})


class BankSession:
    """K experiments from their current position to the end."""

    def __init__(
        self,
        backbone: Backbone,
        members: Sequence[Member],
        splits: dict[str, EncodedSplit],
        image_features: tuple[ImageFeatures, ImageFeatures],
        listen: Listener,
    ):
        self.backbone, self.splits, self.listen = backbone, splits, listen
        self.training_features, self.evaluation_features = image_features
        self.runs = [run for run, _, _ in members]
        self.recipes = [recipe for _, recipe, _ in members]
        self.training = self.recipes[0].training
        self.progress = [Progress() for _ in members]
        self.finished: list[Finished] = []
        self.saved_at = time.monotonic()
        self._pending: list[tuple[list[str], Tensor]] = []
        self.stepper = Stepper(backbone, self.recipes, splits["train"].encoded)
        try:
            self.best = self.bank.values.clone()
            for k, (run, _, resumed) in enumerate(members):
                if resumed:
                    self._restore(k, *resumed)
                epochs = self.progress[k].epoch
                run.truncate_log(lambda line, last=epochs: line["epoch"] <= last)  # type: ignore[misc]
        except BaseException:  # out of memory, above all: the backbone goes back as it was
            self.stepper.remove()
            raise

    @property
    def bank(self) -> Bank:
        return self.stepper.bank

    def release(self) -> None:
        """Give the backbone back as it was, and the memory of training before the test needs some."""
        self.stepper.remove()
        self.backbone.hf.eval()
        del self.stepper, self.best

    # ------------------------------------------------------------- the walk

    def run(self) -> None:
        """Train until every experiment has left the bank."""
        for k in [k for k, p in enumerate(self.progress) if p.done]:
            self._leave(k)
        self._drop([k for k, p in enumerate(self.progress) if p.done])
        if self.runs:
            steps = len(plan.effective_batches(self.splits["train"].lengths, self.training, 0))
            self.listen("start", self._opening(steps))
        while self.runs:
            self._epoch()
            if self.runs:
                self._validate()

    def _epoch(self) -> None:
        """The rest of the current epoch, from the step it stands at."""
        epoch, first = self.progress[0].epoch, self.progress[0].step
        batches = plan.effective_batches(self.splits["train"].lengths, self.training, epoch)
        features = self._features(batches[first:], epoch)
        self.stepper.train_mode()
        for step in range(first, len(batches)):
            self._step(batches[step], features, epoch, step)
            if (step + 1) % CHECK_EVERY == 0 or step + 1 == len(batches):
                self._settle()
                if time.monotonic() - self.saved_at > SAVE_SECONDS and step + 1 < len(batches):
                    self._save_all()
            if not self.runs:
                break
        self.backbone.hf.eval()

    def _features(self, batches: Sequence[Sequence[int]], epoch: int) -> Iterator[Tensor]:
        """Image features of one micro-batch after the other, prepared ahead of their use."""
        questions = self.splits["train"].questions
        micros = [micro for batch in batches for micro in plan.micro_batches(batch, self.training)]
        view = (self.training.seed, epoch) if self.recipes[0].data.images == "shared" else None
        mine = [[questions[i] for i in distributed.shard(micro)] for micro in micros]
        return self.training_features.prefetch(mine, view)

    def _step(self, batch: Sequence[int], features: Iterator[Tensor], epoch: int, step: int) -> None:
        started = time.perf_counter()
        seen = [next(features) for _ in plan.micro_batches(batch, self.training)]
        losses_K, labels = self.stepper.step(batch, seen, epoch, step)
        self._pending.append(([self.splits["train"].questions[i].id for i in batch], losses_K))
        for p in self.progress:
            p.step, p.updates, p.label_count = step + 1, p.updates + 1, p.label_count + labels
            p.seconds += (time.perf_counter() - started) / self.bank.K

    def _settle(self) -> None:
        """Read the losses of the last steps from the device at once; an experiment with a non-finite one leaves."""
        if not self._pending:
            return
        losses = distributed.all_reduce_sum(torch.stack([total for _, total in self._pending])).tolist()
        failed: dict[int, list[str]] = {}
        for (ids, _), row in zip(self._pending, losses, strict=True):
            for k, loss in enumerate(row):
                if loss != loss or abs(loss) == float("inf"):
                    failed.setdefault(k, ids)
                else:
                    self.progress[k].loss_sum += loss
        self._pending.clear()
        p = self.progress[0]
        self.listen(
            "step",
            {"epoch": p.epoch, "step": p.step, "losses": [p.loss_sum / p.label_count for p in self.progress]},
        )
        for k, ids in failed.items():
            named = ", ".join(ids[:8]) + (", …" if len(ids) > 8 else "")
            self._fail(k, f"loss in epoch {p.epoch + 1}, in the batch of questions {named}")
        self._drop(list(failed))

    def _fail(self, k: int, what: str) -> None:
        _fail(self.runs[k], self.recipes[k], what, self.listen)

    # ------------------------------------------------------ judge and retire

    def _validate(self) -> None:
        """Judge the validation split, keep what is best, retire what is done, save the rest."""
        started = time.perf_counter()
        validations = protocol.validate(
            self.backbone, self.splits["val"], self.evaluation_features.features, self.recipes[0].evaluation
        )
        seconds = (time.perf_counter() - started) / self.bank.K
        # A last update may have gone wrong without a loss to show it.
        lost = [k for k, validation in enumerate(validations) if not validation.finite]
        for k in lost:
            self._fail(k, f"scores in the validation of epoch {self.progress[k].epoch + 1}")
        self._drop(lost)
        validations = [validation for validation in validations if validation.finite]
        leaving = []
        for k, (recipe, p, validation) in enumerate(zip(self.recipes, self.progress, validations, strict=True)):
            allocator = self.stepper.allocator
            if allocator and not allocator.settled(k, p.updates):
                pass  # it still has more ranks than its budget: neither the best epoch nor a bad one
            elif validation.score > p.best_score:
                p.best_score, p.best_epoch, p.bad_epochs = validation.score, p.epoch, 0
                self.best[k] = self.bank.values[k]
            else:
                p.bad_epochs += 1
            p.seconds += seconds
            line = {
                "epoch": p.epoch + 1,
                "loss": p.loss_sum / p.label_count,
                validation.measure: validation.value,
                "learning_rate": rate_at(recipe.training, p.epoch),
                "seconds": round(p.seconds, 3),
                **({"ranks_kept": sum(allocator.ranks(k).values())} if allocator else {}),
            }
            p.history.append(line)
            self.runs[k].log(line)
            p.epoch, p.step, p.loss_sum, p.label_count = p.epoch + 1, 0, 0.0, 0
            if p.bad_epochs >= recipe.training.patience or p.epoch >= recipe.training.max_epochs:
                p.done = True
                leaving.append(k)
        if not self.runs:
            return
        self.listen(
            "epoch",
            {
                "epoch": self.progress[0].epoch,
                "experiments": [r.experiment for r in self.recipes],
                "lines": [p.history[-1] for p in self.progress],
                "leaving": [self.recipes[k].experiment for k in leaving],
            },
        )
        self._save_all()
        for k in leaving:
            self._leave(k)
        self._drop(leaving)

    def _leave(self, k: int) -> None:
        """Remember experiment k's best tensors for the test."""
        state = {name: tensor.cpu() for name, tensor in self.bank.state(k, self.best).items()}
        counts = self.bank.trained_parameters(k)
        ranks = self.stepper.allocator.history(k) if self.stepper.allocator else None
        self.finished.append(Finished(self.runs[k], self.recipes[k], self.progress[k], state, counts, ranks))

    def _drop(self, leaving: Sequence[int]) -> None:
        staying = [k for k in range(len(self.runs)) if k not in set(leaving)]
        if len(staying) == len(self.runs):
            return
        if staying:
            self.stepper.keep(staying)
            self.best = self.best[staying].clone()
        self.runs = [self.runs[k] for k in staying]
        self.recipes = [self.recipes[k] for k in staying]
        self.progress = [self.progress[k] for k in staying]

    # ----------------------------------------------------------------- save

    def _save_all(self) -> None:
        self._settle()
        for k, (run, p) in enumerate(zip(self.runs, self.progress, strict=True)):
            groups = {
                "values": self.bank.state(k),
                "best": self.bank.state(k, self.best),
                **self.stepper.optimizer.state(k),
                **(self.stepper.allocator.state(k) if self.stepper.allocator else {}),
            }
            checkpoint.save(run.checkpoint, p, groups)
        self.saved_at = time.monotonic()

    def _restore(self, k: int, progress: Progress, tensors: dict[str, dict[str, Tensor]]) -> None:
        self.progress[k] = progress
        self.bank.load_state(k, tensors["values"])
        self.bank.load_state(k, tensors["best"], self.best)
        self.stepper.optimizer.load_state(k, tensors, progress.updates)
        if self.stepper.allocator:
            self.stepper.allocator.load_state(k, tensors)

    def _opening(self, steps: int) -> dict[str, Any]:
        return {
            "recipes": list(self.recipes),
            "runs": list(self.runs),
            "steps": steps,
            "epoch": self.progress[0].epoch,
            "step": self.progress[0].step,
            "prompt": self.splits["train"].prompted[0].prompt,
            "target": self.splits["train"].prompted[0].target,
            "counts": {split: len(m) for split, m in self.splits.items()},
            "trained": [self.bank.trained_parameters(k) for k in range(self.bank.K)],
            "differs": [record.differences(recipe) for recipe in self.recipes],
            "device": str(self.backbone.device),
        }
