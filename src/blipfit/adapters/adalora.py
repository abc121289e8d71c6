"""AdaLoRA's budget: which triplets of every experiment stay active.

A triplet is a row of A, a value of E and a column of B of an adapted layer.

Source: Zhang et al., "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning" (ICLR 2023), in the
order of peft: backward, optimizer step, importance from the new values and the step's gradients, then the mask.

Dimensions: `K` experiments, `r` largest start rank of a layer, `N` triplets of all layers (the sum of r), `I` inputs
and `O` outputs of a layer, `P` columns of the bank's matrix, of which `Q`, the last, are low-rank tensors. A suffix
such as `_KN` lists a tensor's dimensions. All of a layer's tensors are views of the matrix: A `K × r × I`,
E `K × r × 1`, B `K × O × r`.
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
"""The paper's names of the two exponential means that a triplet's score is computed from."""


@dataclass(frozen=True, slots=True)
class RankSchedule:
    """How many triplets are active after each optimizer step; steps are counted from 1."""

    start: int
    """Budget at the start: all triplets."""
    target: int
    """Budget at the end."""
    tinit: int
    """Last step of the warm-up, with all triplets."""
    end: int
    """The step that reduces the budget to the target; after it the ranks are final."""
    delta_t: int
    """Steps between two allocations."""

    @classmethod
    def from_config(cls, adapter: AdapterConfig, layers: int, total: int) -> "RankSchedule":
        """Make the schedule for a number of adapted layers and `total` optimizer steps.

        Raises UserError if no step is left to reduce the budget.
        """
        config = adapter.adalora
        tinit = total // 10 if config.tinit is None else config.tinit
        end = total - (total // 2 if config.tfinal is None else config.tfinal)
        if tinit >= end:
            raise UserError(
                f"adalora: with tinit {tinit} and tfinal {total - end} none of the {total} optimizer steps is left to "
                "lower the budget; lower adapter.adalora.tinit or tfinal, or train longer"
            )
        return cls(adapter.start_rank * layers, max(1, round(adapter.mean_rank * layers)), tinit, end, config.delta_t)

    def budget(self, step: int) -> int:
        """The number of active triplets after this step.

        Between `tinit` and `end` it falls with the cube of the remaining share of the steps.
        """
        if step <= self.tinit:
            return self.start
        if step >= self.end:
            return self.target
        remaining = 1 - (step - self.tinit) / (self.end - self.tinit)
        return int((self.start - self.target) * remaining**3 + self.target)

    def is_allocation_step(self, step: int) -> bool:
        """Whether the active triplets are selected again after this step."""
        return step == self.end or (self.tinit < step < self.end and step % self.delta_t == 0)


class Allocator:
    """Importances, masks and penalty of a bank of AdaLoRA experiments.

    `totals`: the number of optimizer steps of each experiment's whole training. Raises UserError as
    `RankSchedule.from_config`.

    Importances are exponential means of |value × gradient| and of its deviation from the first mean; an element's
    importance is their product. A triplet's score is the importance of its value, plus the mean importance of its row
    of A and of its column of B. Each experiment keeps the triplets with the highest scores in all of its layers
    together, exactly as many as the budget; among equal scores the first.
    """

    def __init__(self, bank: Bank, totals: Sequence[int]):
        self.bank = bank
        self.schedules = [
            RankSchedule.from_config(adapter, len(placement.lora), total)
            for adapter, placement, total in zip(bank.adapters, bank.placements, totals, strict=True)
        ]
        # Sorted by name, so that equal scores are ordered the same in every bank.
        self.layers = sorted(name.removesuffix(f".{LORA_E}") for name in bank.slots if name.endswith(LORA_E))
        self._first_column = min(bank.slots[f"{layer}.{LORA_A}"].start for layer in self.layers)
        """Where the low-rank tensors begin; they are the last Q columns of the bank's matrix."""
        self.means = {name: torch.zeros_like(bank.values[:, self._first_column :]) for name in MEANS}
        """The exponential means `K × Q` by name."""
        ranks = [bank.slots[f"{layer}.{LORA_E}"].shape[0] for layer in self.layers]
        self._layer_spans = [slice(sum(ranks[:n]), sum(ranks[: n + 1])) for n in range(len(ranks))]
        """Each layer's triplets among all N."""
        self._present_KN = torch.stack([self._present_triplets(k) for k in range(bank.K)]).to(bank.values.device)
        """bool: the triplets that an experiment has at the start; the others are padding."""
        self._active_KN = self._present_KN.clone()
        """bool: the triplets that the last allocation selected."""
        self._load_coefficients()
        self._history: list[list[tuple[int, Tensor]]] = [[] for _ in bank.adapters]
        """For each experiment the step and the ranks by layer of every allocation."""

    def _load_coefficients(self) -> None:
        """Copy the coefficients of all recipes to the device, once: no step waits for a copy."""
        configs = [adapter.adalora for adapter in self.bank.adapters]
        counts = [2 * len(placement.lora) for placement in self.bank.placements]
        weights = [config.orthogonal_weight / count for config, count in zip(configs, counts, strict=True)]
        values = self.bank.values
        self._penalty_weight_K11 = torch.tensor(weights, dtype=torch.float64).to(values).view(-1, 1, 1)
        betas = [(config.beta1, config.beta2) for config in configs]
        self._betas_K2 = torch.tensor(betas, dtype=values.dtype).to(values)

    def add_penalty(self) -> None:
        """Add the gradient of the orthogonality penalty to the bank's gradients.

        The penalty is `weight × mean over all A and B of ‖M Mᵀ − I‖` (Frobenius norm), with M = A or Bᵀ. It is not part
        of the loss that is returned, logged or evaluated.
        """
        with torch.no_grad():
            for i, layer in enumerate(self.layers):
                present_Kr = self._present_KN[:, self._layer_spans[i]]
                for name, along_rows in ((LORA_A, True), (LORA_B, False)):
                    M = self._columns(self.bank.values, layer, name)
                    rows = M if along_rows else M.mT
                    deviation_Krr = torch.bmm(rows, rows.mT) - torch.diag_embed(present_Kr.to(M.dtype))
                    norm_K11 = deviation_Krr.flatten(1).norm(dim=1).clamp_min(torch.finfo(M.dtype).tiny).view(-1, 1, 1)
                    gradient = torch.bmm(deviation_Krr, rows) * (2 * self._penalty_weight_K11 / norm_K11)
                    self._columns(self.bank.grads, layer, name).add_(gradient if along_rows else gradient.mT)

    def update(self, step: int) -> None:
        """Update the importances after the optimizer's `step`-th update, and mask to the budget if it is due."""
        with torch.no_grad():
            if any(step < schedule.end for schedule in self.schedules):
                self._update_means()
            due = [k for k, schedule in enumerate(self.schedules) if schedule.is_allocation_step(step)]
            if due:
                scores_KN = self._scores()
                for k in due:
                    self._active_KN[k] = self._select_triplets(k, scores_KN[k], self.schedules[k].budget(step))
            if due or any(step > schedule.end for schedule in self.schedules):
                self._zero_inactive([k in due or step > schedule.end for k, schedule in enumerate(self.schedules)])
            for k in due:
                self._history[k].append((step, self._count_active(k)))

    def _update_means(self) -> None:
        """Add this step's |value × gradient| to the exponential means."""
        first = self._first_column
        importance_KQ = (self.bank.values[:, first:] * self.bank.grads[:, first:]).abs_()
        beta1, beta2 = self._betas_K2[:, :1], self._betas_K2[:, 1:]
        sensitivity_KQ, uncertainty_KQ = (self.means[name] for name in MEANS)
        sensitivity_KQ.mul_(beta1).add_((1 - beta1) * importance_KQ)
        uncertainty_KQ.mul_(beta2).add_((1 - beta2) * (importance_KQ - sensitivity_KQ).abs_())

    def _scores(self) -> Tensor:
        """The score of every triplet, `K × N`."""
        product_KP = F.pad(self.means["sensitivity"] * self.means["uncertainty"], (self._first_column, 0))
        scores = []
        for layer in self.layers:
            A_KrI, B_KOr, E_Kr1 = (self._columns(product_KP, layer, name) for name in (LORA_A, LORA_B, LORA_E))
            scores.append(E_Kr1.squeeze(2) + (A_KrI.mean(2) + B_KOr.mean(1)))
        return torch.cat(scores, dim=1)

    def _select_triplets(self, k: int, score_N: Tensor, budget: int) -> Tensor:
        """The mask (bool, N) of experiment k's `budget` triplets with the highest scores."""
        ranked = score_N.masked_fill(~self._present_KN[k], -torch.inf).sort(descending=True, stable=True).indices
        mask_N = torch.zeros_like(self._present_KN[k])
        mask_N[ranked[:budget]] = True
        return mask_N

    def _zero_inactive(self, is_masked: Sequence[bool]) -> None:
        """Set the values of inactive triplets to zero; `is_masked`: for each experiment whether to do so."""
        rows_K1 = torch.tensor(is_masked).to(self._active_KN.device, non_blocking=True).unsqueeze(1)
        for i, layer in enumerate(self.layers):
            inactive_Kr = rows_K1 & ~self._active_KN[:, self._layer_spans[i]]
            self._columns(self.bank.values, layer, LORA_E).masked_fill_(inactive_Kr.unsqueeze(2), 0.0)

    def has_final_ranks(self, k: int, step: int) -> bool:
        """Whether experiment k has its final ranks after `step` optimizer steps."""
        return step >= self.schedules[k].end

    def ranks(self, k: int) -> dict[str, int]:
        """The number of experiment k's active triplets, by layer."""
        return dict(zip(self._layers_of(k), self._count_active(k).tolist(), strict=True))

    def history(self, k: int) -> dict[str, Any]:
        """Experiment k's ranks after each of its allocations, as a JSON object.

        "layers" names the layers, "steps" lists the allocations, "ranks" has for each step a list of ranks by layer.
        """
        return {
            "layers": self._layers_of(k),
            "start_rank": self.bank.adapters[k].start_rank,
            "budget": self.schedules[k].target,
            "steps": [step for step, _ in self._history[k]],
            "ranks": [counts.tolist() for _, counts in self._history[k]],
        }

    def state(self, k: int) -> dict[str, dict[str, Tensor]]:
        """Everything that experiment k's next steps depend on, and its history, in groups of named tensors."""
        groups = {}
        for name, mean_KQ in self.means.items():
            tensors = self.bank.state(k, F.pad(mean_KQ, (self._first_column, 0)))
            groups[name] = {n: t for n, t in tensors.items() if n.endswith((LORA_A, LORA_B, LORA_E))}
        groups["kept"] = {layer: self._active_KN[k, span] for layer, span in self._triplet_spans(k).items()}
        if self._history[k]:
            steps, ranks = zip(*self._history[k], strict=True)
            groups["allocated"] = {"steps": torch.tensor(steps), "ranks": torch.stack(ranks)}
        return groups

    def load_state(self, k: int, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restore experiment k's state, as returned by `state`; all experiments of a bank are at the same step."""
        for name, mean_KQ in self.means.items():
            mean_KP = F.pad(mean_KQ, (self._first_column, 0))
            for tensor_name, value in state[name].items():
                self.bank.tensor(k, tensor_name, mean_KP).copy_(value)
            mean_KQ.copy_(mean_KP[:, self._first_column :])
        for layer, span in self._triplet_spans(k).items():
            self._active_KN[k, span] = state["kept"][layer].to(self._active_KN.device)
        history = state.get("allocated", {"steps": torch.tensor([]), "ranks": torch.tensor([])})
        ranks = history["ranks"].to(self._active_KN.device)
        self._history[k] = list(zip(history["steps"].tolist(), ranks, strict=True))

    def _layers_of(self, k: int) -> list[str]:
        """The layers that experiment k adapts, sorted by name."""
        adapted = set(self.bank.placements[k].lora)
        return [layer for layer in self.layers if layer in adapted]

    def _triplet_spans(self, k: int) -> dict[str, slice]:
        """Where experiment k's triplets are among all N, by layer, without padding."""
        rank = self.bank.adapters[k].start_rank
        spans = dict(zip(self.layers, self._layer_spans, strict=True))
        return {layer: slice(spans[layer].start, spans[layer].start + rank) for layer in self._layers_of(k)}

    def _present_triplets(self, k: int) -> Tensor:
        """The mask (bool, N) of experiment k's triplets, without padding."""
        mask_N = torch.zeros(self._layer_spans[-1].stop, dtype=torch.bool)
        for span in self._triplet_spans(k).values():
            mask_N[span] = True
        return mask_N

    def _count_active(self, k: int) -> Tensor:
        """The number of active triplets in each of experiment k's layers."""
        return torch.stack([self._active_KN[k, span].sum() for span in self._triplet_spans(k).values()])

    def _columns(self, matrix: Tensor, layer: str, name: str) -> Tensor:
        """A layer's low-rank tensor of all experiments: a view of a matrix `K × P`."""
        return self.bank.columns(matrix, self.bank.slots[f"{layer}.{name}"])
