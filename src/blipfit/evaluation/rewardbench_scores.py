"""VL-RewardBench's scores: pairwise accuracy by category, pooled and macro, from judgments or likelihoods.

The rules are those of the official script (`cal.py`). A judgment names the better answer in its last sentence of the
form `Answer X is better` after the first `Overall Judgment` or `Therefore`. Of K judgments of a pair, those that name
no answer included, more than half decide: the pair is right, wrong or `unparsed` (most judgments name no answer);
without such a majority it is a `tie`. Accuracy is right pairs / (right + wrong pairs); the macro average is the mean
over the three categories. Excluded pairs are counted, and the accuracy `strict` takes them as wrong. A stricter rule is
reported beside the official one as `complete`: it leaves out every pair that has a judgment without a verdict.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from blipfit.data import annotations
from blipfit.data.rewardbench import CATEGORIES, Pair, clean_query, find_category, parse_ranking, parse_responses
from blipfit.errors import UserError
from blipfit.evaluation.metrics import wilson_interval

Outcome = Literal["right", "wrong", "tie", "unparsed"]
OUTCOMES: tuple[Outcome, ...] = ("right", "wrong", "tie", "unparsed")

# The official script searches for one expression, `HEADING.*VERDICT`, which takes quadratic time. The first heading and
# the last verdict after it give the same match in linear time: no part of a verdict can be the start of another.
_HEADING = re.compile(r"overall judgment|therefore", re.IGNORECASE)
_VERDICT = re.compile(r"answer\s*(\d+)\s*is\s*(?:the\s*)?(?:slightly\s*)?better", re.IGNORECASE)
_MAX_DIGITS = 18
_NO_ANSWER = 10**_MAX_DIGITS
"""Stands for every answer number with more digits; Python refuses to convert numbers of more than 4 300 digits."""


@dataclass(frozen=True, slots=True)
class Judgment:
    """A judge's text about one pair of responses."""

    id: str
    key: tuple[str, ...]
    """`Pair.key`: identifies the pair, because ids are not unique."""
    best: int
    """Index of the preferred response in the data set's row, 0 or 1."""
    swapped: bool
    """Whether the judge saw the responses in the reverse order."""
    text: str

    @property
    def verdict(self) -> int | None:
        """Number of the answer that the text calls better, counted from 1 in the order that the judge saw."""
        return parse_verdict(self.text)

    @property
    def outcome(self) -> Outcome:
        """Whether the verdict is right.

        Only the number of the rejected answer is wrong. A number that no answer has is right, as in the official
        script.
        """
        rejected = 1 + (self.best if self.swapped else 1 - self.best)
        verdict = self.verdict
        return "unparsed" if verdict is None else "wrong" if verdict == rejected else "right"


def parse_verdict(text: str) -> int | None:
    """Return the number of the answer that a judgment calls better, or None if it names none."""
    text = text.replace("\n", "").replace("*", "")
    heading = _HEADING.search(text)
    digits = [match[1] for match in _VERDICT.finditer(text, heading.end())] if heading else []
    if not digits:
        return None
    significant = digits[-1].lstrip("0") or "0"
    return int(significant) if len(significant) <= _MAX_DIGITS else _NO_ANSWER


def judge_prompt(pair: Pair, swapped: bool) -> str:
    """Return a prompt that asks for a judgment in the official form.

    The wording differs from the official prompt: it is short, for small models. `swapped` reverses the responses.
    """
    first, second = pair.responses[::-1] if swapped else pair.responses
    return (
        f"Question: {clean_query(pair)}\n\nAnswer 1: {first}\n\nAnswer 2: {second}\n\n"
        "Which of the two answers fits the image and the question better? Say why in a sentence, then end with "
        '"Overall Judgment: Answer X is better.", where X is 1 or 2.'
    )


def judgment_record(pair: Pair, swapped: bool, text: str) -> dict[str, Any]:
    """Return a line of a judgments file, in the format that the official script and `score_rewardbench` read."""
    judgment = Judgment(pair.id, pair.key, pair.best, swapped, text)
    status = {"right": "agree", "wrong": "reject"}.get(judgment.outcome, "doesntMatch")
    return {
        "id": pair.id,
        "query": pair.query,
        "response": list(pair.responses),
        "ranking": list(pair.ranking),
        "meta": {
            "filter_choice": text,
            "filter_number": -1 if judgment.verdict is None else judgment.verdict,
            "random_number": int(swapped),
            "flag_status": status,
        },
    }


