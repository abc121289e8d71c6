"""How long the published LoRA experiments take at most, from records of `benchmarks.gpu`.

`python -m benchmarks.grid_hours FILE…` prints a table.

An upper bound: all 15 epochs, though early stopping ends most experiments sooner. Only the experiments with LoRA in the
Q-Former (20 of a family's 32) are counted; those that train all of it were not measured. Both data sets are counted
with the record's questions (106 tokens of text, four candidates), which is right for ScienceQA and too long for IconQA.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

QUESTIONS = {"ScienceQA": (6218, 2097, 2017), "IconQA": (18946, 6316, 6316)}
"""Training, validation and test questions."""
BATCH, EPOCHS, EXPERIMENTS = 16, 15, 20


def best_bank(family: Mapping[str, Any]) -> dict[str, Any]:
    """The bank with the least time per experiment, with its setting."""
    entries = [{"setting": "plain", **entry} for entry in family["banks"].values()]
    for K in family.get("settings", {}).values():
        entries += [{"setting": name, **entry} for name, entry in K.items()]
    return min(entries, key=lambda entry: entry["seconds_per_experiment"])


def hours(step_seconds: float, question_seconds: float, counts: tuple[int, int, int]) -> float:
    """Hours of one experiment: 15 epochs with a validation each, then validation and test."""
    train, val, test = counts
    steps = train // BATCH * EPOCHS
    return (steps * step_seconds + ((EPOCHS + 1) * val + test) * question_seconds) / 3600


def main() -> None:
    records = [json.loads(Path(name).read_text(encoding="utf-8")) for name in sys.argv[1:]]
    if not records:
        sys.exit("give records of benchmarks.gpu")
    print("| | bank | one experiment | 20 experiments, 1 card | 8 cards | Trainer + peft, one experiment |")
    print("|---|---|---|---|---|---|")
    for family, title in (("t5", "Flan-T5-XL"), ("vicuna", "Vicuna-7B")):
        parts = [record[family] for record in records if family in record]
        if not parts:
            continue
        bank = min(map(best_bank, parts), key=lambda entry: entry["seconds_per_experiment"])
        ranking = next(part["ranking"] for part in parts if "bank of 8" in part.get("ranking", {}))
        question = min(e["seconds_per_experiment"] for name, e in ranking.items() if name.startswith("bank"))
        trainer = next(part["peers"]["trainer_peft"] for part in parts if "trainer_peft" in part.get("peers", {}))
        for data, counts in QUESTIONS.items():
            each = hours(bank["seconds_per_experiment"], question, counts)
            theirs = hours(trainer["step_seconds"], ranking["original"]["question_seconds"], counts)
            print(
                f"| {title}, {data} | {bank['experiments']}, {bank['setting']} | {60 * each:.0f} min | "
                f"{EXPERIMENTS * each:.1f} h | {EXPERIMENTS * each / 8:.1f} h | {theirs:.1f} h |"
            )


if __name__ == "__main__":
    main()
