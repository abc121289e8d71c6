"""VL-RewardBench as a benchmark: pairwise accuracy by category, pooled and macro, from judgements or likelihoods.

The rules are those of the official script (`cal.py`). A judgement names the better answer in its last sentence of the
form `Answer X is better` after the first `Overall Judgment` or `Therefore`. Of K judgements of a pair the majority
decides; a pair with any judgement that names none is left out, one without a majority too. Accuracy is right pairs /
(right + wrong pairs); the macro average is the mean of the three categories. What is left out is counted here, and
`strict` is the accuracy with all of it taken as wrong.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from blipfit.data import records
from blipfit.data.rewardbench import CATEGORIES, Pair, category, query, ranking, responses
from blipfit.errors import UserError
from blipfit.evaluation.metrics import wilson

Outcome = Literal["right", "wrong", "tie", "unparsed"]
OUTCOMES: tuple[Outcome, ...] = ("right", "wrong", "tie", "unparsed")

_VERDICT = re.compile(
    r"(?:overall judgment|therefore).*answer\s*(\d+)\s*is\s*(?:the\s*)?(?:slightly\s*)?better", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class Judgement:
    """One finished judgement of a pair that was shown in its own order or swapped."""

    id: str
    key: tuple[str, ...]
    best: int
    """The place of the preferred response in the row, 0 or 1."""
    swapped: bool
    text: str

    @property
    def chosen(self) -> int | None:
        """The number of the answer that the text calls better, counted from 1 as shown."""
        return verdict(self.text)

    @property
    def outcome(self) -> Outcome:
        """Right unless the rejected answer is named: a number that was not shown is right too, as officially."""
        rejected = 1 + (self.best if self.swapped else 1 - self.best)
        return "unparsed" if self.chosen is None else "wrong" if self.chosen == rejected else "right"


def verdict(text: str) -> int | None:
    """The number of the answer that a judgement calls better, or None where it names none."""
    found = _VERDICT.search(text.replace("\n", "").replace("*", ""))
    return int(found[1]) if found else None


def judge_prompt(pair: Pair, swapped: bool) -> str:
    """A prompt that asks for a judgement in the official form; its words are ours and short, as small models need."""
    first, second = pair.responses[::-1] if swapped else pair.responses
    return (
        f"Question: {query(pair)}\n\nAnswer 1: {first}\n\nAnswer 2: {second}\n\n"
        "Which of the two answers fits the image and the question better? Say why in a sentence, then end with "
        '"Overall Judgment: Answer X is better.", where X is 1 or 2.'
    )


def judgement_record(pair: Pair, swapped: bool, text: str) -> dict[str, Any]:
    """One line of a file of judgements, in the format that the official script and `score_rewardbench` read."""
    made = Judgement(pair.id, pair.key, pair.best, swapped, text)
    status = {"right": "agree", "wrong": "reject"}.get(made.outcome, "doesntMatch")
    return {
        "id": pair.id,
        "query": pair.query,
        "response": list(pair.responses),
        "ranking": list(pair.ranking),
        "meta": {
            "filter_choice": text,
            "filter_number": -1 if made.chosen is None else made.chosen,
            "random_number": int(swapped),
            "flag_status": status,
        },
    }


def read_judgements(file: Path) -> list[Judgement]:
    """Read finished judgements, one JSON object a line, in the official format.

    Read are id, query, response, ranking (or human_ranking), meta.filter_choice (the text) and meta.random_number
    (1: shown swapped). As officially, a line may be wrapped as `{"0": …}`, and `{"0": null}` is passed over. Any
    other odd line is a UserError with its number.
    """
    lines = [(record.get("0", record), where) for where, record in records.read_lines(file)]
    found = [_judgement(record, where) for record, where in lines if record is not None]
    if not found:
        raise UserError(f"{file} holds no judgements")
    return found


def _judgement(value: Any, where: str) -> Judgement:
    record = records.mapping(value, where)
    name, asked = records.text(record, "id", where), records.text(record, "query", where)
    pair = responses(record.get("response"), where)
    ranks = ranking(record.get("ranking", record.get("human_ranking")), where)
    meta = records.mapping(record.get("meta"), f"{where}: 'meta'")
    text = records.text(meta, "filter_choice", f"{where}: 'meta'")
    swapped = meta.get("random_number")
    if swapped not in (0, 1):
        raise UserError(f"{where}: meta.random_number must be 0 (shown in order) or 1 (swapped) but is {swapped!r}")
    return Judgement(name, (name, asked, *sorted(pair)), ranks.index(0), bool(swapped), text)


def vote(outcomes: Sequence[Outcome]) -> Outcome:
    """The official verdict over the judgements of one pair: one that names no answer spoils it, else the majority."""
    counts = Counter(outcomes)
    if counts["unparsed"]:
        return "unparsed"
    if counts["right"] == counts["wrong"]:
        return "tie"
    return "right" if counts["right"] > counts["wrong"] else "wrong"


def tally(outcomes: Iterable[tuple[str, Outcome]]) -> dict[str, Any]:
    """Accuracies in percent from (category, outcome) of every pair: by category, pooled, and macro.

    Macro is None unless all three categories have a pair that was decided.
    """
    by: dict[str, Counter[Outcome]] = {name: Counter() for name in CATEGORIES}
    for name, outcome in outcomes:
        by[name][outcome] += 1
    categories = {name: _accuracy(counts) for name, counts in by.items() if counts}
    decided = [facts["accuracy"] for facts in categories.values() if facts["accuracy"] is not None]
    return {
        "categories": categories,
        "pooled": _accuracy(sum(by.values(), Counter())),
        "macro": round(sum(decided) / len(decided), 4) if len(decided) == len(CATEGORIES) else None,
    }


def _accuracy(counts: Counter[Outcome]) -> dict[str, Any]:
    decided, pairs = counts["right"] + counts["wrong"], counts.total()
    low, high = wilson(counts["right"], decided)
    return {
        "accuracy": round(100 * counts["right"] / decided, 4) if decided else None,
        "interval": [round(low, 4), round(high, 4)],
        "strict": round(100 * counts["right"] / pairs, 4) if pairs else None,
        "pairs": pairs,
        **{name: counts[name] for name in OUTCOMES},
    }


def pairwise(pairs: Sequence[Pair], scores: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Pairwise accuracy from a score of each response, e.g. its log-likelihood: the higher one is chosen.

    A row that repeats another's id, query and responses counts once; equal scores are a tie.
    """
    outcomes: dict[tuple[str, ...], tuple[str, Outcome]] = {}
    for pair, both in zip(pairs, scores, strict=True):
        best, other = both[pair.best], both[1 - pair.best]
        outcome: Outcome = "right" if best > other else "wrong" if best < other else "tie"
        outcomes.setdefault(pair.key, (pair.category, outcome))
    return {
        "judge": "rewardbench",
        "rows": len(pairs),
        "repeated_rows": len(pairs) - len(outcomes),
        "repeated_ids": _repeated_ids(outcomes),
        **tally(outcomes.values()),
    }


