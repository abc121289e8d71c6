"""The hub: without a connection the local cache is used, or an error at once says what is missing and the fix."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from blipfit.data import hub, scienceqa
from blipfit.errors import UserError

NAME, REVISION = "someone/some-data", "0" * 40


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


PREPARE = """
import sys
from pathlib import Path
from blipfit.data import scienceqa
from blipfit.errors import UserError
try:
    scienceqa.prepare("hub", Path({to!r}))
except UserError as error:
    sys.exit(str(error))
"""


@pytest.mark.parametrize(
    "environment",
    [
        {"HF_HUB_OFFLINE": "1"},
        # A local port without a server: the connection is refused.
        {"HF_ENDPOINT": "http://127.0.0.1:9"},
    ],
)
def test_a_missing_connection_is_reported_at_once(tmp_path: Path, environment: dict[str, str]):
    start = time.monotonic()
    process = run(PREPARE.format(to=str(tmp_path / "sqa")), HF_HOME=str(tmp_path / "hf"), **environment)
    assert time.monotonic() - start < 15
    assert process.returncode == 1
    assert process.stderr.startswith("offline: `derek-thomas/ScienceQA` is not in the local cache (")
    assert "hf download derek-thomas/ScienceQA --repo-type dataset --local-dir DIR" in process.stderr
    assert process.stderr.count("\n") == 1
    assert not (tmp_path / "sqa").exists()


def write_cache(root: Path, *files: str) -> Path:
    """Create a local cache in the layout of huggingface_hub, with empty files."""
    snapshot = root / f"datasets--{NAME.replace('/', '--')}" / "snapshots" / REVISION
    (snapshot / "data").mkdir(parents=True)
    for file in files:
        (snapshot / "data" / file).touch()
    return snapshot


def download_offline(root: Path) -> subprocess.CompletedProcess:
    code = f"from blipfit.data import hub; print(hub.download({NAME!r}, {REVISION!r}))"
    return run(code, HF_HUB_CACHE=str(root), HF_HUB_OFFLINE="1")


def test_cached_revision_needs_no_connection(tmp_path: Path):
    train_files = ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet")
    snapshot = write_cache(tmp_path, *train_files, "validation-00000-of-00001.parquet", "test-00000-of-00001.parquet")
    assert download_offline(tmp_path).stdout.strip() == str(snapshot)


def test_an_incomplete_download_is_not_used(tmp_path: Path):
    write_cache(tmp_path, "train-00000-of-00002.parquet", "validation-0.parquet", "test-0.parquet")
    process = download_offline(tmp_path)
    assert process.returncode == 1
    assert "UserError: offline: `someone/some-data` is not in the local cache" in process.stderr


def test_rows_of_a_missing_split(tmp_path: Path):
    with pytest.raises(UserError, match=r"lacks parquet files of train \(has 0\)"):
        next(hub.read_rows(tmp_path, "train"))


@pytest.mark.hub
def test_scienceqa_of_the_hub_is_the_published_subset(tmp_path: Path):
    report = scienceqa.prepare("hub", tmp_path / "sqa")
    assert report.counts == scienceqa.PUBLISHED