def read_judgments(file: Path) -> list[Judgment]:
    """Read a file of judgments in the official format, one JSON object per line.

    The fields in use are id, query, response, ranking (or human_ranking), meta.filter_choice (the text) and
    meta.random_number (1: swapped). As in the official script, a line may be wrapped as `{"0": …}`, and `{"0": null}`
    is skipped. Raises UserError with file and line if a line does not follow this format.
    """
    judgments = parse_judgments(annotations.read_lines(file))
    if not judgments:
        raise UserError(f"{file} contains no judgments; give a JSONL file with one judgment per line")
    return judgments


def parse_judgments(lines: Iterable[tuple[str, dict[str, Any]]]) -> list[Judgment]:
    """Return the judgments of (location, record) pairs, as `read_judgments` describes them; raises UserError as it."""
    unwrapped = [(record.get("0", record), location) for location, record in lines]
    return [_parse_judgment(record, location) for record, location in unwrapped if record is not None]


def _parse_judgment(value: Any, location: str) -> Judgment:
    record = annotations.require_object(value, location)
    name, query = (
        annotations.require_text(record, "id", location),
        annotations.require_text(record, "query", location),
    )
    pair = parse_responses(record.get("response"), location)
    ranks = parse_ranking(record.get("ranking", record.get("human_ranking")), location)
    meta = annotations.require_object(record.get("meta"), f"{location}: 'meta'")
    text = annotations.require_text(meta, "filter_choice", f"{location}: 'meta'")
    swapped = meta.get("random_number")
    if swapped not in (0, 1):
        raise UserError(
            f"{location}: meta.random_number must be 0 (responses in order) or 1 (swapped) but is {swapped!r}"
        )
    return Judgment(name, (name, query, *sorted(pair)), ranks.index(0), bool(swapped), text)


def majority_outcome(outcomes: Sequence[Outcome]) -> Outcome:
    """Return the outcome of one pair by the official rule: what more than half of ALL its judgments say, else `tie`.

    Judgments without a verdict count in the total, so `right, right, unparsed` is right and `right, unparsed` a tie.
    """
    counts = Counter(outcomes)
    majority: tuple[Outcome, ...] = tuple(outcome for outcome in OUTCOMES if 2 * counts[outcome] > len(outcomes))
    return majority[0] if majority else "tie"


def complete_outcome(outcomes: Sequence[Outcome]) -> Outcome:
    """Return the outcome of one pair by the stricter rule: `unparsed` if one of its judgments is, else the majority."""
    return "unparsed" if "unparsed" in outcomes else majority_outcome(outcomes)


def summarize_outcomes(outcomes: Iterable[tuple[str, Outcome]]) -> dict[str, Any]:
    """Return the accuracies in percent, by category, pooled and macro, from (category, outcome) of every pair.

    Macro is None unless each of the three categories has a right or a wrong pair.
    """
    counts_by_category: dict[str, Counter[Outcome]] = {name: Counter() for name in CATEGORIES}
    for name, outcome in outcomes:
        counts_by_category[name][outcome] += 1
    categories = {name: _accuracy(counts) for name, counts in counts_by_category.items() if counts}
    decided = [facts["accuracy"] for facts in categories.values() if facts["accuracy"] is not None]
    return {
        "categories": categories,
        "pooled": _accuracy(sum(counts_by_category.values(), Counter())),
        "macro": round(sum(decided) / len(decided), 4) if len(decided) == len(CATEGORIES) else None,
    }


def _accuracy(counts: Counter[Outcome]) -> dict[str, Any]:
    decided, pairs = counts["right"] + counts["wrong"], counts.total()
    low, high = wilson_interval(counts["right"], decided)
    return {
        "accuracy": round(100 * counts["right"] / decided, 4) if decided else None,
        "interval": [round(low, 4), round(high, 4)],
        "strict": round(100 * counts["right"] / pairs, 4) if pairs else None,
        "pairs": pairs,
        **{name: counts[name] for name in OUTCOMES},
    }


