"""MME's official rule: real answers with known scores, a second implementation, and everything that must be refused."""

import random
import re
from fractions import Fraction
from pathlib import Path

import pytest

from blipfit.data.mme import SUBTASKS
from blipfit.data.question import Question
from blipfit.errors import UserError
from blipfit.evaluation import mme

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
    record = mme.score_mme(lavin)
    assert (record["perception"], record["cognition"]) == (963.61, 249.64)
    assert {subtask: facts["score"] for subtask, facts in record["subtasks"].items()} == OFFICIAL
    assert record["questions"] == 2374
    assert record["missing"] == record["ignored"] == []
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
def test_rule_letter_by_letter(response: str, counts_as: str):
    assert mme.kind(response) == counts_as


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


def independent(file: Path) -> tuple[Fraction, Fraction] | int | None:
    """A second implementation: acc and acc+, or the number of the odd line, or None where the pairing is odd."""
    lines = re.findall(rb"[^\n]*\n|[^\n]+$", file.read_bytes()) or [b""]
    wins, named = [], []
    for number, raw in enumerate(lines, 1):
        found = re.fullmatch(r"([^\t]*)\t([^\t]*)\t(yes|no)\t([^\t]*)", raw.decode().lower(), re.DOTALL)
        if not found:
            return number
        named.append(raw.split(b"\t")[0])
        start = found[4][:4]  # with its newline, as the official tool has it
        said = "yes" if start.find("yes") >= 0 else ("no" if start.find("no") >= 0 else None)
        wins.append(int(said == found[3]))
    if len(wins) % 2 or named[0::2] != named[1::2]:
        return None
    pairs = [wins[i] * wins[i + 1] for i in range(0, len(wins), 2)]
    return Fraction(sum(wins), len(wins)), Fraction(sum(pairs), len(pairs))


def random_file(draw: random.Random) -> str:
    """An answer file; one in three has something wrong with it."""
    lines = []
    for number in range(draw.randint(1, 8)):
        truths = draw.choice([("Yes", "No"), ("No", "Yes"), ("yes", "YES")])
        lines += [f"{number:04d}.jpg\tIs it {t}?\t{t}\t{draw.choice(RESPONSES)}" for t in truths]
    match draw.randrange(18):
        case 0:  # pairs swapped: the second line of one with the first of the next
            if len(lines) > 2:
                lines[1], lines[2] = lines[2], lines[1]
        case 1:
            lines.pop(draw.randrange(len(lines)))
        case 2:
            at = draw.randrange(len(lines))
            lines[at] = lines[at].replace("\t", " ", 1)
        case 3:
            at = draw.randrange(len(lines))
            lines[at] += "\tagain"
        case 4:
            lines.insert(draw.randrange(len(lines)), "")
        case 5:
            at = draw.randrange(len(lines))
            lines[at] = re.sub(r"\t(yes|no)\t", "\tmaybe\t", lines[at], flags=re.IGNORECASE)
    return "\n".join(lines) + draw.choice(["\n", ""])


def test_a_second_implementation_agrees_on_1000_files(tmp_path: Path):
    draw = random.Random(11)
    kinds = {"scored": 0, "line": 0, "pairing": 0}
    for _ in range(1000):
        subtask = draw.choice(SUBTASKS)
        folder = tmp_path / "answers"
        folder.mkdir(exist_ok=True)
        file = folder / f"{subtask}.txt"
        file.write_text(random_file(draw), encoding="utf-8")
        expected = independent(file)
        if isinstance(expected, tuple):
            kinds["scored"] += 1
            acc, acc_plus = expected
            facts = mme.score_mme(folder)["subtasks"][subtask]
            assert Fraction(facts["right"], facts["questions"]) == acc
            assert Fraction(facts["both_right"], facts["images"]) == acc_plus
            assert facts["score"] == round(float(100 * (acc + acc_plus)), 2)
        else:
            kinds["pairing" if expected is None else "line"] += 1
            told = re.escape(str(file)) + (r"[: ]" if expected is None else f":{expected}: ")
            with pytest.raises(UserError, match=told):
                mme.score_mme(folder)
        file.unlink()
    assert min(kinds.values()) > 50, kinds


def lines(*responses: str) -> str:
    return "".join(
        f"{at // 2}.jpg\tA question?\t{('Yes', 'No')[at % 2]}\t{said}\n" for at, said in enumerate(responses)
    )


