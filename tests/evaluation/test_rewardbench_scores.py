"""VL-RewardBench's rules: verdicts in texts, both orders, majority of samples, ties, duplicates, averages."""

import json
import math
import random
import re
import time
from collections import Counter
from pathlib import Path

import pytest

from blipfit.data.rewardbench import Pair, read_pairs
from blipfit.errors import UserError
from blipfit.evaluation import rewardbench_scores
from blipfit.evaluation.rewardbench_scores import (
    Judgment,
    complete_outcome,
    judge_prompt,
    judgment_record,
    majority_outcome,
    pairwise_accuracy,
    parse_verdict,
)

ROWS = Path(__file__).parents[2].parent / "shared" / "data" / "vl_rewardbench" / "test_text_only.jsonl"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("Overall Judgment: Answer 1 is better.", 1),
        ("… **Overall Judgment:** **Answer 2** is better.", 2),
        ("overall judgment\n\n- ANSWER 2 is slightly better", 2),
        ("Therefore, I find that Answer 1 is the better one.", 1),
        ("Therefore Answer 2 is the slightly better answer", 2),
        ("Overall Judgment: Answer 1 is better in style. But Answer 2 is better.", 2),  # the last one counts
        ("Answer 1 is better. Overall Judgment: they are equal.", None),  # only what follows the heading
        ("Answer 1 is better.", None),
        ("Overall Judgment: Answer 1 is far better.", None),
        ("Overall Judgment: Response 1 is better.", None),
        ("Overall\nJudgment: Answer 1 is better.", None),  # line breaks are removed, not replaced by blanks
        ("Overall Judgment: Answer 1\nis better.", 1),
        ("Overall Judgment: Answer X is better.", None),
        ("Overall Judgment: Answer 3 is better.", 3),
        ("Overall Judgment: Answer1is better", 1),
        ("", None),
    ],
)
def test_the_verdict_is_read_from_the_text(text: str, number: int | None):
    assert parse_verdict(text) == number


def judgment_text(number: int) -> str:
    return f"Overall Judgment: Answer {number} is better." if number else "I cannot tell."


@pytest.mark.parametrize(
    ("best", "swapped", "number", "outcome"),
    [
        (0, False, 1, "right"),
        (0, False, 2, "wrong"),
        (0, True, 1, "wrong"),
        (0, True, 2, "right"),
        (1, False, 1, "wrong"),
        (1, False, 2, "right"),
        (1, True, 1, "right"),
        (1, True, 2, "wrong"),
        (1, True, 3, "right"),  # as in the official script: only the rejected answer's number is wrong
        (0, False, 0, "unparsed"),
    ],
)
def test_the_outcome_depends_on_the_order_of_the_responses(best: int, swapped: bool, number: int, outcome: str):
    assert Judgment("a", ("a",), best, swapped, judgment_text(number)).outcome == outcome


def test_the_majority_decides():
    assert majority_outcome(["right"]) == "right"
    assert majority_outcome(["wrong", "right", "wrong"]) == "wrong"
    assert majority_outcome(["wrong", "right"]) == "tie"
    assert majority_outcome(["right", "right", "unparsed"]) == "right"
    assert majority_outcome(["wrong", "unparsed", "wrong"]) == "wrong"
    assert majority_outcome(["right", "unparsed"]) == "tie"
    assert majority_outcome(["right", "right", "wrong", "unparsed"]) == "tie"
    assert majority_outcome(["right", "unparsed", "unparsed"]) == "unparsed"
    assert majority_outcome(["right", "wrong", "unparsed"]) == "tie"


def test_by_the_stricter_rule_a_missing_verdict_excludes_the_pair():
    assert complete_outcome(["right", "right", "unparsed"]) == "unparsed"
    assert complete_outcome(["right", "right", "wrong"]) == "right"
    assert complete_outcome(["right", "wrong"]) == "tie"