def pairwise_accuracy(pairs: Sequence[Pair], scores: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Return how often the preferred response has the higher score, e.g. the higher log-likelihood.

    `scores` has the scores of both responses of each pair, in the pair's order. Equal scores are a tie. A pair that
    repeats an earlier pair's id, query and responses is not counted again. Raises UserError if a score is NaN or
    infinite.
    """
    outcomes: dict[tuple[str, ...], tuple[str, Outcome]] = {}
    for pair, pair_scores in zip(pairs, scores, strict=True):
        if not all(map(math.isfinite, pair_scores)):
            raise UserError(f"{pair.id}: its scores {pair_scores} are not finite numbers; check the model's weights")
        preferred, rejected = pair_scores[pair.best], pair_scores[1 - pair.best]
        outcome: Outcome = "right" if preferred > rejected else "wrong" if preferred < rejected else "tie"
        outcomes.setdefault(pair.key, (pair.category, outcome))
    return {
        "judge": "rewardbench",
        "rows": len(pairs),
        "repeated_rows": len(pairs) - len(outcomes),
        "repeated_ids": _count_repeated_ids(outcomes),
        "equal_responses": sum(key[-1] == key[-2] for key in outcomes),
        **summarize_outcomes(outcomes.values()),
    }


def score_judgments(judgments: Sequence[Judgment], samples: int | None = None) -> dict[str, Any]:
    """Score judgments by the official rule, with the first `samples` judgments of every pair; None takes all.

    The official script samples the judgments of a pair at random; here the order decides. In the record, `complete`
    is the summary by the stricter rule (`complete_outcome`), `mean` the accuracy over single judgments instead of
    pairs, by category and pooled: right / (right + wrong). Raises UserError if `samples` is below 1.
    """
    if samples is not None and samples < 1:
        raise UserError(f"samples is {samples}; it must be 1 or more")
    by_pair: dict[tuple[str, ...], list[Judgment]] = {}
    for judgment in judgments:
        by_pair.setdefault(judgment.key, []).append(judgment)
    by_pair = {key: pair_judgments[:samples] for key, pair_judgments in by_pair.items()}
    outcomes = {key: [judgment.outcome for judgment in pair_judgments] for key, pair_judgments in by_pair.items()}
    categories = {key: find_category(key[0]) for key in by_pair}
    single = summarize_outcomes((categories[key], outcome) for key, row in outcomes.items() for outcome in row)
    counts = [len(pair_judgments) for pair_judgments in by_pair.values()]
    return {
        "judge": "rewardbench",
        "judgments": len(judgments),
        "samples": [min(counts), max(counts)],
        "repeated_ids": _count_repeated_ids(by_pair),
        "equal_responses": sum(key[-1] == key[-2] for key in by_pair),
        **summarize_outcomes((categories[key], majority_outcome(row)) for key, row in outcomes.items()),
        "complete": summarize_outcomes((categories[key], complete_outcome(row)) for key, row in outcomes.items()),
        "mean": {
            **{name: facts["accuracy"] for name, facts in single["categories"].items()},
            "pooled": single["pooled"]["accuracy"],
            "macro": single["macro"],
        },
        **_position_statistics(by_pair.values()),
    }


def score_rewardbench(file: Path | str, samples: int | None = None) -> dict[str, Any]:
    """Score a file of judgments; see `read_judgments` and `score_judgments`."""
    return {**score_judgments(read_judgments(Path(file)), samples), "file": str(file)}


def _count_repeated_ids(keys: Mapping[tuple[str, ...], Any]) -> int:
    """Return the number of pairs whose id an earlier pair has too; 25 in the whole data set."""
    return len(keys) - len({key[0] for key in keys})


def _position_statistics(judgments_by_pair: Iterable[Sequence[Judgment]]) -> dict[str, Any]:
    """Return how often each answer number is the verdict, and how often swapping the answers changes no outcome.

    A pair is steady if all its judgments, in both orders, prefer the same response.
    """
    verdicts: Counter[int] = Counter()
    pairs = steady = 0
    for judgments in judgments_by_pair:
        parsed = [(j, verdict) for j in judgments if (verdict := j.verdict) is not None]
        verdicts.update(verdict for _, verdict in parsed)
        if len({j.swapped for j, _ in parsed}) == 2:
            pairs += 1
            steady += len({j.outcome for j, _ in parsed}) == 1
    first, second = verdicts[1], verdicts[2]
    return {
        "chosen": {"answer_1": first, "answer_2": second, "neither": verdicts.total() - first - second},
        "both_orders": {"pairs": pairs, "steady": steady},
    }
