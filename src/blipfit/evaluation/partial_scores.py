"""Scores of an evaluation that is not finished: saved at intervals, so that a kill loses no more than one interval.

Every experiment of a bank has its own file. It names what was evaluated (the checkpoint, or the hashes of weights and
settings); scores of anything else are not used. A batch whose questions all have scores is not evaluated again. The
batches, and so all results, are the same as without an interruption.
"""

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from blipfit import run_folder
from blipfit.runtime import distributed, interruption
from blipfit.runtime.save_interval import SaveInterval, SaveTimer

Scores = dict[tuple[int, int], Any]
"""A JSON value for each (experiment, question)."""


class PartialScores:
    """The scores of one evaluation, in sections: one for each pass over the questions.

    `files`: one per experiment; empty if nothing is saved. `get_identities`: what each experiment's scores belong to
    (empty if that has no name yet). `prepare_save` is called before the first save, to give it a name.
    """

    def __init__(
        self,
        files: Sequence[Path] = (),
        get_identities: Callable[[], Sequence[str]] = lambda: (),
        interval: SaveInterval | None = None,
        prepare_save: Callable[[], None] = lambda: None,
    ):
        self.files, self.get_identities, self.prepare_save = list(files), get_identities, prepare_save
        self.timer = SaveTimer(interval or SaveInterval())
        self._prefix = ""
        self._sections: dict[str, Scores] = {}
        if self.files:
            self._sections = distributed.all_gather([self._read()])[0]  # only the main process has the files

    def section(self, name: str) -> "PartialScores":
        """The same scores for one part of the evaluation, whose passes have names of their own."""
        part = copy.copy(self)
        part._prefix = f"{self._prefix}{name}/"
        return part

    def evaluate(
        self,
        section: str,
        batches: Sequence[Sequence[int]],
        evaluate_batch: Callable[[Sequence[int]], Sequence[Sequence[Any]]],
        advance: Callable[[int], None] = lambda count: None,
        equal_batch_counts: bool = False,
    ) -> Scores:
        """Evaluate all batches of question indices that have no scores yet; returns the scores of all questions.

        `evaluate_batch` returns a list of scores for each experiment, JSON values or tensors of one number.
        `advance(count)` is called after each batch with its number of questions. `equal_batch_counts`: every
        process evaluates the same number of batches, one of them again if need be, as a sharded model requires. Raises
        Interrupted, after saving, if a signal arrived.
        """
        name = self._prefix + section
        scores = self._sections.setdefault(name, {})
        missing = [batch for batch in batches if not self._has_scores(scores, batch)]
        for batch in batches:
            if self._has_scores(scores, batch):
                advance(len(batch))
        shard, processes = distributed.own_share(missing), distributed.process_count()
        new: list[tuple[int, int, Any]] = []
        for number in range(-(-len(missing) // processes)):  # the same for all processes, also if one has a batch less
            if number < len(shard):
                for k, values in enumerate(evaluate_batch(shard[number])):
                    new += [(k, i, value) for i, value in zip(shard[number], values, strict=False)]
                advance(len(shard[number]))
            elif equal_batch_counts:
                evaluate_batch(missing[0])
            if self.files:
                self.timer.count_step()
                self._save_if_due(scores, new)
        self._merge(scores, new)
        return scores

    def save(self) -> None:
        """Write the scores up to now; every file is whole at any time."""
        self.prepare_save()
        self.timer.reset()
        for k, (file, identity) in enumerate(zip(self.files, self.get_identities(), strict=True)):
            sections = {
                name: {i: _to_json(value) for (experiment, i), value in scores.items() if experiment == k}
                for name, scores in self._sections.items()
            }
            content = json.dumps({"of": identity, "sections": sections})
            if distributed.is_main():
                run_folder.write_text(file, f"{_digest(content)}\n{content}\n")

    def delete(self) -> None:
        """Delete the files; the evaluation is finished and recorded."""
        for file in self.files:
            file.unlink(missing_ok=True)

    def _has_scores(self, scores: Scores, batch: Sequence[int]) -> bool:
        return bool(self.files) and all((k, i) in scores for k in range(len(self.files)) for i in batch)

    def _save_if_due(self, scores: Scores, new: list[tuple[int, int, Any]]) -> None:
        stops, is_due = map(distributed.any_process, (interruption.is_requested(), self.timer.is_due))
        if stops or is_due:
            self._merge(scores, new)
            self.save()
        if stops:
            interruption.stop()

    def _merge(self, scores: Scores, new: list[tuple[int, int, Any]]) -> None:
        """Share the new scores among all processes."""
        if distributed.process_count() > 1:
            new[:] = [(k, i, _to_json(value)) for k, i, value in new]
        scores.update({(k, i): value for k, i, value in distributed.all_gather(new)})
        new.clear()

    def _read(self) -> dict[str, Scores]:
        """Scores from the files, without those that belong to something else; a damaged file counts as none."""
        sections: dict[str, Scores] = {}
        for k, (file, identity) in enumerate(zip(self.files, self.get_identities(), strict=True)):
            try:
                digest, content = file.read_text(encoding="utf-8").splitlines()
            except (OSError, ValueError):  # there is none, or it is damaged
                continue
            if digest != _digest(content) or not identity or (values := json.loads(content))["of"] != identity:
                continue
            for name, scores in values["sections"].items():
                sections.setdefault(name, {}).update({(k, int(i)): value for i, value in scores.items()})
        return sections


def _to_json(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) else value


def _digest(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()