def test_the_official_value_and_the_stricter_one_stand_side_by_side(tmp_path: Path):
    names = ("RLHF-V-1", "mmmu_1", "wildvision-1")
    judgments = [(pair(name), False, number) for name in names for number in (1, 1, 0)]
    record = rewardbench_scores.score_rewardbench(write_judgments(tmp_path / "judgments.jsonl", judgments))
    assert record["macro"] == record["pooled"]["accuracy"] == record["pooled"]["strict"] == 100
    assert {name: facts["accuracy"] for name, facts in record["categories"].items()} == {
        "general": 100,
        "hallucination": 100,
        "reasoning": 100,
    }
    complete = record["complete"]
    assert (complete["macro"], complete["pooled"]["accuracy"], complete["pooled"]["unparsed"]) == (None, None, 3)
    assert (complete["pooled"]["pairs"], complete["pooled"]["strict"]) == (3, 0)


def test_long_judgments_are_read_in_linear_time():
    for text in (
        "therefore answer 1 " * 50_000,
        "Therefore " + "answer 1 is the slightly " * 50_000,
        "Therefore answer " + " " * 1_000_000 + "1",
        "Therefore answer " + "1" * 1_000_000,
        "overall judgment" * 50_000,
    ):
        start = time.perf_counter()
        assert parse_verdict(text) is None
        assert time.perf_counter() - start < 2
        assert parse_verdict(text + " Therefore Answer 2 is better") == 2


def test_a_number_of_thousands_of_digits_is_no_answers_number():
    text = f"Therefore answer {'9' * 5000} is better"
    verdict = parse_verdict(text)
    assert verdict is not None
    assert verdict > 2
    assert Judgment("a", ("a",), 0, False, text).outcome == "right"  # as any number that no answer has
    assert parse_verdict(f"Therefore answer {'0' * 5000}1 is better") == 1
    record = judgment_record(pair("RLHF-V-1"), False, text)
    assert json.loads(json.dumps(record))["meta"]["flag_status"] == "agree"


_ONE_EXPRESSION = re.compile(
    r"(?:overall judgment|therefore).*answer\s*(\d+)\s*is\s*(?:the\s*)?(?:slightly\s*)?better", re.IGNORECASE
)


def test_heading_and_verdict_are_those_of_the_official_expression():
    generator = random.Random(5)
    pieces = [
        "overall judgment",
        "Therefore",
        "answer",
        "Answer ",
        " ",
        "\n",
        "*",
        "1",
        "2",
        "٣",
        "is",
        "the",
        "slightly",
    ]
    pieces += ["better", " is better", "Answer 2 is better", "ſ", "x", "\r", "over", "answer 1 is the slightly "]
    verdicts = 0
    for _ in range(20_000):
        text = "".join(generator.choices(pieces, k=generator.randrange(2, 14)))
        match = _ONE_EXPRESSION.search(text.replace("\n", "").replace("*", ""))
        assert parse_verdict(text) == (int(match[1]) if match else None), text
        verdicts += match is not None
    assert verdicts > 1000


def pair(name: str, best: int = 0, text: str = "x") -> Pair:
    return Pair(name, "What?", (f"{text} one", f"{text} two"), (best, 1 - best))


def write_judgments(file: Path, judgments: list[tuple[Pair, bool, int]]) -> Path:
    lines = [json.dumps(judgment_record(p, swapped, judgment_text(number))) for p, swapped, number in judgments]
    file.write_text("\n".join(lines) + "\n")
    return file


def test_scores_calculated_by_hand(tmp_path: Path):
    file = write_judgments(
        tmp_path / "judgments.jsonl",
        [
            (pair("RLHF-V-1"), False, 1),
            (pair("RLHF-V-1"), True, 2),
            (pair("RLAIF-V-1", 1), False, 1),
            (pair("hallucination_pair-1"), False, 0),
            (pair("hallucination_pair-2"), False, 1),
            (pair("hallucination_pair-2"), True, 1),
            (pair("mmmu_1"), False, 1),
            (pair("mathverse_1"), False, 1),
            (pair("wildvision-1", 1), False, 2),
            (pair("wildvision-1", 1, "other"), False, 2),
            (pair("jailbreak-1"), True, 1),
        ],
    )
    record = rewardbench_scores.score_rewardbench(file)
    hallucination = record["categories"]["hallucination"]
    assert {k: hallucination[k] for k in ("pairs", "right", "wrong", "tie", "unparsed")} == {
        "pairs": 4,
        "right": 1,
        "wrong": 1,
        "tie": 1,
        "unparsed": 1,
    }
    assert (hallucination["accuracy"], hallucination["strict"]) == (50, 25)
    assert record["categories"]["reasoning"]["accuracy"] == 100
    assert record["categories"]["general"]["accuracy"] == 66.6667
    assert (record["pooled"]["accuracy"], record["pooled"]["right"], record["pooled"]["wrong"]) == (71.4286, 5, 2)
    assert record["macro"] == 72.2222
    assert (record["judgments"], record["samples"], record["repeated_ids"]) == (11, [1, 2], 1)
    assert record["mean"]["hallucination"] == 60  # right 3 of the 5 that name an answer
    assert record["chosen"] == {"answer_1": 7, "answer_2": 3, "neither": 0}
    assert record["both_orders"] == {"pairs": 2, "steady": 1}
    first = rewardbench_scores.score_rewardbench(file, samples=1)
    assert first["categories"]["hallucination"]["tie"] == 0
    assert first["samples"] == [1, 1]


