"""The tables of the judges show the numbers of their records and what those leave out."""

from pathlib import Path

from rich.console import Console

from blipfit.data.rewardbench import Pair
from blipfit.evaluation import mme_scores, rewardbench_scores
from blipfit.evaluation.rewardbench_scores import Judgment
from blipfit.report import score_tables


def printed(lines: list) -> str:
    console = Console(width=160, highlight=False)
    with console.capture() as capture:
        for line in lines:
            console.print(line)
    return capture.get()


def test_mme_table(tmp_path: Path):
    (tmp_path / "count.txt").write_text("a\tQ?\tYes\tyes\na\tQ?\tNo\tno\nb\tQ?\tYes\tso\nb\tQ?\tNo\tyes\n")
    (tmp_path / "mine.txt").write_text("")
    shown = printed(score_tables.mme(mme_scores.score_mme(tmp_path)))
    row = next(line for line in shown.splitlines() if "count " in line)
    assert [cell.strip() for cell in row.strip("│").split("│")] == [
        "count",
        "100.00",
        "50.00",
        "50.00",
        "2",
        "1 / 0 / 1",
        "1 / 1 / 0",
    ]
    assert "perception (of 200, 1 of 10 subtasks)" in shown
    assert "cognition (of" not in shown
    assert "no answers: existence, position" in shown
    assert "NOT the MME benchmark, scored by the official rule, 4 questions" in shown
    assert "differs from the MME benchmark: number of questions: count 4 of 60" in shown
    assert "not read, because no subtask has that name: mine.txt" in shown


def test_rewardbench_table_of_judgements():
    keys = [("RLHF-V-1", "q", "a", "b"), ("RLHF-V-1", "q", "c", "d"), ("mmmu_1", "q", "a", "b")]
    texts = ["Overall Judgment: Answer 1 is better.", "Overall Judgment: Answer 2 is better.", "?"]
    found = [Judgment(key[0], key, 0, False, text) for key, text in zip(keys, texts, strict=True)]
    shown = printed(score_tables.rewardbench(rewardbench_scores.score_judgments(found)))
    cells = {line.split("│")[1].strip(): line.split("│")[2:-1] for line in shown.splitlines() if line.startswith("│")}
    assert [cell.strip() for cell in cells["hallucination"]][1:] == ["50.0", "50.0", "2", "1", "1", "0", "0"]
    assert [cell.strip() for cell in cells["reasoning"]] == ["–", "0.0", "–", "1", "0", "0", "0", "1"]
    assert cells["pooled"][1].strip() == "33.3"
    assert cells["macro"][0].strip() == "–"
    assert "no macro average" in shown
    assert "complete: accuracy of the pairs whose judgments all have a verdict" in shown
    assert "equal responses" not in shown
    assert "3 judgments, 1 per pair; their mean 50.0" in shown
    assert "1 pairs share their id" in shown


def test_the_official_accuracy_stands_beside_the_stricter_one():
    key = ("RLHF-V-1", "q", "a", "a")
    texts = ["Overall Judgment: Answer 1 is better."] * 2 + ["?"]
    judgments = [Judgment(key[0], key, 0, False, text) for text in texts]
    shown = printed(score_tables.rewardbench(rewardbench_scores.score_judgments(judgments)))
    row = next(line for line in shown.splitlines() if "hallucination" in line)
    accuracy, *others = [cell.strip() for cell in row.split("│")[2:-1]]
    assert accuracy.startswith("100.0 [")
    assert others == ["100.0", "–", "1", "1", "0", "0", "0"]
    assert "1 pairs have two equal responses" in shown


def test_rewardbench_table_of_likelihoods():
    pairs = [Pair(name, "q", ("a", "b"), (0, 1)) for name in ("RLHF-V-1", "mmmu_1", "other", "other")]
    shown = printed(
        score_tables.rewardbench(rewardbench_scores.pairwise_accuracy(pairs, [(1, 0), (1, 0), (0, 1), (0, 1)]))
    )
    assert "66.7" in next(line for line in shown.splitlines() if "macro" in line)
    assert "4 rows, 1 of them repeat another and count once" in shown