def score(judgements: Sequence[Judgement], samples: int | None = None) -> dict[str, Any]:
    """Score judgements by the official rule; `samples` keeps the first so many of every pair.

    The official script draws its K judgements of a pair at random; the order of the file decides here. `mean` is the
    mean over single judgements instead of pairs, by category and pooled: right / (right + wrong).
    """
    if samples is not None and samples < 1:
        raise UserError(f"samples is {samples}; it must be 1 or more")
    of: dict[tuple[str, ...], list[Judgement]] = {}
    for judgement in judgements:
        of.setdefault(judgement.key, []).append(judgement)
    kept = {key: found[:samples] for key, found in of.items()}
    single = tally((category(j.id), j.outcome) for found in kept.values() for j in found)
    lengths = [len(found) for found in kept.values()]
    return {
        "judge": "rewardbench",
        "judgements": len(judgements),
        "samples": [min(lengths), max(lengths)],
        "repeated_ids": _repeated_ids(kept),
        **tally((category(key[0]), vote([j.outcome for j in found])) for key, found in kept.items()),
        "mean": {
            **{name: facts["accuracy"] for name, facts in single["categories"].items()},
            "pooled": single["pooled"]["accuracy"],
            "macro": single["macro"],
        },
        **_habits(kept.values()),
    }


def score_rewardbench(file: Path | str, samples: int | None = None) -> dict[str, Any]:
    """Score a file of finished judgements; see `read_judgements` and `score`."""
    return {**score(read_judgements(Path(file)), samples), "file": str(file)}


def _repeated_ids(keys: Mapping[tuple[str, ...], Any]) -> int:
    """How many pairs have an id that an earlier pair has too (25 in the whole set)."""
    return len(keys) - len({key[0] for key in keys})


def _habits(found: Iterable[Sequence[Judgement]]) -> dict[str, Any]:
    """How often the first answer shown is chosen, and whether the choice survives swapping the answers.

    A pair is steady if all its judgements, in both orders, prefer the same response.
    """
    chosen: Counter[int] = Counter()
    both = steady = 0
    for judgements in found:
        parsed = [j for j in judgements if j.chosen is not None]
        chosen.update(j.chosen for j in parsed if j.chosen is not None)
        if len({j.swapped for j in parsed}) == 2:
            both += 1
            steady += len({j.outcome for j in parsed}) == 1
    return {
        "chosen": {"answer_1": chosen[1], "answer_2": chosen[2], "neither": chosen.total() - chosen[1] - chosen[2]},
        "both_orders": {"pairs": both, "steady": steady},
    }
