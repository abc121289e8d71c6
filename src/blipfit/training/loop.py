"""The one training loop: a list of recipes in, finished run folders out. A single run is a list of one.

`K` experiments of the bank, `B` questions of a forward pass.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blipfit.adapters import peft_format
from blipfit.adapters.bank import Bank
from blipfit.adapters.dropout import shared_dropout
from blipfit.errors import UserError
from blipfit.evaluation import material, ranking
from blipfit.evaluation.material import Eyes, Material
from blipfit.model import loading
from blipfit.model.backbone import Backbone, fingerprint, head
from blipfit.recipe import Recipe
from blipfit.run import Run
from blipfit.training import checkpoint, plan, record
from blipfit.training.checkpoint import Progress
from blipfit.training.optimiser import BankAdamW, rate_at

Listener = Callable[[str, dict[str, Any]], None]
"""Called with an event's name and facts: `start`, `step`, `epoch`, `finished`, `failed`, `skipped`."""

CHECK_EVERY = 10
SAVE_SECONDS = 300.0


def train(
    recipes: Sequence[Recipe],
    data: Path,
    results: Path,
    *,
    device: str | torch.device | None = None,
    listen: Listener = lambda event, facts: None,
) -> list[Run]:
    """Train, judge and record experiments; those that can share a bank do.

    Finished runs are skipped, interrupted ones continue where they stopped. Before anything is trained, UserError
    where a folder holds another recipe's results. Returns the runs in the recipes' order.
    """
    runs = [Run.of(results, recipe) for recipe in recipes]
    if len({run.folder for run in runs}) < len(runs):
        raise UserError("two of the recipes have the same data set and experiment name; give each its own name")
    device = torch.device(device) if device else default_device()
    _read_all(recipes, data)
    states = [run.claim(recipe) for run, recipe in zip(runs, recipes, strict=True)]
    todo = []
    for run, recipe, state in zip(runs, recipes, states, strict=True):
        if state == "finished":
            listen("skipped", {"run": run, "recipe": recipe})
        else:
            todo.append((run, recipe, checkpoint.load(run.checkpoint)))
    backbone: Backbone | None = None
    for members in _banks(todo):
        backbone = _backbone_for(members[0][1], device, backbone)
        _train_bank(backbone, members, data, listen)
    return runs


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


Member = tuple[Run, Recipe, tuple[Progress, dict[str, dict[str, Tensor]]] | None]


def _banks(todo: Sequence[Member]) -> list[list[Member]]:
    """Groups that can share a bank: equal keys, equal position."""

    def key(member: Member) -> tuple[Any, ...]:
        resumed = member[2]
        at = (resumed[0].done, resumed[0].epoch, resumed[0].step) if resumed else (False, 0, 0)
        return (*plan.bank_key(member[1]), at)

    return [list(group) for _, group in groupby(sorted(todo, key=key), key=key)]


def _read_all(recipes: Sequence[Recipe], data: Path) -> None:
    """Fail on broken data or an absent model before a folder is claimed or a model loaded."""
    for name, limit in {(r.data.name, r.data.limit) for r in recipes}:
        for split in ("train", "val", "test"):
            material.datasets.load(name, data, split, limit)
    for model in {recipe.model for recipe in recipes}:
        loading.locate(model)


def _backbone_for(recipe: Recipe, device: torch.device, loaded: Backbone | None) -> Backbone:
    training = recipe.training
    wanted = (recipe.model, training.precision, training.max_text_tokens, training.max_target_tokens)
    if loaded is None or getattr(loaded, "loaded_as", None) != wanted:
        loaded = loading.load(
            recipe.model, training.precision, device, training.max_text_tokens, training.max_target_tokens
        )
        loaded.loaded_as = wanted  # type: ignore[attr-defined]
    return loaded


def _train_bank(backbone: Backbone, members: Sequence[Member], data: Path, listen: Listener) -> None:
    recipes = [recipe for _, recipe, _ in members]
    splits = {split: material.read(backbone, recipes[0].data, data, split) for split in ("train", "val", "test")}
    head_before = fingerprint(head(backbone.hf))
    bank = Bank(backbone, [r.adapter for r in recipes], [r.training.seed for r in recipes])
    session = BankSession(backbone, bank, members, splits, listen)
    try:
        session.run()
    finally:
        bank.remove()
    if fingerprint(head(backbone.hf)) != head_before:
        raise AssertionError("the language model's head changed during training")
    session.test(head_before)


