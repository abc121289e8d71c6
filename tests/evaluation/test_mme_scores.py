"""MME's official rule: real answers with known scores, a second implementation, and invalid files."""

import random
import re
from fractions import Fraction
from pathlib import Path

import pytest

from blipfit.data.mme import SUBTASKS
from blipfit.data.question import Question
from blipfit.errors import UserError
from blipfit.evaluation import mme_scores

LAVIN = Path(__file__).parents[2].parent / "shared" / "data" / "mme" / "LaVIN"
# What the official tool prints for these files.
OFFICIAL = {
    "existence": 185.0,
    "count": 88.33,
    "position": 63.33,
    "color": 75.0,
    "posters": 79.59,
    "celebrity": 47.35,
    "scene": 136.75,
    "landmark": 93.5,
    "artwork": 87.25,
    "OCR": 107.5,
    "commonsense_reasoning": 87.14,
    "numerical_calculation": 65.0,
    "text_translation": 47.5,
    "code_reasoning": 50.0,
}


@pytest.fixture
def lavin() -> Path:
    if not LAVIN.is_dir():
        pytest.skip(f"no real answers at {LAVIN}")
    return LAVIN


def test_real_answers_score_as_the_official_tool_scores_them(lavin: Path):
    record = mme_scores.score_mme(lavin)
    assert (record["perception"], record["cognition"]) == (963.61, 249.64)
    assert {subtask: facts["score"] for subtask, facts in record["subtasks"].items()} == OFFICIAL
    assert record["questions"] == 2374
    assert record["missing"] == record["ignored"] == record["deviations"] == []
    assert record["benchmark"] is True
    for facts in record["subtasks"].values():
        assert (
            sum(sum(row.values()) for row in facts["confusion"].values()) == facts["questions"] == 2 * facts["images"]
        )
        assert facts["right"] == facts["confusion"]["yes"]["yes"] + facts["confusion"]["no"]["no"]


@pytest.mark.parametrize(
    ("response", "counts_as"),
    [
        ("yes", "yes"),
        ("No", "no"),
        ("YES.", "yes"),
        (" yes", "yes"),
        ("    yes", "other"),
        ("  yes", "other"),
        ("not sure", "no"),
        ("none", "no"),
        ("know", "no"),
        ("unknown", "other"),
        ("noyes", "no"),
        ("nyes", "yes"),
        ("the answer is yes", "other"),
        ("", "other"),
        ("да", "other"),
    ],
)
def test_responses_are_classified_by_the_official_rule(response: str, counts_as: str):
    assert mme_scores.classify_response(response) == counts_as


RESPONSES = [
    "Yes",
    "no",
    "Yes.",
    "NO!",
    "not sure",
    "none",
    "",
    " ",
    "yes no",
    "No yes",
    "\u2028yes",
    "  yes",
    "   yes",
]
RESPONSES += ["y\x0bes", "İyes", "unknown", "The answer is no", "yes\x85", "nO", "nonsense", "noy", "1. yes"]


def independent(content: bytes) -> tuple[Fraction, Fraction] | int | None:
    """A second implementation: acc and acc+, or the number of the invalid line, or None if the pairing is invalid.

    It reads the bytes alone and calls nothing of blipfit.
    """
    lines = re.findall(rb"[^\n]*\n|[^\n]+$", content) or [b""]
    correct, images = [], []
    for number, raw in enumerate(lines, 1):
        match = re.fullmatch(r"([^\t]*)\t([^\t]*)\t(yes|no)\t([^\t]*)", raw.decode().lower(), re.DOTALL)
        if not match:
            return number
        images.append(raw.split(b"\t")[0])
        start = match[4][:4]  # with its newline, as the official tool has it
        kind = "yes" if start.find("yes") >= 0 else ("no" if start.find("no") >= 0 else None)
        correct.append(int(kind == match[3]))
    if len(correct) % 2 or images[0::2] != images[1::2]:
        return None
    pairs = [correct[i] * correct[i + 1] for i in range(0, len(correct), 2)]
    return Fraction(sum(correct), len(correct)), Fraction(sum(pairs), len(pairs))


def random_file(generator: random.Random) -> str:
    """An answer file; one in three has something wrong with it."""
    lines = []
    for number in range(generator.randint(1, 8)):
        truths = generator.choice([("Yes", "No"), ("No", "Yes"), ("yes", "YES")])
        lines += [f"{number:04d}.jpg\tIs it {t}?\t{t}\t{generator.choice(RESPONSES)}" for t in truths]
    match generator.randrange(18):
        case 0:  # the second line of a pair is swapped with the first line of the next pair
            if len(lines) > 2:
                lines[1], lines[2] = lines[2], lines[1]
        case 1:
            lines.pop(generator.randrange(len(lines)))
        case 2:
            row = generator.randrange(len(lines))
            lines[row] = lines[row].replace("\t", " ", 1)
        case 3:
            row = generator.randrange(len(lines))
            lines[row] += "\tagain"
        case 4:
            lines.insert(generator.randrange(len(lines)), "")
        case 5:
            row = generator.randrange(len(lines))
            lines[row] = re.sub(r"\t(yes|no)\t", "\tmaybe\t", lines[row], flags=re.IGNORECASE)
    return "\n".join(lines) + generator.choice(["\n", ""])