def independent(lines: list[dict], k: int) -> dict:
    """A second implementation, in the official script's steps: count, drop, classify, average.

    It reads the lines alone and calls nothing of blipfit. `votes`: (agree, reject, without a verdict) of every pair.
    """
    counts: dict[str, list] = {}
    for line in lines:
        key = json.dumps([line["id"], line["query"], sorted(line["response"])])
        entry = counts.setdefault(key, [0, 0, 0, line["id"]])
        if sum(entry[:3]) >= k:
            continue
        text = line["meta"]["filter_choice"].replace("\n", "").replace("*", "").lower()
        start = min((at for word in ("overall judgment", "therefore") if (at := text.find(word)) >= 0), default=-1)
        number = None
        for part in text[max(start, 0) :].split("answer")[1:] if start >= 0 else []:
            digits = part.split(" is ")[0].strip()
            rest = part.split(" is ")[1] if " is " in part else ""
            if digits.isdigit() and rest.startswith(("better", "the better", "slightly better", "the slightly better")):
                number = int(digits)
        rejected = line["ranking"].index(1 if line["meta"]["random_number"] == 0 else 0) + 1
        entry[2 if number is None else 1 if number == rejected else 0] += 1
    official, complete = ({"hallucination": [0, 0, 0], "reasoning": [0, 0, 0], "general": [0, 0, 0]} for _ in range(2))
    for agree, reject, unmatched, name in counts.values():
        prefix = name[: min(at for mark in "_-" if (at := name.find(mark)) > 0)]
        halls, reasons = ("RLHF", "RLAIF", "hallucination"), ("mmmu", "mathverse")
        group = "hallucination" if prefix in halls else "reasoning" if prefix in reasons else "general"
        total = agree + reject + unmatched
        official[group][0 if agree > total / 2 else 1 if reject > total / 2 else 2] += 1
        complete[group][2 if unmatched or agree == reject else 0 if agree > reject else 1] += 1
    votes = [tuple(entry[:3]) for entry in counts.values()]
    return {"official": averages(official), "complete": averages(complete), "votes": votes}


def averages(groups: dict[str, list[int]]) -> dict[str, float | None]:
    """Rates of right among the decided pairs from [right, wrong, excluded] of every category."""
    rates = {name: right / (right + wrong) if right + wrong else None for name, (right, wrong, _) in groups.items()}
    right, wrong = (sum(group[n] for group in groups.values()) for n in (0, 1))
    macro = None if None in rates.values() else sum(rates.values()) / 3
    return {**rates, "pooled": right / (right + wrong) if right + wrong else None, "macro": macro}


def accuracies(summary: dict) -> dict[str, float | None]:
    """The accuracies of a summary as fractions, None for categories without a pair or a decided one."""
    values = {name: summary["categories"].get(name, {}).get("accuracy") for name in rewardbench_scores.CATEGORIES}
    values |= {"pooled": summary["pooled"]["accuracy"], "macro": summary["macro"]}
    return {name: None if value is None else value / 100 for name, value in values.items()}


ENDINGS = [
    "Overall Judgment: Answer 1 is better.",
    "Overall Judgment: Answer 2 is better.",
    "**Overall Judgment**:\n**Answer 1** is the better one.",
    "Therefore Answer 2 is slightly better, so Answer 1 is better",
    "Therefore Answer 3 is better.",
    "Therefore…\n",
    "Overall Judgment: both are fine.",
    "",
]
NAMES = ("RLHF-V-1", "RLAIF-V-1", "hallucination_pair-1", "mmmu_1", "mathverse_1", "wildvision-1", "rlhf-1", "x_1")