class BankSession:
    """K experiments from their current position to the end."""

    def __init__(
        self,
        backbone: Backbone,
        bank: Bank,
        members: Sequence[Member],
        splits: dict[str, Material],
        listen: Listener,
    ):
        self.backbone, self.bank, self.splits, self.listen = backbone, bank, splits, listen
        self.runs = [run for run, _, _ in members]
        self.recipes = [recipe for _, recipe, _ in members]
        self.training = self.recipes[0].training
        self.eyes = Eyes(backbone)
        self.optimiser = BankAdamW(bank, [r.training for r in self.recipes])
        self.best = bank.values.clone()
        self.start_values = bank.values.clone()
        self.progress = [Progress() for _ in members]
        self.finished: list[tuple[Run, Recipe, Progress, dict[str, Tensor], dict[str, int]]] = []
        self.saved_at = time.monotonic()
        self._pending: list[tuple[list[str], Tensor]] = []
        for k, (run, _, resumed) in enumerate(members):
            if resumed:
                self._restore(k, run, *resumed)

    # ------------------------------------------------------------- the walk

    def run(self) -> None:
        """Train until every experiment has left the bank."""
        for k in [k for k, p in enumerate(self.progress) if p.done]:
            self._leave(k)
        self._drop([k for k, p in enumerate(self.progress) if p.done])
        steps = len(plan.effective_batches(len(self.splits["train"]), self.training, 0))
        if self.runs and not steps:
            size = self.training.batch_size * self.training.accumulation
            raise UserError(
                f"{len(self.splits['train'])} training questions are fewer than one batch of {size}; "
                "lower it with --set training.batch_size=…"
            )
        if self.runs:
            self.listen("start", self._opening(steps))
        while self.runs:
            self._epoch()
            if self.runs:
                self._validate()

    def _epoch(self) -> None:
        """The rest of the current epoch, from the step it stands at."""
        epoch, first = self.progress[0].epoch, self.progress[0].step
        batches = plan.effective_batches(len(self.splits["train"]), self.training, epoch)
        self.backbone.hf.train(self.training.dropout)
        self.backbone.hf.vision_model.eval()
        with ThreadPoolExecutor(1) as ahead:
            coming = ahead.submit(self._pixels, batches[first], epoch) if first < len(batches) else None
            for step in range(first, len(batches)):
                assert coming is not None
                pixels = coming.result()
                if step + 1 < len(batches):
                    coming = ahead.submit(self._pixels, batches[step + 1], epoch)
                self._step(batches[step], pixels, epoch, step)
                if (step + 1) % CHECK_EVERY == 0 or step + 1 == len(batches):
                    self._settle()
                if not self.runs:
                    return
                if time.monotonic() - self.saved_at > SAVE_SECONDS and step + 1 < len(batches):
                    self._save_all()
        self.backbone.hf.eval()

    def _step(self, batch: Sequence[int], pixels: Sequence[Tensor], epoch: int, step: int) -> None:
        """One optimiser step: the micro-batches' summed losses over all their labels."""
        started = time.perf_counter()
        micros = list(plan.micro_batches(batch, self.training))
        material = self.splits["train"]
        targets = [self.backbone.text.targets([material.encoded[i] for i in micro]) for micro in micros]
        labels = sum(len(target.labels_N) for target in targets)
        self.bank.grads.zero_()
        total = torch.zeros(self.bank.K, device=self.backbone.device, dtype=self.bank.values.dtype)
        for number, (view, target) in enumerate(zip(pixels, targets, strict=True)):
            torch.manual_seed(plan.step_seed(self.training.seed, epoch, step, number))
            target = target.to(self.backbone.device)
            features = self.eyes.see(view)
            with shared_dropout(self.bank.K):
                losses_K = self.backbone.losses(self.backbone.query(features, target), target)
            self.bank.backward(losses_K.sum() / labels)
            total += losses_K.detach()
        self.optimiser.step([rate_at(recipe.training, epoch) for recipe in self.recipes])
        self._pending.append(([material.questions[i].id for i in batch], total))
        for p in self.progress:
            p.step, p.updates, p.label_count = step + 1, p.updates + 1, p.label_count + labels
            p.seconds += (time.perf_counter() - started) / self.bank.K

    def _pixels(self, batch: Sequence[int], epoch: int) -> list[Tensor]:
        """The images of a step, prepared in a thread beside the computation."""
        view = (self.training.seed, epoch) if self.recipes[0].data.images == "shared" else None
        questions = self.splits["train"].questions
        return [
            self.eyes.pixels([questions[i] for i in micro], view) for micro in plan.micro_batches(batch, self.training)
        ]

    def _settle(self) -> None:
        """Read the losses of the last steps from the device at once; an experiment with a non-finite one leaves."""
        if not self._pending:
            return
        losses = torch.stack([total for _, total in self._pending]).tolist()
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
            self._fail(k, ids)
        self._drop(list(failed))

    def _fail(self, k: int, ids: list[str]) -> None:
        p = self.progress[k]
        reason = (
            f"non-finite loss in epoch {p.epoch + 1}, in the batch of questions {', '.join(ids[:8])}"
            f"{', …' if len(ids) > 8 else ''}; lower training.learning_rate or use precision fp32"
        )
        self.runs[k].fail(reason)
        self.listen("failed", {"run": self.runs[k], "recipe": self.recipes[k], "reason": reason})

    # ------------------------------------------------------ judge and retire

    def _validate(self) -> None:
        """Judge the validation split, keep what is best, retire what is done, save the rest."""
        started = time.perf_counter()
        judged = self.judge("val")
        seconds = (time.perf_counter() - started) / self.bank.K
        leaving = []
        for k, (recipe, p, choices) in enumerate(zip(self.recipes, self.progress, judged, strict=True)):
            material = self.splits["val"]
            right = [r["correct"] for r in ranking.predictions(material.questions, material.prompted, choices)]
            score = 100 * sum(right) / len(right)
            if score > p.best_accuracy:
                p.best_accuracy, p.best_epoch, p.bad_epochs = score, p.epoch, 0
                self.best[k] = self.bank.values[k]
            else:
                p.bad_epochs += 1
            p.seconds += seconds
            line = {
                "epoch": p.epoch + 1,
                "loss": p.loss_sum / p.label_count,
                "val_accuracy": score,
                "learning_rate": rate_at(recipe.training, p.epoch),
                "seconds": round(p.seconds, 3),
            }
            p.history.append(line)
            self.runs[k].log(line)
            p.epoch, p.step, p.loss_sum, p.label_count = p.epoch + 1, 0, 0.0, 0
            if p.bad_epochs >= recipe.training.patience or p.epoch >= recipe.training.max_epochs:
                p.done = True
                leaving.append(k)
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

    def judge(self, split: str) -> list[list[ranking.Choice]]:
        """Rank a split's candidates for all experiments in the bank."""
        self.backbone.hf.eval()
        material = self.splits[split]
        return ranking.rank(
            self.backbone,
            material.encoded,
            lambda indices: self.eyes.plain([material.questions[i] for i in indices]),
            self.recipes[0].judging.batch_size,
        )

    def _leave(self, k: int) -> None:
        """Remember experiment k's best tensors for the test."""
        state = {name: tensor.cpu() for name, tensor in self.bank.state(k, self.best).items()}
        counts = self.bank.trained_parameters(k)
        if not peft_format.changes(self.recipes[k].adapter, self.bank.state(k, self.start_values), state):
            raise AssertionError(f"{self.recipes[k].title}: training changed nothing")
        self.finished.append((self.runs[k], self.recipes[k], self.progress[k], state, counts))

    def _drop(self, leaving: Sequence[int]) -> None:
        staying = [k for k in range(len(self.runs)) if k not in set(leaving)]
        if len(staying) == len(self.runs):
            return
        if staying:
            self.bank.keep(staying)
            self.optimiser.keep(staying)
            self.best, self.start_values = self.best[staying].clone(), self.start_values[staying].clone()
        self.runs = [self.runs[k] for k in staying]
        self.recipes = [self.recipes[k] for k in staying]
        self.progress = [self.progress[k] for k in staying]

    def test(self, head_hash: str) -> None:
        """Judge the best epoch of all finished experiments on validation and test, and write their results."""
        if not self.finished:
            return
        self.recipes = [recipe for _, recipe, _, _, _ in self.finished]
        self.bank = Bank(self.backbone, [r.adapter for r in self.recipes], [0] * len(self.recipes))
        try:
            for k, (_, _, _, state, _) in enumerate(self.finished):
                self.bank.load_state(k, state)
            judged = {split: self.judge(split) for split in ("val", "test")}
        finally:
            self.bank.remove()
        for k, (run, recipe, progress, state, counts) in enumerate(self.finished):
            choices = {split: judged[split][k] for split in judged}
            facts = record.write(run, recipe, self.backbone, progress, state, counts, self.splits, choices, head_hash)
            self.listen("finished", {"run": run, "recipe": recipe, "result": facts})

    # ----------------------------------------------------------------- save

    def _save_all(self) -> None:
        self._settle()
        for k, (run, p) in enumerate(zip(self.runs, self.progress, strict=True)):
            groups = {
                "values": self.bank.state(k),
                "best": self.bank.state(k, self.best),
                **self.optimiser.state(k),
            }
            checkpoint.save(run.checkpoint, p, groups)
        self.saved_at = time.monotonic()

    def _restore(self, k: int, run: Run, progress: Progress, tensors: dict[str, dict[str, Tensor]]) -> None:
        self.progress[k] = progress
        self.bank.load_state(k, tensors["values"])
        self.bank.load_state(k, tensors["best"], self.best)
        self.optimiser.load_state(k, tensors, progress.updates)
        run.truncate_log(lambda line: line["epoch"] <= progress.epoch)

    def _opening(self, steps: int) -> dict[str, Any]:
        return {
            "recipes": list(self.recipes),
            "runs": list(self.runs),
            "steps": steps,
            "epoch": self.progress[0].epoch,
            "prompt": self.splits["train"].prompted[0].prompt,
            "target": self.splits["train"].prompted[0].target,
            "counts": {split: len(m) for split, m in self.splits.items()},
            "trained": [self.bank.trained_parameters(k) for k in range(self.bank.K)],
            "differs": [record.differences(recipe) for recipe in self.recipes],
            "device": str(self.backbone.device),
        }