def test_a_second_implementation_agrees_on_10000_files():
    generator = random.Random(11)
    kinds = {"scored": 0, "line": 0, "pairing": 0}
    for _ in range(10_000):
        subtask, content = generator.choice(SUBTASKS), random_file(generator)
        expected = independent(content.encode())
        if isinstance(expected, tuple):
            kinds["scored"] += 1
            acc, acc_plus = expected
            record = mme_scores.score_answers({subtask: mme_scores.parse_answers(content, "FILE")})
            facts = record["subtasks"][subtask]
            assert Fraction(facts["right"], facts["questions"]) == acc
            assert Fraction(facts["both_right"], facts["images"]) == acc_plus
            assert facts["score"] == round(float(100 * (acc + acc_plus)), 2)
            assert facts["score"] == record["perception"] + record["cognition"]
        else:
            kinds["pairing" if expected is None else "line"] += 1
            with pytest.raises(UserError, match=r"FILE[: ]" if expected is None else f"FILE:{expected}: "):
                mme_scores.parse_answers(content, "FILE")
    assert min(kinds.values()) > 500, kinds


def test_totals_of_whole_benchmarks_equal_those_of_a_second_implementation():
    """All 14 subtasks at once: the totals are sums of the unrounded scores of ten and of four subtasks."""
    generator = random.Random(12)
    for _ in range(100):
        contents = {subtask: valid_file(generator) for subtask in SUBTASKS}
        record = mme_scores.score_answers({s: mme_scores.parse_answers(content, s) for s, content in contents.items()})
        scores = {s: 100 * sum(independent(content.encode())) for s, content in contents.items()}  # type: ignore[arg-type]
        perception = sum(scores[s] for s in list(OFFICIAL)[:10])
        assert record["perception"] == round(float(perception), 2)
        assert record["cognition"] == round(float(sum(scores.values()) - perception), 2)


def valid_file(generator: random.Random) -> str:
    while True:
        content = random_file(generator)
        if isinstance(independent(content.encode()), tuple):
            return content


def test_a_file_is_read_as_its_text(tmp_path: Path):
    generator = random.Random(13)
    for _ in range(50):
        content = valid_file(generator)
        (tmp_path / "count.txt").write_text(content, encoding="utf-8")
        assert mme_scores.read_answers(tmp_path) == {"count": mme_scores.parse_answers(content, "")}


def lines(*responses: str) -> str:
    return "".join(
        f"{row // 2}.jpg\tA question?\t{('Yes', 'No')[row % 2]}\t{response}\n" for row, response in enumerate(responses)
    )


def test_two_subtasks_calculated_by_hand(tmp_path: Path):
    (tmp_path / "count.txt").write_text(lines("yes", "no", "yes", "maybe"))
    (tmp_path / "text_translation.txt").write_text(lines("no", "yes"))
    (tmp_path / "notes.txt").write_text("mine")
    record = mme_scores.score_mme(tmp_path)
    assert record["perception"] == 75 + 50
    assert record["cognition"] == 0
    assert record["subtasks"]["count"]["acc"] == 75
    assert record["subtasks"]["count"]["acc_plus"] == 50
    assert record["subtasks"]["count"]["confusion"] == {
        "yes": {"yes": 2, "no": 0, "other": 0},
        "no": {"yes": 0, "no": 1, "other": 1},
    }
    assert len(record["missing"]) == 12
    assert record["benchmark"] is False
    assert record["deviations"][:2] == [
        "12 of 14 subtasks have no questions",
        "number of questions: count 4 of 60, text_translation 2 of 40",
    ]
    assert record["ignored"] == ["notes.txt"]


def test_totals_are_sums_of_unrounded_scores(tmp_path: Path):
    for subtask in ("existence", "count"):
        (tmp_path / f"{subtask}.txt").write_text(lines("yes", "no", "yes", "x", "x", "x"))
    record = mme_scores.score_mme(tmp_path)
    assert record["subtasks"]["count"]["score"] == 83.33
    assert record["perception"] == 166.67


