"""One optimiser step of a bank: the place where forward, backward and update happen."""

from collections.abc import Sequence

import torch
from torch import Tensor

from blipfit.adapters.adalora import Allocator
from blipfit.adapters.bank import Bank
from blipfit.adapters.dropout import shared_dropout
from blipfit.data.batches import Encoded, TargetBatch
from blipfit.model import heap, processes
from blipfit.model.backbone import Backbone
from blipfit.recipe import Recipe
from blipfit.training import distillation, plan
from blipfit.training.optimiser import BankAdamW, rate_at


class Stepper:
    """A bank of K experiments with its optimiser, taking steps on one list of questions."""

    def __init__(self, backbone: Backbone, recipes: Sequence[Recipe], encoded: Sequence[Encoded]):
        if backbone.device.type == "cpu":
            heap.keep_freed()
        self.backbone, self.encoded = backbone, encoded
        self.recipes = list(recipes)
        self.training = self.recipes[0].training
        self.teacher = distillation.teacher(self.recipes[0], backbone)
        self.bank = Bank(backbone, [r.adapter for r in recipes], [r.training.seed for r in recipes])
        self.optimiser = BankAdamW(self.bank, [r.training for r in recipes])
        totals = [plan.total_steps(len(encoded), recipe.training) for recipe in recipes]
        # fp16's smallest gradients vanish in the backward pass through the language model; bf16 and fp32 have room.
        self._loss_scale = 2.0**10 if backbone.autocast_dtype == torch.float16 else 1.0
        self.allocator = Allocator(self.bank, totals) if self.bank.adaptive else None

    def train_mode(self) -> None:
        """Dropout as the recipe says; the ViT stays in eval mode."""
        self.backbone.hf.train(self.training.dropout)
        self.backbone.hf.vision_model.eval()

    def step(self, batch: Sequence[int], features: Sequence[Tensor], epoch: int, step: int) -> tuple[Tensor, int]:
        """One update from an effective batch (question indices) and its image features, one a micro-batch.

        Returns the summed losses (K) over this process's label tokens, still on the device, and the number of all
        label tokens. The gradient is of the sum over that number, so it does not depend on how the batch was cut.
        """
        micros = [processes.share(micro) for micro in plan.micro_batches(batch, self.training)]
        targets = [self.backbone.text.targets([self.encoded[i] for i in micro]) for micro in micros]
        labels = sum(len(self.encoded[i].target) for i in batch)
        self.bank.grads.zero_()
        total = torch.zeros(self.bank.K, device=self.backbone.device, dtype=self.bank.values.dtype)
        for number, (seen, target) in enumerate(zip(features, targets, strict=True)):
            # Processes see other rows, so they draw other noise.
            torch.manual_seed(plan.step_seed(self.training.seed, epoch, step, number) + processes.state().process_index)
            target = target.to(self.backbone.device)
            with shared_dropout(self.bank.K):
                learned_K, losses_K = self._losses(seen, target, labels / len(batch))
            self.bank.backward(learned_K.sum() / labels * self._loss_scale)
            total += losses_K.detach()
        processes.add_up(self.bank.grads)
        if self._loss_scale != 1:
            self.bank.grads.div_(self._loss_scale)
        if self.allocator:
            self.allocator.add_penalty()
        self.optimiser.step([rate_at(recipe.training, epoch) for recipe in self.recipes])
        if self.allocator:
            self.allocator.update(self.optimiser.steps)
        return total, labels

    def _losses(self, features: Tensor, target: TargetBatch, labels_each: float) -> tuple[Tensor, Tensor]:
        """What is learned from, and the ordinary losses; the same but for distillation."""
        visual = self.backbone.query(features, target)
        if self.teacher:
            return self.teacher.losses(self.backbone, visual, features, target, labels_each)
        losses_K = self.backbone.losses(visual, target)
        return losses_K, losses_K

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these experiments only."""
        self.recipes = [self.recipes[k] for k in rows]
        self.bank.keep(rows)
        self.optimiser.keep(rows)
        if self.allocator:
            self.allocator.keep(rows)
