"""One optimizer step of a bank: the place where forward, backward and update happen."""

from collections.abc import Sequence

import torch
from torch import Tensor

from blipfit.adapters.adalora import Allocator
from blipfit.adapters.bank import Bank
from blipfit.data.batches import Encoded, TargetBatch
from blipfit.model.backbone import Backbone
from blipfit.recipe import Recipe
from blipfit.runtime import distributed, memory
from blipfit.runtime.execution import LayerExecution
from blipfit.runtime.graphs import CapturedFunction
from blipfit.training import distillation, plan
from blipfit.training.optimizer import BankAdamW, rate_at


class Stepper:
    """A bank of K experiments with its optimizer, taking steps on one list of questions."""

    def __init__(self, backbone: Backbone, recipes: Sequence[Recipe], encoded: Sequence[Encoded]):
        if backbone.device.type == "cpu":
            memory.keep_freed()
        self.backbone, self.encoded = backbone, encoded
        self.recipes = list(recipes)
        self.training = self.recipes[0].training
        self.teacher = distillation.teacher(self.recipes[0], backbone)
        # fp16's smallest gradients vanish in the backward pass through the language model; bf16 and fp32 have room.
        self._loss_scale = 2.0**10 if backbone.autocast_dtype == torch.float16 else 1.0
        self._captured: CapturedFunction | None = None
        performance = self.recipes[0].performance
        self.execution = LayerExecution(
            backbone.repeated_layers() if performance.compile else [],
            [layer for stage in performance.checkpointing for layer in backbone.layers(stage)],
        )
        self.bank = Bank(backbone, [r.adapter for r in recipes], [r.training.seed for r in recipes])
        try:
            self.optimizer = BankAdamW(self.bank, [r.training for r in recipes], compiled=performance.compile)
            totals = [plan.total_steps(len(encoded), recipe.training) for recipe in recipes]
            self.allocator = Allocator(self.bank, totals) if self.bank.adaptive else None
        except BaseException:  # out of memory, above all: the backbone goes back as it was
            self.bank.remove()
            raise

    def train_mode(self) -> None:
        """Dropout as the recipe says; the ViT stays in eval mode."""
        self.backbone.hf.train(self.training.dropout)
        self.backbone.hf.vision_model.eval()

    def remove(self) -> None:
        """Give the backbone back as it was."""
        self._captured = None
        self.execution.remove()
        self.bank.remove()

    def step(self, batch: Sequence[int], features: Sequence[Tensor], epoch: int, step: int) -> tuple[Tensor, int]:
        """One update from an effective batch (question indices) and its image features, one a micro-batch.

        Returns the summed losses (K) over this process's label tokens, still on the device, and the number of all
        label tokens. The gradient is of the sum over that number, so it does not depend on how the batch was cut.
        """
        micros = [distributed.shard(micro) for micro in plan.micro_batches(batch, self.training)]
        multiple = self.recipes[0].performance.pad_to_multiple_of
        targets = [self.backbone.text.targets([self.encoded[i] for i in micro], multiple) for micro in micros]
        labels = sum(len(self.encoded[i].target) for i in batch)
        self.bank.grads.zero_()
        total = torch.zeros(self.bank.K, device=self.backbone.device, dtype=self.bank.values.dtype)
        self.execution.install()
        try:
            for number, (seen, target) in enumerate(zip(features, targets, strict=True)):
                # Processes see other rows, so they draw other noise.
                noise_seed = plan.step_seed(self.training.seed, epoch, step, number)
                torch.manual_seed(noise_seed + distributed.state().process_index)
                total += self._run(seen, target.to(self.backbone.device), labels, labels / len(batch))
        finally:
            self.execution.remove()
        distributed.all_reduce_sum(self.bank.grads)
        if self._loss_scale != 1:
            self.bank.grads.div_(self._loss_scale)
        if self.allocator:
            self.allocator.add_penalty()
        self.optimizer.step([rate_at(recipe.training, epoch) for recipe in self.recipes])
        if self.allocator:
            self.allocator.update(self.optimizer.steps)
        return total, labels

    def _run(self, features: Tensor, target: TargetBatch, labels: int, labels_per_question: float) -> Tensor:
        """Forward and backward pass of a micro-batch, captured where the recipe says so; returns its losses (K)."""
        if not self.recipes[0].performance.cuda_graphs or features.device.type != "cuda":
            return self._backward(features, target, labels, labels_per_question)
        if self._captured is None:
            self._captured = CapturedFunction(self._backward_tensors, [self.bank.grads])
        numbers = torch.tensor([labels, labels_per_question], dtype=torch.float32).pin_memory()
        return self._captured(numbers.to(features.device, non_blocking=True), features, *target.tensors())

    def _backward_tensors(self, numbers: Tensor, features: Tensor, *target: Tensor) -> Tensor:
        return self._backward(features, TargetBatch.of_tensors(target), *numbers.unbind())

    def _backward(
        self, features: Tensor, target: TargetBatch, labels: int | Tensor, labels_per_question: float | Tensor
    ) -> Tensor:
        learned_K, losses_K = self._losses(features, target, labels_per_question)
        self.bank.backward(learned_K.sum() / labels * self._loss_scale)
        return losses_K.detach()

    def _losses(
        self, features: Tensor, target: TargetBatch, labels_per_question: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        """What is learned from, and the ordinary losses; the same but for distillation."""
        visual = self.backbone.query(features, target)
        if self.teacher:
            return self.teacher.losses(self.backbone, visual, features, target, labels_per_question)
        losses_K = self.backbone.losses(visual, target)
        return losses_K, losses_K

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these experiments only."""
        self._captured = None
        self.recipes = [self.recipes[k] for k in rows]
        self.bank.keep(rows)
        self.optimizer.keep(rows)
        if self.allocator:
            self.allocator.keep(rows)