def test_invalid_files_are_refused_with_the_line(tmp_path: Path):
    file = tmp_path / "count.txt"
    for text, message in (
        ("a.jpg\tQ?\tYes\tyes\nb.jpg\tQ?\tNo\tno\n", r"count.txt:1: this line names a.jpg and the next b.jpg"),
        (lines("yes", "no", "yes"), r"count.txt: 3 lines, but MME has two per image"),
        (lines("yes", "no") + "2.jpg Q? Yes\n", r"count.txt:3: a line must have 4 columns .* has 1"),
        (lines("yes", "no") + "\n", r"count.txt:3: .* has none"),
        ("", r"count.txt:1: .* has none"),
        ("a.jpg\tQ?\tYes\tyes\na.jpg\tQ?\t No\tno\n", r"count.txt:2: the ground truth must be Yes or No but is ' No'"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            mme_scores.score_mme(tmp_path)
    file.write_bytes(b"a.jpg\tQ?\tYes\tyes\na.jpg\tQ?\tNo\t\xff\n")
    with pytest.raises(UserError, match=r"count.txt:2: not UTF-8 text"):
        mme_scores.score_mme(tmp_path)
    file.unlink()
    with pytest.raises(UserError, match="contains none of MME's answer files"):
        mme_scores.score_mme(tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        mme_scores.score_mme(tmp_path / "nowhere")


def benchmark_lines(lavin: Path, subtask: str) -> list[str]:
    return (lavin / f"{subtask}.txt").read_text().splitlines(keepends=True)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda lines: lines[:-2], r"number of questions: count 58 of 60"),
        (lambda lines: lines + lines[:2], r"number of questions: count 62 of 60"),
        (lambda lines: lines[:-2] + lines[:2], r"count: questions that occur more than once: 2, first 'Is there"),
        (lambda lines: [lines[0], lines[0], *lines[2:]], r"count: questions that occur more than once: 1, first"),
        (
            lambda lines: [*lines[:2], *(line.replace("?", "??") for line in lines[:2]), *lines[4:]],
            r"count: images with more than two questions: 1, first \S+\.jpg",
        ),
        (
            lambda lines: [re.sub(r"\t(Yes|No)\t", "\tYes\t", line) for line in lines[:4]] + lines[4:],
            r"count: images with two equal truths: 2, first \S+\.jpg",
        ),
        (lambda lines: [re.sub(r"\t.*?\t", "\t \t", lines[0], count=1), *lines[1:]], r"count: empty questions: 1"),
        (lambda lines: None, r"1 of 14 subtasks have no questions"),
    ],
)
def test_what_is_not_the_benchmark_is_not_reported_as_mme(lavin: Path, tmp_path: Path, change, sentence: str):
    for subtask in SUBTASKS:
        lines = benchmark_lines(lavin, subtask)
        changed = change(lines) if subtask == "count" else lines
        if changed is not None:
            (tmp_path / f"{subtask}.txt").write_text("".join(changed))
    record = mme_scores.score_mme(tmp_path)
    assert record["benchmark"] is False
    assert any(re.search(sentence, deviation) for deviation in record["deviations"]), record["deviations"]


def questions(*places: tuple[str, str]) -> list[Question]:
    return [
        Question(f"{s}/{f}/{n}", Path(f), "Is it?", ("Yes", "No")[n % 2], tags={"subtask": s, "file": f})
        for n, (s, f) in enumerate(places)
    ]


def test_written_answers_are_read_back_and_count_the_same(tmp_path: Path):
    mme_questions = questions(*[("count", "1.jpg")] * 2, *[("OCR", "1.jpg")] * 2, *[("count", "2.jpg")] * 2)
    responses = ["Yes,\tit is\nindeed", "\r\n\r\nno", "", "no", "\tyes", "n\to"]
    mme_scores.write_answers(tmp_path / "new", mme_questions, responses)
    answers_by_subtask = mme_scores.read_answers(tmp_path / "new")
    assert [a.response for a in answers_by_subtask["count"]] == ["Yes, it is indeed", "    no", " yes", "n o"]
    by_id = dict(zip((q.id for q in mme_questions), responses, strict=True))
    for subtask, answers in answers_by_subtask.items():
        originals = [by_id[q.id] for q in mme_questions if q.tags["subtask"] == subtask]
        assert [mme_scores.classify_response(a.response) for a in answers] == [
            mme_scores.classify_response(text) for text in originals
        ]
    first = (tmp_path / "new" / "count.txt").read_text().split("\n")[0]
    assert first == "1.jpg\tIs it?\tYes\tYes, it is indeed"


def test_answers_out_of_order_or_mixed_with_others_are_not_written(tmp_path: Path):
    with pytest.raises(UserError, match="must name one image"):
        mme_scores.write_answers(tmp_path / "a", questions(("count", "1.jpg"), ("count", "2.jpg")), ["yes", "no"])
    assert not (tmp_path / "a").exists()
    mme_scores.write_answers(tmp_path, questions(*[("OCR", "1.jpg")] * 2), ["yes", "no"])
    with pytest.raises(UserError, match=r"contains answers to other subtasks \(OCR\)"):
        mme_scores.write_answers(tmp_path, questions(*[("count", "1.jpg")] * 2), ["yes", "no"])


def test_real_answers_are_written_back_byte_for_byte(lavin: Path, tmp_path: Path):
    answers = mme_scores.read_answers(lavin)
    mme_questions = [
        Question("", Path(a.image), a.question, a.truth.capitalize(), tags={"subtask": s, "file": a.image})
        for s, subtask_answers in answers.items()
        for a in subtask_answers
    ]
    responses = [a.response for subtask_answers in answers.values() for a in subtask_answers]
    mme_scores.write_answers(tmp_path, mme_questions, responses)
    for subtask in SUBTASKS:
        assert (tmp_path / f"{subtask}.txt").read_bytes() == (lavin / f"{subtask}.txt").read_bytes()
