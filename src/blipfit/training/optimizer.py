"""AdamW over a bank: one matrix of K rows, each with its own learning rate and decay."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from blipfit.adapters.bank import Bank
from blipfit.recipe import TrainingConfig
from blipfit.runtime import layer_execution


class BankAdamW:
    """torch.optim.AdamW's arithmetic with a learning rate, a decay and betas for each experiment.

    torch's own takes one number of each a parameter group, and a parameter of the bank belongs to K experiments.
    """

    def __init__(self, bank: Bank, recipes: Sequence[TrainingConfig], eps: float = 1e-8, compiled: bool = False):
        self.bank, self.eps, self.steps = bank, eps, 0
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(bank.values), torch.zeros_like(bank.values)
        self._decays_P = bank.decay_mask()
        self.recipes = list(recipes)
        self._update = layer_execution.compile_function(self.update) if compiled else self.update
        self._place_columns()

    def _place_columns(self) -> None:
        """Put what an update needs of the recipes on the device, once: no step waits for a copy."""
        self._beta1 = self._column([r.betas[0] for r in self.recipes])
        self._beta2 = self._column([r.betas[1] for r in self.recipes])
        self._weight_decay = self._column([r.weight_decay for r in self.recipes])
        self._rates: tuple[float, ...] = ()
        self._rate = torch.zeros_like(self._beta1)

    def set_rates(self, rates: Sequence[float]) -> None:
        """The K learning rates of the next steps; copied to the device where they changed."""
        if tuple(rates) != self._rates:
            self._rates = tuple(rates)
            self._rate.copy_(self._column(rates))

    def step(self, rates: Sequence[float]) -> None:
        """One update with the K learning rates `rates`; leaves the gradients as they are."""
        self.set_rates(rates)
        self.steps += 1
        self._update(
            self.bank.values,
            self.bank.grads,
            self.exp_avg,
            self.exp_avg_sq,
            self._decays_P,
            (self._rate, self._beta1, self._beta2, self._weight_decay),
            (1 - self._beta1**self.steps, (1 - self._beta2**self.steps).sqrt()),
            self.eps,
        )

    @staticmethod
    @torch.no_grad()  # type: ignore[untyped-decorator]
    def update(
        values_KP: Tensor,
        grads_KP: Tensor,
        exp_avg_KP: Tensor,
        exp_avg_sq_KP: Tensor,
        decays_P: Tensor,
        columns: tuple[Tensor, Tensor, Tensor, Tensor],
        corrections: tuple[Tensor, Tensor],
        eps: float,
    ) -> None:
        """AdamW in place. `columns`: rate, both betas and decay, `K × 1` each; `corrections`: of both moments."""
        rate, beta1, beta2, weight_decay = columns
        values_KP.mul_(1 - rate * weight_decay * decays_P)
        exp_avg_KP.lerp_(grads_KP, 1 - beta1)
        exp_avg_sq_KP.mul_(beta2).addcmul_(grads_KP * (1 - beta2), grads_KP)
        denominator = exp_avg_sq_KP.sqrt().div_(corrections[1]).add_(eps)
        values_KP.sub_(denominator.reciprocal_().mul_(exp_avg_KP).mul_(rate / corrections[0]))

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
        column = torch.tensor(numbers, dtype=self.bank.values.dtype).unsqueeze(1)
        device = self.bank.values.device
        return column.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else column


def rate_at(recipe: TrainingConfig, epoch: int) -> float:
    """Linear decay per epoch: `lr × (1 − epoch / max_epochs)`, epochs from 0."""
    return recipe.learning_rate * (1 - epoch / recipe.max_epochs)