def test_two_subtasks_by_hand(tmp_path: Path):
    (tmp_path / "count.txt").write_text(lines("yes", "no", "yes", "maybe"))
    (tmp_path / "text_translation.txt").write_text(lines("no", "yes"))
    (tmp_path / "notes.txt").write_text("mine")
    record = mme.score_mme(tmp_path)
    assert record["perception"] == 75 + 50
    assert record["cognition"] == 0
    assert record["subtasks"]["count"]["acc"] == 75
    assert record["subtasks"]["count"]["acc_plus"] == 50
    assert record["subtasks"]["count"]["confusion"] == {
        "yes": {"yes": 2, "no": 0, "other": 0},
        "no": {"yes": 0, "no": 1, "other": 1},
    }
    assert len(record["missing"]) == 12
    assert record["ignored"] == ["notes.txt"]


def test_totals_are_rounded_once_and_not_subtask_by_subtask(tmp_path: Path):
    for subtask in ("existence", "count"):
        (tmp_path / f"{subtask}.txt").write_text(lines("yes", "no", "yes", "x", "x", "x"))
    record = mme.score_mme(tmp_path)
    assert record["subtasks"]["count"]["score"] == 83.33
    assert record["perception"] == 166.67


def test_what_is_odd_is_refused_with_its_line(tmp_path: Path):
    file = tmp_path / "count.txt"
    for text, told in (
        ("a.jpg\tQ?\tYes\tyes\nb.jpg\tQ?\tNo\tno\n", r"count.txt:1: this line names a.jpg and the next b.jpg"),
        (lines("yes", "no", "yes"), r"count.txt: 3 lines, but MME has two an image"),
        (lines("yes", "no") + "2.jpg Q? Yes\n", r"count.txt:3: a line must have 4 columns .* has 1"),
        (lines("yes", "no") + "\n", r"count.txt:3: .* has none"),
        ("", r"count.txt:1: .* has none"),
        ("a.jpg\tQ?\tYes\tyes\na.jpg\tQ?\t No\tno\n", r"count.txt:2: the truth must be Yes or No but is ' No'"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=told):
            mme.score_mme(tmp_path)
    file.write_bytes(b"a.jpg\tQ?\tYes\tyes\na.jpg\tQ?\tNo\t\xff\n")
    with pytest.raises(UserError, match=r"count.txt:2: not UTF-8 text"):
        mme.score_mme(tmp_path)
    file.unlink()
    with pytest.raises(UserError, match="holds none of MME's answer files"):
        mme.score_mme(tmp_path)
    with pytest.raises(UserError, match="is no folder"):
        mme.score_mme(tmp_path / "nowhere")


def questions(*places: tuple[str, str]) -> list[Question]:
    return [
        Question(f"{s}/{f}/{n}", Path(f), "Is it?", ("Yes", "No")[n % 2], tags={"subtask": s, "file": f})
        for n, (s, f) in enumerate(places)
    ]


def test_written_answers_are_read_back_and_count_the_same(tmp_path: Path):
    asked = questions(*[("count", "1.jpg")] * 2, *[("OCR", "1.jpg")] * 2, *[("count", "2.jpg")] * 2)
    said = ["Yes,\tit is\nindeed", "\r\n\r\nno", "", "no", "\tyes", "n\to"]
    mme.write_answers(tmp_path / "new", asked, said)
    found = mme.read_answers(tmp_path / "new")
    assert [a.response for a in found["count"]] == ["Yes, it is indeed", "    no", " yes", "n o"]
    by_id = dict(zip((q.id for q in asked), said, strict=True))
    for subtask, answers in found.items():
        originals = [by_id[q.id] for q in asked if q.tags["subtask"] == subtask]
        assert [mme.kind(a.response) for a in answers] == [mme.kind(text) for text in originals]
    first = (tmp_path / "new" / "count.txt").read_text().split("\n")[0]
    assert first == "1.jpg\tIs it?\tYes\tYes, it is indeed"


def test_answers_out_of_order_or_mixed_with_others_are_not_written(tmp_path: Path):
    with pytest.raises(UserError, match="must name one image"):
        mme.write_answers(tmp_path / "a", questions(("count", "1.jpg"), ("count", "2.jpg")), ["yes", "no"])
    assert not (tmp_path / "a").exists()
    mme.write_answers(tmp_path, questions(*[("OCR", "1.jpg")] * 2), ["yes", "no"])
    with pytest.raises(UserError, match=r"holds answers to other subtasks \(OCR\)"):
        mme.write_answers(tmp_path, questions(*[("count", "1.jpg")] * 2), ["yes", "no"])


def test_real_answers_are_written_back_to_the_byte(lavin: Path, tmp_path: Path):
    answers = mme.read_answers(lavin)
    asked = [
        Question("", Path(a.image), a.question, a.truth.capitalize(), tags={"subtask": s, "file": a.image})
        for s, listed in answers.items()
        for a in listed
    ]
    mme.write_answers(tmp_path, asked, [a.response for listed in answers.values() for a in listed])
    for subtask in SUBTASKS:
        assert (tmp_path / f"{subtask}.txt").read_bytes() == (lavin / f"{subtask}.txt").read_bytes()
