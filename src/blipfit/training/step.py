"""One optimizer step of a bank: forward pass, backward pass, update.

`K` experiments.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from blipfit.adapters.adalora import Allocator
from blipfit.adapters.bank import Bank
from blipfit.data.batches import EncodedQuestion, TargetBatch
from blipfit.model.backbone import Backbone
from blipfit.recipe import Recipe
from blipfit.runtime import cpu_memory, distributed, shared_dropout
from blipfit.runtime.cuda_graphs import CapturedFunction
from blipfit.runtime.layer_execution import LayerExecution
from blipfit.training import batch_order, distillation
from blipfit.training.optimizer import BankAdamW, rate_at


class Stepper:
    """A bank of K experiments with its optimizer, taking steps on one list of questions."""

    def __init__(self, backbone: Backbone, recipes: Sequence[Recipe], encoded: Sequence[EncodedQuestion]):
        if backbone.device.type == "cpu":
            cpu_memory.keep_freed_memory()
        self.backbone, self.encoded = backbone, encoded
        self.recipes = list(recipes)
        self.training = self.recipes[0].training
        self.teacher = distillation.load_teacher(self.recipes[0], backbone)
        # fp16 gradients underflow in the backward pass through the language model; those of bf16 and fp32 do not.
        self._loss_scale = 2.0**10 if backbone.autocast_dtype == torch.float16 else 1.0
        self._captured: CapturedFunction | None = None
        performance = self.recipes[0].performance
        self.execution = LayerExecution(
            backbone.repeated_layers() if performance.compile else [],
            [layer for stage in performance.checkpointing for layer in backbone.layers(stage)],
        )
        self._make_bank()

    def _make_bank(self) -> None:
        """Make a bank of the experiments and install it, with its optimizer and AdaLoRA's allocator."""
        recipes, compiled = self.recipes, self.recipes[0].performance.compile
        self.bank = Bank(self.backbone, [r.adapter for r in recipes], [r.training.seed for r in recipes])
        try:
            self.optimizer = BankAdamW(self.bank, [r.training for r in recipes], compiled=compiled)
            totals = [batch_order.total_steps(len(self.encoded), recipe.training) for recipe in recipes]
            self.allocator = Allocator(self.bank, totals) if self.bank.is_adalora else None
        except BaseException:  # out of memory, above all: the backbone goes back as it was
            self.bank.remove()
            raise

    def train_mode(self) -> None:
        """Set training mode if the recipe uses dropout; the ViT stays in eval mode."""
        self.backbone.hf.train(self.training.dropout)
        self.backbone.hf.vision_model.eval()

    def remove(self) -> None:
        """Remove the bank and everything else from the backbone."""
        self._captured = None
        self.execution.remove()
        self.bank.remove()

    def step(self, batch: Sequence[int], features: Sequence[Tensor], epoch: int, step: int) -> tuple[Tensor, int]:
        """One update from an effective batch (question indices) and the features of this process's rows, one tensor per
        micro-batch.

        Returns the losses summed over this process's label tokens (K, on the device), and the number of all label
        tokens. The gradient is that of the sum divided by this number, so it does not depend on the micro-batches.
        """
        micros = list(batch_order.micro_batches(batch, self.training))
        multiple, rows = self.recipes[0].performance.pad_to_multiple_of, distributed.own_rows()
        targets = [self.backbone.text.targets([self.encoded[i] for i in micro], multiple, rows) for micro in micros]
        labels = sum(len(self.encoded[i].target) for i in batch)
        self.bank.grads.zero_()
        total = torch.zeros(self.bank.K, device=self.backbone.device, dtype=self.bank.values.dtype)
        self.execution.install()
        try:
            for number, (micro, micro_features, target) in enumerate(zip(micros, features, targets, strict=True)):
                torch.manual_seed(batch_order.step_seed(self.training.seed, epoch, step, number))
                with shared_dropout.batch_rows(len(micro), rows):
                    total += self._run(micro_features, target.to(self.backbone.device), labels, labels / len(batch))
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
        """Forward and backward pass of a micro-batch, as a CUDA graph if the recipe says so; returns its losses (K)."""
        if not self.recipes[0].performance.cuda_graphs or features.device.type != "cuda":
            return self._backward(features, target, labels, labels_per_question)
        if self._captured is None:
            self._captured = CapturedFunction(self._backward_tensors, [self.bank.grads])
        numbers = torch.tensor([labels, labels_per_question], dtype=torch.float32).pin_memory()
        return self._captured(numbers.to(features.device, non_blocking=True), features, *target.tensors())

    def _backward_tensors(self, numbers: Tensor, features: Tensor, *target: Tensor) -> Tensor:
        return self._backward(features, TargetBatch.from_tensors(target), *numbers.unbind())

    def _backward(
        self, features: Tensor, target: TargetBatch, labels: int | Tensor, labels_per_question: float | Tensor
    ) -> Tensor:
        objectives_K, losses_K = self._losses(features, target, labels_per_question)
        self.bank.backward(objectives_K.sum() / labels * self._loss_scale)
        return losses_K.detach()

    def _losses(
        self, features: Tensor, target: TargetBatch, labels_per_question: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        """The losses to minimize and the losses to report (K each); they differ only with distillation."""
        visual = self.backbone.query(features, target)
        if self.teacher:
            return self.teacher.losses(self.backbone, visual, features, target, labels_per_question)
        losses_K = self.backbone.losses(visual, target)
        return losses_K, losses_K

    def keep_experiments(self, indices: Sequence[int], steps: int) -> None:
        """Continue with these experiments only, from the values that they have after `steps` optimizer steps.

        Bank, optimizer and AdaLoRA's allocator are made anew for them, as if they continued from a checkpoint: the
        layout of a bank decides how sums are rounded, so it must not depend on experiments that have left.
        """
        self._captured = None  # the CUDA graph was recorded for the old K
        states = [self.state(k) for k in indices]
        self.recipes = [self.recipes[k] for k in indices]
        self.bank.remove()
        self._make_bank()
        for k, state in enumerate(states):
            self.load_state(k, state, steps)

    def state(self, k: int) -> dict[str, dict[str, Tensor]]:
        """Copies of everything that experiment k's next steps depend on, in groups of named tensors."""
        allocated = self.allocator.state(k) if self.allocator else {}
        return {"values": self.bank.state(k), **self.optimizer.state(k), **allocated}

    def load_state(self, k: int, state: Mapping[str, Mapping[str, Tensor]], steps: int) -> None:
        """Restore experiment k's state, as returned by `state`, after `steps` optimizer steps."""
        self.bank.load_state(k, state["values"])
        self.optimizer.load_state(k, state, steps)
        if self.allocator:
            self.allocator.load_state(k, state)
