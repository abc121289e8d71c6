"""A bank in training: K experiments from their current position until each has stopped.

`K` experiments of the bank, `P` trained values of one.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from blipfit.adapters.bank import Bank
from blipfit.data import text_warnings
from blipfit.data.encoded_split import EncodedSplit
from blipfit.evaluation import evaluate_split
from blipfit.evaluation.evaluate_split import ValidationResult
from blipfit.evaluation.partial_scores import PartialScores
from blipfit.model.backbone import Backbone
from blipfit.model.image_features import ImageFeatures
from blipfit.recipe import Recipe
from blipfit.run_folder import Run
from blipfit.runtime import distributed, interruption
from blipfit.runtime.save_interval import SaveInterval, SaveTimer
from blipfit.training import batch_order, checkpoint, events, write_result
from blipfit.training.bank_member import Member
from blipfit.training.events import Listener
from blipfit.training.optimizer import rate_at
from blipfit.training.step import Stepper
from blipfit.training.write_result import Finished

CHECK_EVERY = 10
"""Steps from one reading of the losses to the next; in between, the CPU does not wait for the GPU."""


def fail_run(run: Run, recipe: Recipe, subject: str, listener: Listener) -> None:
    """Record that an experiment had to stop because `subject` (a loss, a score) was NaN or infinite."""
    reason = f"non-finite {subject}; lower training.learning_rate or use precision fp32"
    run.fail(reason)
    listener(events.RunFailed(run, recipe, reason))


class BankSession:
    """K experiments from their current position to the end; `finished` collects those that ended normally."""

    def __init__(
        self,
        backbone: Backbone,
        members: Sequence[Member],
        splits: Mapping[str, EncodedSplit],
        image_features: tuple[ImageFeatures, ImageFeatures],
        listener: Listener,
        save_interval: SaveInterval,
    ):
        self.backbone, self.splits, self.listener = backbone, splits, listener
        self.training_features, self.evaluation_features = image_features
        self.members = list(members)
        self.training = self.members[0].recipe.training
        self.text_counts = text_warnings.summarize_texts(backbone.text, splits)
        self.finished: list[Finished] = []
        self.save_interval, self.timer = save_interval, SaveTimer(save_interval)
        self.titles = [member.recipe.title for member in members]
        """Of all experiments that began the session together."""
        self._unread_losses: list[tuple[list[str], Tensor]] = []
        """Question ids and losses (K) of steps that were not read from the device yet."""
        self.stepper = Stepper(backbone, [member.recipe for member in members], splits["train"].encoded)
        try:
            self.best_KP = self.bank.values.clone()
            for k, member in enumerate(self.members):
                self._restore(k, member)
        except BaseException:  # out of memory, above all: the backbone goes back as it was
            self.stepper.remove()
            raise

    @property
    def bank(self) -> Bank:
        return self.stepper.bank

    def release(self) -> None:
        """Give the backbone back as it was, and free the memory of training before the evaluation on the test split."""
        self.stepper.remove()
        self.backbone.hf.eval()
        del self.stepper, self.best_KP

    def run(self) -> None:
        """Train until every experiment has stopped. Raises Interrupted, after saving, if a signal arrives."""
        done = [k for k, member in enumerate(self.members) if member.progress.done]
        self._finish(sorted(done, key=lambda k: self.members[k].progress.epoch))  # in the order in which they stopped
        if self.members:
            if len({member.save_id for member in self.members}) > 1:
                self._save()  # members of different banks: from now on they have a save in common
            self.listener(self._started())
        while self.members:
            self._train_epoch()
            if self.members:
                self._validate()

    def _train_epoch(self) -> None:
        """The rest of the current epoch, from its current step."""
        epoch, first = self.members[0].progress.epoch, self.members[0].progress.step
        batches = batch_order.effective_batches(self.splits["train"].lengths, self.training, epoch)
        features = self._prefetch_features(batches[first:], epoch)
        self.stepper.train_mode()
        for step in range(first, len(batches)):
            self._step(batches[step], features, epoch, step)
            is_last = step + 1 == len(batches)
            self.timer.count_step()
            if (step + 1) % CHECK_EVERY == 0 or is_last:
                self._read_losses()
            if (step + 1) % CHECK_EVERY == 0 or is_last or distributed.state().num_processes == 1:
                self._save_if_due(is_last)
            if not self.members:
                break
        self.backbone.hf.eval()

    def _save_if_due(self, is_epoch_end: bool) -> None:
        """Save if it is time; at the end of an epoch the save after the validation is enough.

        All processes must call this after the same step. Raises Interrupted, after saving, if a signal arrived.
        """
        stops, is_due = map(distributed.any_process, (interruption.is_requested(), self.timer.is_due))
        if stops or (is_due and not is_epoch_end):
            self._save()
        if stops:
            interruption.stop()

    def _prefetch_features(self, batches: Sequence[Sequence[int]], epoch: int) -> Iterator[Tensor]:
        """Image features of one micro-batch after the other, read ahead of their use."""
        questions = self.splits["train"].questions
        micro_batches = [micro for batch in batches for micro in batch_order.micro_batches(batch, self.training)]
        view = (self.training.seed, epoch) if self.members[0].recipe.data.images == "shared" else None
        own_questions = [[questions[i] for i in distributed.own_share(micro)] for micro in micro_batches]
        return self.training_features.prefetch(own_questions, view)

    def _step(self, batch: Sequence[int], features: Iterator[Tensor], epoch: int, step: int) -> None:
        started = time.perf_counter()
        batch_features = [next(features) for _ in batch_order.micro_batches(batch, self.training)]
        losses_K, labels = self.stepper.step(batch, batch_features, epoch, step)
        self._unread_losses.append(([self.splits["train"].questions[i].id for i in batch], losses_K))
        for member in self.members:
            progress = member.progress
            progress.step, progress.updates = step + 1, progress.updates + 1
            progress.label_count += labels
            progress.seconds += (time.perf_counter() - started) / self.bank.K

    def _read_losses(self) -> None:
        """Read the losses of the last steps from the device at once; drop experiments with a non-finite loss."""
        if not self._unread_losses:
            return
        losses = distributed.all_reduce_sum(torch.stack([losses_K for _, losses_K in self._unread_losses])).tolist()
        failed: dict[int, list[str]] = {}
        for (question_ids, _), row in zip(self._unread_losses, losses, strict=True):
            for k, loss in enumerate(row):
                if math.isfinite(loss):
                    self.members[k].progress.loss_sum += loss
                else:
                    failed.setdefault(k, question_ids)
        self._unread_losses.clear()
        first = self.members[0].progress
        means = [member.progress.loss_sum / member.progress.label_count for member in self.members]
        self.listener(events.StepsDone(first.epoch, first.step, means))
        for k, question_ids in failed.items():
            names = ", ".join(question_ids[:8]) + (", …" if len(question_ids) > 8 else "")
            self._fail(k, f"loss in epoch {first.epoch + 1}, in the batch of questions {names}")
        self._drop(list(failed))

    def _fail(self, k: int, subject: str) -> None:
        fail_run(self.members[k].run, self.members[k].recipe, subject, self.listener)

    def _validate(self) -> None:
        """Evaluate the validation split, remember the best values, append one log line per experiment, and save.

        Experiments that have stopped are finished.
        """
        started = time.perf_counter()
        partial = self.open_partial_scores(self.members, self._save_once)
        validations = evaluate_split.validate(
            self.backbone,
            self.splits["val"],
            self.evaluation_features.features,
            self.members[0].recipe.evaluation,
            partial,
        )
        seconds = (time.perf_counter() - started) / self.bank.K
        # The last update of an epoch may have gone wrong without a loss to show it.
        failed = [k for k, validation in enumerate(validations) if not validation.finite]
        for k in failed:
            question_id = validations[k].non_finite_question
            subject = f"scores in the validation of epoch {self.members[k].progress.epoch + 1}"
            self._fail(k, f"{subject}, first in question {question_id}")
        self._drop(failed)
        validations = [validation for validation in validations if validation.finite]
        if not self.members:
            return
        for k, validation in enumerate(validations):
            self._record_epoch(k, validation, seconds)
        results = [
            events.EpochResult(member.recipe.experiment, member.progress.history[-1], member.progress.done)
            for member in self.members
        ]
        self.listener(events.EpochDone(self.members[0].progress.epoch, results))
        self._save()
        partial.delete()
        self._finish([k for k, member in enumerate(self.members) if member.progress.done])

    def open_partial_scores(
        self, members: Sequence[Member] | Sequence[Finished], prepare_save: Callable[[], None] = lambda: None
    ) -> PartialScores:
        """The scores of an evaluation of these experiments: those that an interrupted session saved, and new ones."""
        return PartialScores(
            [member.run.partial_scores_file for member in members],
            lambda: [member.save_id for member in members],
            self.save_interval,
            prepare_save,
        )

    def _record_epoch(self, k: int, validation: ValidationResult, seconds: float) -> None:
        """Update experiment k's progress after a validation, and append its log line."""
        member, allocator = self.members[k], self.stepper.allocator
        recipe, progress = member.recipe, member.progress
        if allocator and not allocator.has_final_ranks(k, progress.updates):
            pass  # AdaLoRA still has more ranks than its budget: neither the best epoch nor a bad one
        elif validation.score > progress.best_score:
            progress.best_score, progress.best_epoch, progress.bad_epochs = validation.score, progress.epoch, 0
            self.best_KP[k] = self.bank.values[k]
        else:
            progress.bad_epochs += 1
        progress.seconds += seconds
        line = {
            "epoch": progress.epoch + 1,
            "loss": progress.loss_sum / progress.label_count,
            validation.measure: validation.value,
            "learning_rate": rate_at(recipe.training, progress.epoch),
            "seconds": round(progress.seconds, 3),
            **({"ranks_kept": sum(allocator.ranks(k).values())} if allocator else {}),
        }
        progress.history.append(line)
        member.run.log(line)
        progress.epoch, progress.step, progress.loss_sum, progress.label_count = progress.epoch + 1, 0, 0.0, 0
        out_of_patience = progress.bad_epochs >= recipe.training.patience
        progress.done = out_of_patience or progress.epoch >= recipe.training.max_epochs

    def _finish(self, indices: Sequence[int]) -> None:
        """Keep the best values of these experiments for the test, and drop them from the bank."""
        for k in indices:
            member, allocator = self.members[k], self.stepper.allocator
            state = {name: tensor.cpu() for name, tensor in self.bank.state(k, self.best_KP).items()}
            ranks = allocator.history(k) if allocator else None
            parameters = self.bank.trained_parameters(k)
            self.finished.append(
                Finished(
                    member.run,
                    member.recipe,
                    member.inputs,
                    member.progress,
                    state,
                    parameters,
                    ranks,
                    member.save_id,
                )
            )
        self._drop(indices)

    def _drop(self, indices: Sequence[int]) -> None:
        """Remove these experiments from the bank."""
        remaining = [k for k in range(len(self.members)) if k not in set(indices)]
        if len(remaining) == len(self.members):
            return
        self.members = [self.members[k] for k in remaining]
        if remaining:
            best = [self.bank.state(k, self.best_KP) for k in remaining]
            # The optimizer's own count may be that of an experiment that had stopped before.
            self.stepper.keep_experiments(remaining, self.members[0].progress.updates)
            self.best_KP = self.bank.values.clone()
            for k, state in enumerate(best):
                self.bank.load_state(k, state, self.best_KP)

    def _save(self) -> None:
        """Write every experiment's checkpoint; when all are written, all but the newest two of each are removed.

        Experiments with a non-finite loss are dropped first.
        """
        self._read_losses()
        save_id = checkpoint.new_save_id()
        for k, member in enumerate(self.members):
            groups = {**self.stepper.state(k), "best": self.bank.state(k, self.best_KP)}
            member.save = checkpoint.write(member.run.checkpoint, save_id, self.titles, member.progress, groups)
        for member in self.members:
            checkpoint.remove_old(member.run.checkpoint)
        self.timer.reset()

    def _save_once(self) -> None:
        """Save unless the latest checkpoint is of this position already."""
        if any(member.save is None or member.save.position != member.position for member in self.members):
            self._save()

    def _restore(self, k: int, member: Member) -> None:
        """Continue from the member's checkpoint, if it has one; log lines that will be written again are dropped."""
        if member.save is not None:
            tensors = member.save.read_tensors()
            self.stepper.load_state(k, tensors, member.progress.updates)
            self.bank.load_state(k, tensors["best"], self.best_KP)
        last_epoch = member.progress.epoch
        member.run.truncate_log(lambda line: line["epoch"] <= last_epoch)

    def _started(self) -> events.TrainingStarted:
        first = self.splits["train"].prompted[0]
        progress = self.members[0].progress
        recipes = [member.recipe for member in self.members]
        return events.TrainingStarted(
            recipes=recipes,
            runs=[member.run for member in self.members],
            steps_per_epoch=len(batch_order.effective_batches(self.splits["train"].lengths, self.training, 0)),
            epoch=progress.epoch,
            step=progress.step,
            prompt=first.prompt,
            target=first.target,
            question_counts={split: len(questions) for split, questions in self.splits.items()},
            trained_parameters=[self.bank.trained_parameters(k) for k in range(self.bank.K)],
            differences_from_grid=[write_result.differences(recipe) for recipe in recipes],
            device=str(self.backbone.device),
            notes=self._describe_texts(),
        )

    def _describe_texts(self) -> list[str]:
        """Return warnings about cut texts, empty questions and equal choices, of all splits."""
        text, prompt_name = self.backbone.text, self.members[0].recipe.data.prompt
        notes = text_warnings.describe_training(self.text_counts["train"], text.max_text, text.max_target)
        for split in self.splits:
            sentences = text_warnings.describe_reading(
                self.text_counts[split], text.max_text, text.max_target, prompt_name
            )
            notes += [f"{split}: {sentence}" for sentence in sentences]
        return notes
