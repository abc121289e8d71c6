"""Estimates how long the 128 published experiments take: `python -m benchmarks.grid_hours FILE…` prints a table.

The files are records of `benchmarks.gpu`. The estimate has 15 epochs of training, a validation after each epoch, and
the test. Of the 32 experiments of a language model on a data set, 20 have LoRA in the Q-Former, and 12 train the whole
Q-Former (setting "full Q-Former" of a record; without it they are left out). Not included: loading, compiling, and
computing the image features once. Both data sets are estimated with the record's questions (106 tokens of text, four
candidates), although IconQA's are shorter. Early stopping makes the experiments shorter, too.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

QUESTIONS = {"ScienceQA": (6218, 2097, 2017), "IconQA": (18946, 6316, 6316)}
"""Training, validation and test questions."""
MODEL_TITLES = {"t5": "Flan-T5-XL", "vicuna": "Vicuna-7B"}
BATCH, EPOCHS, CARDS = 16, 15, 8
EXPERIMENTS = {"LoRA": 20, "full Q-Former": 12}
"""Experiments of one language model on one data set, by what is trained in the Q-Former."""


def training_entries(family: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the measured banks of a family's record with their setting, without those that ran out of memory."""
    entries = [{"setting": "plain", **entry} for entry in family.get("banks", {}).values()]
    for settings in family.get("settings", {}).values():
        entries += [{"setting": name, **entry} for name, entry in settings.items()]
    return [entry for entry in entries if "seconds_per_experiment" in entry]


def ranking_entries(family: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rankings in banks of a family's record, without those that ran out of memory."""
    entries = [entry for name, entry in family.get("ranking", {}).items() if name != "original"]
    return [entry for entry in entries if "seconds_per_experiment" in entry]


def experiment_hours(step_seconds: float, question_seconds: float, counts: tuple[int, int, int]) -> float:
    """Return the hours of an experiment: 15 epochs with a validation after each, then validation and test.

    `counts` are the numbers of training, validation and test questions.
    """
    train, val, test = counts
    steps = train // BATCH * EPOCHS
    return (steps * step_seconds + ((EPOCHS + 1) * val + test) * question_seconds) / 3600


def bank_sizes(experiments: int, max_size: int) -> list[int]:
    """Divide experiments into as few banks as possible, of sizes as equal as possible, as a sweep does."""
    banks = -(-experiments // max_size)
    return [(index + 1) * experiments // banks - index * experiments // banks for index in range(banks)]


def makespan(durations: Sequence[float], cards: int) -> float:
    """Return the time until all cards have finished; the longest bank goes first, to the card that is free first."""
    busy_until = [0.0] * cards
    for duration in sorted(durations, reverse=True):
        busy_until[busy_until.index(min(busy_until))] += duration
    return max(busy_until)


def main() -> None:
    records = [json.loads(Path(name).read_text(encoding="utf-8")) for name in sys.argv[1:]]
    if not records:
        sys.exit("no files; give records of benchmarks.gpu, such as benchmarks/results/*-gpu-*.json")
    print("| | bank | one experiment | experiments | all of them, 1 card |")
    print("|---|---|---|---|---|")
    durations: list[float] = []
    for family, title in MODEL_TITLES.items():
        parts = [record[family] for record in records if family in record]
        banks = [entry for part in parts for entry in training_entries(part)]
        rankings = [entry for part in parts for entry in ranking_entries(part)]
        if not banks or not rankings:
            print(f"{title}: the records have no bank or no ranking", file=sys.stderr)
            continue
        question_seconds = min(entry["seconds_per_experiment"] for entry in rankings)
        for kind, experiments in EXPERIMENTS.items():
            measured = [entry for entry in banks if entry["setting"].startswith("full") == (kind != "LoRA")]
            if not measured:
                print(f"{title}: no bank of kind {kind}", file=sys.stderr)
                continue
            bank = min(measured, key=lambda entry: entry["seconds_per_experiment"])
            setting = bank["setting"].replace("full Q-Former", "plain")
            for data, counts in QUESTIONS.items():
                hours = experiment_hours(bank["seconds_per_experiment"], question_seconds, counts)
                print(
                    f"| {title}, {data}, {kind} | {bank['experiments']}, {setting} | {60 * hours:.0f} min | "
                    f"{experiments} | {experiments * hours:.1f} h |"
                )
                durations += [size * hours for size in bank_sizes(experiments, bank["experiments"])]
    print(f"\nall together: {sum(durations):.0f} h on 1 card, {makespan(durations, CARDS):.1f} h on {CARDS} cards")


if __name__ == "__main__":
    main()
