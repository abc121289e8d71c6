"""AdaLoRA's budget: which triplets (a row of A, a value of E, a column of B) of every experiment stay.

Source: Zhang et al., "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning" (ICLR 2023), in the
order of peft: backward, optimizer step, importance from the new values and the step's gradients, then the mask.

`K` experiments, `L` adapted layers, `r` the largest start rank of a layer, `P` columns of the bank's low-rank tensors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from blipfit.adapters.bank import LORA_A, LORA_B, LORA_E, Bank
from blipfit.errors import UserError
from blipfit.recipe import AdapterConfig

MEANS = ("sensitivity", "uncertainty")


@dataclass(frozen=True, slots=True)
class Schedule:
    """How many triplets stay after the n-th optimizer step, counted from 1."""

    start: int
    target: int
    tinit: int
    end: int
    """The step that cuts to the target; from here on the ranks stay."""
    delta_t: int

    @classmethod
    def of(cls, adapter: AdapterConfig, layers: int, total: int) -> "Schedule":
        """The schedule over `total` optimizer steps; UserError where no step is left to lower the budget."""
        part = adapter.adalora
        tinit = total // 10 if part.tinit is None else part.tinit
        end = total - (total // 2 if part.tfinal is None else part.tfinal)
        if tinit >= end:
            raise UserError(
                f"adalora: with tinit {tinit} and tfinal {total - end} none of the {total} optimizer steps is left to "
                "lower the budget; lower adapter.adalora.tinit or tfinal, or train longer"
            )
        return cls(adapter.start_rank * layers, max(1, round(adapter.mean_rank * layers)), tinit, end, part.delta_t)

    def budget(self, step: int) -> int:
        """Falls with the cube of the remaining share between `tinit` and `end`."""
        if step <= self.tinit:
            return self.start
        if step >= self.end:
            return self.target
        remaining = 1 - (step - self.tinit) / (self.end - self.tinit)
        return int((self.start - self.target) * remaining**3 + self.target)

    def allocates(self, step: int) -> bool:
        """Whether this step chooses anew which triplets stay."""
        return step == self.end or (self.tinit < step < self.end and step % self.delta_t == 0)


class Allocator:
    """Importances, masks and penalty of a bank of AdaLoRA experiments; `totals` are their optimizer steps to the end.

    Importances are exponential means of |value × gradient| and of its deviation; a triplet's score is the product of
    both for its value, plus the mean product over its row of A and over its column of B. Each experiment keeps the
    best triplets of all its layers together, exactly as many as the budget; among equals the first.
    """

    def __init__(self, bank: Bank, totals: Sequence[int]):
        self.bank = bank
        self.schedules = [
            Schedule.of(adapter, len(placed.lora), total)
            for adapter, placed, total in zip(bank.adapters, bank.placements, totals, strict=True)
        ]
        # By name, so that a tie is broken alike in any bank.
        self.layers = sorted(name.removesuffix(f".{LORA_E}") for name in bank.slots if name.endswith(LORA_E))
        # Low-rank tensors are the bank's last columns.
        self.first = min(bank.slots[f"{layer}.{LORA_A}"].start for layer in self.layers)
        self.means = {name: torch.zeros_like(bank.values[:, self.first :]) for name in MEANS}
        ranks = [bank.slots[f"{layer}.{LORA_E}"].shape[0] for layer in self.layers]
        self._spans = [slice(sum(ranks[:n]), sum(ranks[: n + 1])) for n in range(len(ranks))]
        """Each layer's triplets in a row of triplets."""
        self.own = torch.stack([self._has(k) for k in range(bank.K)]).to(bank.values.device)
        """K × triplets: which an experiment started with; the rest is padding."""
        self.kept = self.own.clone()
        self._place_columns()
        self._history: list[list[tuple[int, Tensor]]] = [[] for _ in bank.adapters]

    def _place_columns(self) -> None:
        """Put what every step needs of the recipes on the device, once: no step waits for a copy."""
        parts = [adapter.adalora for adapter in self.bank.adapters]
        counts = [2 * len(placed.lora) for placed in self.bank.placements]
        shares = [part.orthogonal_weight / count for part, count in zip(parts, counts, strict=True)]
        values = self.bank.values
        self._share_K11 = torch.tensor(shares, dtype=torch.float64).to(values).view(-1, 1, 1)
        self._betas_K2 = torch.tensor([(part.beta1, part.beta2) for part in parts], dtype=values.dtype).to(values)

    # ----------------------------------------------------------------- a step

    @torch.no_grad()
    def add_penalty(self) -> None:
        """Add the gradient of `weight × mean over A and B of ‖M Mᵀ − I‖` (Frobenius) to the bank's.

        It is no part of the loss that is returned, logged or evaluated.
        """
        for number, layer in enumerate(self.layers):
            there = self.own[:, self._spans[number]]
            for name, along_rows in ((LORA_A, True), (LORA_B, False)):
                M = self._columns(self.bank.values, layer, name)
                rows = M if along_rows else M.mT
                off = torch.bmm(rows, rows.mT) - torch.diag_embed(there.to(M.dtype))
                norm = off.flatten(1).norm(dim=1).clamp_min(torch.finfo(M.dtype).tiny).view(-1, 1, 1)
                slope = torch.bmm(off, rows) * (2 * self._share_K11 / norm)
                self._columns(self.bank.grads, layer, name).add_(slope if along_rows else slope.mT)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After the optimizer's `step`-th update: measure importances, then mask to the budget where it is due."""
        if any(step < schedule.end for schedule in self.schedules):
            self._measure()
        due = [k for k, schedule in enumerate(self.schedules) if schedule.allocates(step)]
        if due:
            score = self._scores()
            for k in due:
                self.kept[k] = self._best(k, score[k], self.schedules[k].budget(step))
        if due or any(step > schedule.end for schedule in self.schedules):
            self._mask([k in due or step > schedule.end for k, schedule in enumerate(self.schedules)])
        for k in due:
            self._history[k].append((step, self._counts(k)))

    def _measure(self) -> None:
        """Fold this step's |value × gradient| into the means."""
        now = (self.bank.values[:, self.first :] * self.bank.grads[:, self.first :]).abs_()
        beta1, beta2 = self._betas_K2[:, :1], self._betas_K2[:, 1:]
        sensitivity, uncertainty = (self.means[name] for name in MEANS)
        sensitivity.mul_(beta1).add_((1 - beta1) * now)
        uncertainty.mul_(beta2).add_((1 - beta2) * (now - sensitivity).abs_())

    def _scores(self) -> Tensor:
        """K × triplets."""
        product = F.pad(self.means["sensitivity"] * self.means["uncertainty"], (self.first, 0))
        scores = []
        for layer in self.layers:
            A, B, E = (self._columns(product, layer, name) for name in (LORA_A, LORA_B, LORA_E))
            scores.append(E.squeeze(2) + (A.mean(2) + B.mean(1)))
        return torch.cat(scores, dim=1)

    def _best(self, k: int, score: Tensor, budget: int) -> Tensor:
        """The mask of experiment k's `budget` best triplets."""
        ranked = score.masked_fill(~self.own[k], -torch.inf).sort(descending=True, stable=True).indices
        mask = torch.zeros_like(self.own[k])
        mask[ranked[:budget]] = True
        return mask

    def _mask(self, masked: Sequence[bool]) -> None:
        """Set the values of dropped triplets to zero, in these experiments."""
        rows = torch.tensor(masked).to(self.kept.device, non_blocking=True).unsqueeze(1)
        for number, layer in enumerate(self.layers):
            dropped = rows & ~self.kept[:, self._spans[number]]
            self._columns(self.bank.values, layer, LORA_E).masked_fill_(dropped.unsqueeze(2), 0.0)

    # --------------------------------------------------------------- looking

    def settled(self, k: int, step: int) -> bool:
        """Whether experiment k has its final ranks after `step` optimizer steps."""
        return step >= self.schedules[k].end

    def ranks(self, k: int) -> dict[str, int]:
        """Triplets that experiment k keeps, by layer."""
        return dict(zip(self._mine(k), self._counts(k).tolist(), strict=True))

    def history(self, k: int) -> dict[str, Any]:
        """Experiment k's ranks after each of its allocations: steps, and a row of ranks (by layer) for each."""
        return {
            "layers": self._mine(k),
            "start_rank": self.bank.adapters[k].start_rank,
            "budget": self.schedules[k].target,
            "steps": [step for step, _ in self._history[k]],
            "ranks": [counts.tolist() for _, counts in self._history[k]],
        }

    # ----------------------------------------------------------- keep, resume

    def keep(self, indices: Sequence[int]) -> None:
        """Follow `Bank.keep`."""
        rows = list(indices)
        self.schedules = [self.schedules[k] for k in rows]
        self._history = [self._history[k] for k in rows]
        self.means = {name: mean[rows].clone() for name, mean in self.means.items()}
        self.own, self.kept = self.own[rows].clone(), self.kept[rows].clone()
        self._place_columns()

    def state(self, k: int) -> dict[str, dict[str, Tensor]]:
        """All that experiment k's next steps depend on, in groups of named tensors, and its history."""
        groups = {}
        for name, mean in self.means.items():
            tensors = self.bank.state(k, F.pad(mean, (self.first, 0)))
            groups[name] = {n: t for n, t in tensors.items() if n.endswith((LORA_A, LORA_B, LORA_E))}
        groups["kept"] = {layer: self.kept[k, where] for layer, where in self._places(k).items()}
        if self._history[k]:
            steps, ranks = zip(*self._history[k], strict=True)
            groups["allocated"] = {"steps": torch.tensor(steps), "ranks": torch.stack(ranks)}
        return groups

    def load_state(self, k: int, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Put experiment k's state back; all members of a bank stand at the same step."""
        for name, mean in self.means.items():
            wide = F.pad(mean, (self.first, 0))
            for tensor, value in state[name].items():
                self.bank.tensor(k, tensor, wide).copy_(value)
            mean.copy_(wide[:, self.first :])
        for layer, where in self._places(k).items():
            self.kept[k, where] = state["kept"][layer].to(self.kept.device)
        past = state.get("allocated", {"steps": torch.tensor([]), "ranks": torch.tensor([])})
        self._history[k] = list(zip(past["steps"].tolist(), past["ranks"].to(self.kept.device), strict=True))

    # ---------------------------------------------------------------- columns

    def _mine(self, k: int) -> list[str]:
        there = set(self.bank.placements[k].lora)
        return [layer for layer in self.layers if layer in there]

    def _places(self, k: int) -> dict[str, slice]:
        """Where experiment k's triplets lie in a row of triplets, by layer, without padding."""
        rank = self.bank.adapters[k].start_rank
        spans = dict(zip(self.layers, self._spans, strict=True))
        return {layer: slice(spans[layer].start, spans[layer].start + rank) for layer in self._mine(k)}

    def _has(self, k: int) -> Tensor:
        mask = torch.zeros(self._spans[-1].stop, dtype=torch.bool)
        for where in self._places(k).values():
            mask[where] = True
        return mask

    def _counts(self, k: int) -> Tensor:
        """Triplets kept, a number for each of experiment k's layers."""
        return torch.stack([self.kept[k, where].sum() for where in self._places(k).values()])

    def _columns(self, matrix: Tensor, layer: str, name: str) -> Tensor:
        return self.bank.columns(matrix, self.bank.slots[f"{layer}.{name}"])