def random_judgments(generator: random.Random) -> list[dict]:
    """The lines of a judgments file: one to six pairs, up to six judgments each, missing verdicts, in random order."""
    lines = []
    for number in range(generator.randint(1, 6)):
        row = pair(generator.choice(NAMES), generator.randrange(2), f"x{number // 2}")
        endings = generator.choices(ENDINGS, weights=[6, 6, 2, 2, 1, generator.randrange(9), 2, 2], k=6)
        lines += [
            judgment_record(row, generator.random() < 0.5, f"Answer 1 is clear.\n{ending}")
            for ending in endings[: generator.randint(1, 6)]
        ]
    generator.shuffle(lines)
    return lines


def test_a_second_implementation_agrees_on_10000_files():
    generator = random.Random(6)
    outcomes: Counter[str] = Counter()
    complete_votes: Counter[tuple[int, bool]] = Counter()  # (K, whether a verdict is missing) of pairs with K judgments
    for _ in range(10_000):
        lines, k = random_judgments(generator), generator.choice((1, 3, 5))
        judgments = rewardbench_scores.parse_judgments((f"FILE:{n}", line) for n, line in enumerate(lines, start=1))
        record, expected = rewardbench_scores.score_judgments(judgments, k), independent(lines, k)
        for name, summary in (("official", record), ("complete", record["complete"])):
            values = accuracies(summary)
            for key, value in expected[name].items():
                assert values[key] == value or values[key] == pytest.approx(value, abs=1e-6), (name, key, lines)
            assert (
                sum(summary["pooled"][outcome] for outcome in rewardbench_scores.OUTCOMES) == summary["pooled"]["pairs"]
            )
        outcomes.update({outcome: record["pooled"][outcome] for outcome in rewardbench_scores.OUTCOMES})
        outcomes["rules differ"] += record["macro"] != record["complete"]["macro"]
        complete_votes.update((k, votes[2] > 0) for votes in expected["votes"] if sum(votes) == k)
    assert min(outcomes.values()) > 200, outcomes
    assert len(complete_votes) == 6
    assert min(complete_votes.values()) > 500, complete_votes


def test_a_second_implementation_agrees_on_real_rows_with_random_judgments(tmp_path: Path):
    if not ROWS.is_file():
        pytest.skip(f"no real rows at {ROWS}")
    generator = random.Random(4)
    endings = [
        judgment_text(1),
        judgment_text(2),
        judgment_text(2),
        "**Overall Judgment**:\n**Answer 1** is the better one.",
        "Therefore…\n",
    ]
    endings += ["Therefore Answer 2 is slightly better, so Answer 1 is better", "Overall Judgment: both are fine."]
    judgments = []
    for row in read_pairs(ROWS):
        careful = generator.random() < 0.8
        for _ in range(generator.randint(1, 6)):
            text = generator.choice(endings[:4] if careful else endings)
            judgments.append(judgment_record(row, generator.random() < 0.5, f"Answer 1 is clear.\n{text}"))
    generator.shuffle(judgments)
    file = tmp_path / "judgments.jsonl"
    wrapped = [{"0": line} if n % 2 else line for n, line in enumerate(judgments)] + [{"0": None}]
    file.write_text("".join(json.dumps(line) + "\n" for line in wrapped))
    for k in (1, 3, 5, 9):
        record, expected = rewardbench_scores.score_rewardbench(file, samples=k), independent(judgments, k)
        for name, summary in (("official", record), ("complete", record["complete"])):
            assert accuracies(summary) == {key: pytest.approx(v, abs=1e-6) for key, v in expected[name].items()}
        assert record["pooled"]["pairs"] == 400
        assert sum(record["pooled"][name] for name in rewardbench_scores.OUTCOMES) == 400


