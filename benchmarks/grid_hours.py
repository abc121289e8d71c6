"""How long the 128 published experiments take, estimated from records of `benchmarks.gpu`.

`python -m benchmarks.grid_hours FILE…` prints a table. Counted are training for all 15 epochs, a validation after
each, and the test: 20 experiments of a language model have LoRA in the Q-Former, 12 train all of it (setting "full
Q-Former" of a record; without one they are left out). Not counted: loading, compiling, and computing the image
features once. Both data sets are counted with the record's questions (106 tokens of text, four candidates); IconQA's
are shorter. Early stopping makes it shorter still.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

QUESTIONS = {"ScienceQA": (6218, 2097, 2017), "IconQA": (18946, 6316, 6316)}
"""Training, validation and test questions."""
TITLES = {"t5": "Flan-T5-XL", "vicuna": "Vicuna-7B"}
BATCH, EPOCHS, CARDS = 16, 15, 8
KINDS = {"LoRA": 20, "full Q-Former": 12}
"""Experiments of one language model on one data set, by what is trained in the Q-Former."""


def training_entries(family: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All measured banks of a record with their setting; those that ran out of memory are left out."""
    entries = [{"setting": "plain", **entry} for entry in family.get("banks", {}).values()]
    for settings in family.get("settings", {}).values():
        entries += [{"setting": name, **entry} for name, entry in settings.items()]
    return [entry for entry in entries if "seconds_per_experiment" in entry]


def ranking_entries(family: Mapping[str, Any]) -> list[dict[str, Any]]:
    entries = [entry for name, entry in family.get("ranking", {}).items() if name != "original"]
    return [entry for entry in entries if "seconds_per_experiment" in entry]


def hours(step_seconds: float, question_seconds: float, counts: tuple[int, int, int]) -> float:
    """Hours of one experiment: 15 epochs with a validation each, then validation and test."""
    train, val, test = counts
    steps = train // BATCH * EPOCHS
    return (steps * step_seconds + ((EPOCHS + 1) * val + test) * question_seconds) / 3600


def bank_sizes(experiments: int, most: int) -> list[int]:
    """As a sweep divides experiments: as few banks as possible, as even as possible."""
    banks = -(-experiments // most)
    return [(index + 1) * experiments // banks - index * experiments // banks for index in range(banks)]


def makespan(durations: Sequence[float], cards: int) -> float:
    """Hours until the last card is done, the longest bank first to the card that is free first."""
    busy = [0.0] * cards
    for duration in sorted(durations, reverse=True):
        busy[busy.index(min(busy))] += duration
    return max(busy)


def main() -> None:
    records = [json.loads(Path(name).read_text(encoding="utf-8")) for name in sys.argv[1:]]
    if not records:
        sys.exit("give records of benchmarks.gpu")
    print("| | bank | one experiment | experiments | all of them, 1 card |")
    print("|---|---|---|---|---|")
    durations: list[float] = []
    for family, title in TITLES.items():
        parts = [record[family] for record in records if family in record]
        banks = [entry for part in parts for entry in training_entries(part)]
        rankings = [entry for part in parts for entry in ranking_entries(part)]
        if not banks or not rankings:
            print(f"{title}: the records have no bank or no ranking", file=sys.stderr)
            continue
        question = min(entry["seconds_per_experiment"] for entry in rankings)
        for kind, experiments in KINDS.items():
            measured = [entry for entry in banks if entry["setting"].startswith("full") == (kind != "LoRA")]
            if not measured:
                print(f"{title}: no bank of kind {kind}", file=sys.stderr)
                continue
            bank = min(measured, key=lambda entry: entry["seconds_per_experiment"])
            setting = bank["setting"].replace("full Q-Former", "plain")
            for data, counts in QUESTIONS.items():
                each = hours(bank["seconds_per_experiment"], question, counts)
                print(
                    f"| {title}, {data}, {kind} | {bank['experiments']}, {setting} | {60 * each:.0f} min | "
                    f"{experiments} | {experiments * each:.1f} h |"
                )
                durations += [size * each for size in bank_sizes(experiments, bank["experiments"])]
    print(f"\nall together: {sum(durations):.0f} h on 1 card, {makespan(durations, CARDS):.1f} h on {CARDS} cards")


if __name__ == "__main__":
    main()
