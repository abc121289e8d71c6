"""The table over several sets shows the numbers of the records, base beside adapter."""

import pytest
from rich.console import Console

from blipfit.commands import evaluate, resolve_arguments
from blipfit.errors import UserError


def _printed(shown) -> str:
    console = Console(width=200)
    with console.capture() as captured:
        for part in shown:
            console.print(part)
    return captured.get()


def _texts(mean):
    interval = {"mean": mean, "interval": [mean - 0.1, mean + 0.1], "samples": 4}
    right = {"accuracy": 25.0, "interval": [10.0, 40.0]}
    clip = {"clip": "tiny-clip", "cut": 0, "mean": 100 * mean, "interval": [1.0, 2.0]}
    return {"method": "generation", "texts": {"rougeL": interval}, **right, "clip_score": clip}


def _record(on, base, tuned, difference, **facts):
    common = {"on": on, "split": "test", "questions": 4, "prompt": "instruction-v1", "prompt_example": "What?"}
    common |= {"model": "tiny-t5", "run": "results/x/1", "clip": "tiny-clip"}
    return {**common, **facts, "base": base, "tuned": tuned, "difference": difference}


def _accuracy(value):
    return {"method": "ranking", "accuracy": value, "interval": [value - 5, value + 5]}


def test_base_and_adapter_in_one_table():
    change = {"difference": 12.5, "interval": [-1.25, 20.0], "samples": 4}
    pooled = {"pooled": {"accuracy": 61.5, "interval": [50.0, 70.0]}}
    bench = {"judge": "rewardbench", "likelihood_sum": pooled, "likelihood_mean": pooled, "cut_responses": 3}
    mme = {
        "judge": "mme",
        "perception": 301.25,
        "cognition": 0.0,
        "missing": ["OCR"],
        "subtasks": {"count": {"score": 101.25}},
    }
    records = [
        _record("icons", _accuracy(50.0), _accuracy(62.5), {"accuracy": change}),
        _record("mme", mme, mme | {"perception": 290.0}, {"perception": {"difference": -11.25, "interval": None}}),
        _record(
            "rewardbench",
            bench | {"answers": _texts(0.4)},
            bench | {"answers": _texts(0.5)},
            {"rougeL": change, "pairwise_mean": change, "clip_score": change},
        ),
    ]
    printed = _printed(evaluate.render_on(records))
    for told in (
        "50.0 [45.0–55.0]",
        "62.5 [57.5–67.5]",
        "+12.5 [-1.2–+20.0]",
        "301.25 of 200",
        "290.00 of 200",
        "-11.25",
        "101.25",
    ):
        assert told in printed, told
    assert "61.5 [50.0–70.0]" in printed
    assert "50.0 [40.0–60.0]" in printed  # ROUGE-L in percent
    assert "3 responses are longer than the model reads" in printed
    assert "cognition" not in printed
    assert "mme: not in the totals, no questions: OCR" in printed
    assert "one in full: 'What?'" in printed
    assert "no CLIP score" not in printed


def test_what_the_numbers_leave_out_is_said_below_them():
    texts = _texts(0.0)
    texts["rouge_unread"] = {"references": {"texts": 4, "unread": 3, "partly_read": 1, "empty": 0}}
    texts["clip_score"]["clamped_mean"] = 12.5
    counts = {"questions": 4, "cut_qformer_prompts": 2, "choices": 8, "cut_choices": 0, "empty_questions": 1}
    facts = {"max_text_tokens": 128, "max_target_tokens": 256, "test": counts | {"equal_choices": 0}}
    totals = {"judge": "mme", "perception": 1.0, "cognition": 0.0, "missing": [], "subtasks": {"count": {"score": 1.0}}}
    mme = totals | {"deviations": ["number of questions: count 2 of 60"]}
    records = [_record("own", texts, texts, {}, texts=facts), _record("mme", mme, mme, {})]
    printed = _printed(evaluate.render_on(records))
    assert "own: ROUGE cannot read 3 of 4 references" in printed
    assert "own: ROUGE cannot read letters other than a–z and 0–9 in 1 of 4 references" in printed
    assert "own: CLIP score is mean_of_clamped" in printed
    assert "clamped_mean, which torchmetrics computes, is 12.5" in printed.replace("\n", " ")
    assert "own: 2 of 4 prompts are longer than 128 tokens of the Q-Former" in printed
    assert "own: 1 of 4 questions are empty" in printed
    assert "mme: not the MME benchmark: number of questions: count 2 of 60" in printed


def test_a_model_alone_has_no_second_column():
    record = _record("icons", _accuracy(50.0), None, None)
    del record["tuned"], record["difference"]
    printed = _printed(evaluate.render_on([record | {"run": None}]))
    assert "with adapter" not in printed
    assert "tiny-t5" in printed


def test_places(tmp_path):
    assert resolve_arguments.data_folders(f"mme={tmp_path}, scienceqa", None)[0] == ("mme", tmp_path)
    with pytest.raises(UserError, match="say on what"):
        resolve_arguments.data_folders(" , ", None)
    with pytest.raises(UserError, match="was trained on rewardbench"):
        evaluate._refuse_training_questions([("rewardbench", tmp_path)], "all", "rewardbench")