def test_pairwise_accuracy_by_likelihood():
    pairs = [pair("RLHF-V-1"), pair("mmmu_1", 1), pair("mmmu_2", 1), pair("wildvision-1"), pair("RLHF-V-1", 0, "other")]
    record = pairwise_accuracy(
        [*pairs, pairs[0]], [(-1.0, -2.0), (-3.0, -2.5), (-2.0, -9.0), (-4.0, -4.0), (-2, -1), (-9, -1)]
    )
    assert (record["rows"], record["repeated_rows"], record["repeated_ids"]) == (6, 1, 1)
    assert record["categories"]["hallucination"]["accuracy"] == 50
    assert record["categories"]["reasoning"]["accuracy"] == 50
    assert record["categories"]["general"] == {
        "accuracy": None,
        "interval": [0, 100],
        "strict": 0,
        "pairs": 1,
        "right": 0,
        "wrong": 0,
        "tie": 1,
        "unparsed": 0,
    }
    assert record["macro"] is None
    assert (record["pooled"]["accuracy"], record["pooled"]["strict"]) == (50, 40)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_likelihoods_that_are_not_finite_are_an_error(value: float):
    with pytest.raises(UserError, match=r"mmmu_1: its scores .* are not finite"):
        pairwise_accuracy([pair("RLHF-V-1"), pair("mmmu_1")], [(-1.0, -2.0), (value, -1.0)])


def test_pairs_of_two_equal_responses_are_counted():
    equal = Pair("mmmu_1", "What?", ("x", "x"), (0, 1))
    assert pairwise_accuracy([equal, pair("mmmu_2")], [(-1, -1), (-1, -2)])["equal_responses"] == 1
    judgments = [Judgment(p.id, p.key, p.best, False, judgment_text(1)) for p in (equal, equal, pair("mmmu_2"))]
    assert rewardbench_scores.score_judgments(judgments)["equal_responses"] == 1


def test_a_perfect_judge_scores_100_and_one_that_always_says_1_has_only_ties():
    if not ROWS.is_file():
        pytest.skip(f"no real rows at {ROWS}")
    pairs = read_pairs(ROWS)
    both = [(row, swapped) for row in pairs for swapped in (False, True)]
    perfect = [Judgment(r.id, r.key, r.best, s, judgment_text(1 + (r.best ^ s))) for r, s in both]
    record = rewardbench_scores.score_judgments(perfect)
    assert record["pooled"]["accuracy"] == record["macro"] == 100
    assert record["both_orders"] == {"pairs": 400, "steady": 400}
    first = rewardbench_scores.score_judgments([Judgment(r.id, r.key, r.best, s, judgment_text(1)) for r, s in both])
    assert first["pooled"]["tie"] == 400
    assert first["mean"]["pooled"] == 50
    assert first["both_orders"] == {"pairs": 400, "steady": 0}


def test_the_prompt_has_the_answers_in_the_requested_order():
    example = pair("RLHF-V-1")
    assert "Answer 1: x one\n\nAnswer 2: x two" in judge_prompt(example, swapped=False)
    assert "Answer 1: x two\n\nAnswer 2: x one" in judge_prompt(example, swapped=True)
    assert parse_verdict(judge_prompt(example, swapped=False)) is None


def test_invalid_lines_are_refused_with_their_number(tmp_path: Path):
    file = tmp_path / "judgments.jsonl"
    good = judgment_record(pair("RLHF-V-1"), False, judgment_text(1))
    for change, message in (
        ({"meta": {"filter_choice": "x"}}, "judgments.jsonl:2: meta.random_number must be 0 .* or 1 .* but is None"),
        (
            {"meta": {"filter_choice": None, "random_number": 1}},
            "judgments.jsonl:2: 'meta': 'filter_choice' must be text",
        ),
        ({"meta": None}, "judgments.jsonl:2: 'meta': expected an object"),
        ({"ranking": [1, 2]}, "judgments.jsonl:2: the ranking must be"),
        ({"response": "x"}, "judgments.jsonl:2: 'response' must be a list of two texts"),
    ):
        file.write_text(json.dumps(good) + "\n" + json.dumps(good | change) + "\n")
        with pytest.raises(UserError, match=message):
            rewardbench_scores.score_rewardbench(file)
    file.write_text("\n")
    with pytest.raises(UserError, match="contains no judgments"):
        rewardbench_scores.score_rewardbench(file)
    with pytest.raises(UserError, match="is missing"):
        rewardbench_scores.score_rewardbench(tmp_path / "nowhere.jsonl")
    with pytest.raises(UserError, match="samples is 0"):
        rewardbench_scores.score_judgments([], samples=0)
