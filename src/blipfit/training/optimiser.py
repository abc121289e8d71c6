"""AdamW over a bank: one matrix of K rows, each with its own learning rate and decay."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from blipfit.adapters.bank import Bank
from blipfit.recipe import TrainingPart


class BankAdamW:
    """torch.optim.AdamW's arithmetic with a learning rate, a decay and betas for each experiment.

    torch's own takes one number of each a parameter group, and a parameter of the bank belongs to K experiments.
    """

    def __init__(self, bank: Bank, recipes: Sequence[TrainingPart], eps: float = 1e-8):
        self.bank, self.eps, self.steps = bank, eps, 0
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(bank.values), torch.zeros_like(bank.values)
        self._decays_P = bank.decay_mask()
        self.recipes = list(recipes)

    @torch.no_grad()
    def step(self, rates: Sequence[float]) -> None:
        """One update with the K learning rates `rates`; leaves the gradients as they are."""
        self.steps += 1
        values, grads = self.bank.values, self.bank.grads
        rate = self._column(rates)
        beta1 = self._column([r.betas[0] for r in self.recipes])
        beta2 = self._column([r.betas[1] for r in self.recipes])
        decay = rate * self._column([r.weight_decay for r in self.recipes])
        values.mul_(1 - decay * self._decays_P)
        self.exp_avg.lerp_(grads, 1 - beta1)
        self.exp_avg_sq.mul_(beta2).addcmul_(grads * (1 - beta2), grads)
        denominator = self.exp_avg_sq.sqrt().div_((1 - beta2**self.steps).sqrt()).add_(self.eps)
        values.sub_(denominator.reciprocal_().mul_(self.exp_avg).mul_(rate / (1 - beta1**self.steps)))

    def keep(self, indices: Sequence[int]) -> None:
        """Follow `Bank.keep`."""
        rows = list(indices)
        self.exp_avg, self.exp_avg_sq = self.exp_avg[rows].clone(), self.exp_avg_sq[rows].clone()
        self.recipes = [self.recipes[k] for k in rows]

    def state(self, k: int) -> dict[str, dict[str, Tensor]]:
        return {
            "exp_avg": self.bank.state(k, self.exp_avg),
            "exp_avg_sq": self.bank.state(k, self.exp_avg_sq),
        }

    def load_state(self, k: int, state: Mapping[str, Mapping[str, Tensor]], steps: int) -> None:
        self.bank.load_state(k, state["exp_avg"], self.exp_avg)
        self.bank.load_state(k, state["exp_avg_sq"], self.exp_avg_sq)
        self.steps = steps

    def _column(self, numbers: Sequence[float]) -> Tensor:
        return torch.tensor(numbers, dtype=self.bank.values.dtype).to(self.bank.values.device).unsqueeze(1)


def rate_at(recipe: TrainingPart, epoch: int) -> float:
    """Linear decay per epoch: `lr × (1 − epoch / max_epochs)`, epochs from 0."""
    return recipe.learning_rate * (1 - epoch / recipe.max_epochs)
