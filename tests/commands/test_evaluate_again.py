"""A finished run evaluated again gives what was recorded, and only with its own adapter."""

import pytest

from blipfit.adapters import peft_format
from blipfit.commands import evaluate
from blipfit.errors import UserError


@pytest.fixture
def run(finished_run):
    return finished_run


def test_the_recorded_numbers_come_again(run, iconqa):
    for split in ("val", "test"):
        facts = evaluate.run(run.folder, iconqa, split, "cpu", base=True)
        assert facts["tuned"] == run.result()["metrics"][split]
        assert facts["recorded"] == facts["tuned"]["accuracy"]
        assert facts["adapter_sha256"] == run.result()["adapter_sha256"]
        assert facts["base"]["questions"] == facts["tuned"]["questions"]


def test_another_adapter_is_refused(run, iconqa):
    adapter, state = peft_format.read(run.adapter)
    peft_format.save(run.adapter, adapter, state | {"query_tokens": state["query_tokens"] + 1e-3}, "x")
    with pytest.raises(UserError, match=r"is not the adapter that .*result.json was made with"):
        evaluate.run(run.folder, iconqa, "test", "cpu")


def test_an_unfinished_run_is_refused(run, iconqa):
    run.result_file.unlink()
    with pytest.raises(UserError, match="is not finished; run the same `blipfit train` again"):
        evaluate.run(run.folder, iconqa, "test", "cpu")
