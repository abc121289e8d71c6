"""Kills and signals: the same command again gives what an uninterrupted one gives, to the bit."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from blipfit.data import icons
from blipfit.errors import Interrupted, UserError
from blipfit.runtime import interruption
from blipfit.runtime.save_interval import SaveInterval, SaveTimer

TESTS = Path(__file__).parent


def _run(script: str, folder: Path, *arguments: str) -> dict[str, Any]:
    """Run a script of this folder; returns what it prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "BLIPFIT_CACHE": str(folder / "cache")}
    command = [sys.executable, str(TESTS / script), str(folder), *arguments]
    process = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert process.returncode == 0, process.stderr
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return result


def _draw(folder: Path) -> None:
    icons.prepare(folder / "data", train=8, val=4, test=4)


def test_a_killed_bank_continues_to_the_bit(tmp_path: Path):
    """SIGKILL at file-system events spread over the run of four experiments, one of which stops early."""
    _draw(tmp_path)
    report = _run("killed_runs.py", tmp_path, "kill", "170")
    assert report["differences"] == {}
    assert report["kills"] >= 3


@pytest.mark.slow
def test_a_bank_killed_at_any_event_continues_to_the_bit(tmp_path: Path):
    _draw(tmp_path)
    report = _run("killed_runs.py", tmp_path, "states", str(os.cpu_count() or 1))
    assert report["differences"] == {}
    assert report["states"] > 200


@pytest.mark.slow
def test_commands_killed_at_random_times_end_as_without(tmp_path: Path):
    report = _run("signaled_runs.py", tmp_path, "100")
    assert {name: case["differences"] for name, case in report.items() if case["differences"]} == {}
    assert sum(case["kills"] for case in report.values()) >= 100


def test_a_signal_saves_and_says_how_to_continue(tmp_path: Path):
    cases = _run("signaled_runs.py", tmp_path)
    for name, code in {"SIGTERM": 143, "SIGINT": 130, "SIGUSR1": 143}.items():
        case = cases[name]
        assert case["code"] == code
        assert case["last"] == (
            f"blipfit: stopped by {name}, everything is saved; the same command again continues where it was"
        )
        assert (case["hidden"], case["is_finished"], case["saves"] > 0) == ([], False, True)
    assert cases["two"]["code"] in (130, 143)
    assert cases["two"]["last"].startswith("blipfit: stopped at once; the same command again continues")
    for name in ("SIGTERM", "two"):
        assert (cases[name]["again"], cases[name]["differences"]) == (0, [])
    prepare = cases["prepare"]
    assert (prepare["code"], prepare["exists"], prepare["hidden"]) == (143, False, [])
    assert prepare["last"].startswith(
        "blipfit: stopped by SIGTERM; no file is half-written, and the same command again"
    )


def test_the_library_leaves_signals_alone():
    """Neither an import nor a thread of a program changes its handlers."""
    program = (
        "import signal, blipfit.cli, blipfit.runtime.interruption\n"
        "assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL\n"
        "assert signal.getsignal(signal.SIGINT) == signal.default_int_handler\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    errors: list[BaseException] = []

    def install() -> None:
        try:
            interruption.install()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=install)
    thread.start()
    thread.join()
    assert errors == []


@pytest.mark.parametrize(("number", "code"), [(2, 130), (15, 143), (10, 143)])
def test_exit_codes(number: int, code: int):
    assert Interrupted(number).exit_code == code


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90s", SaveInterval(90.0, None)),
        ("5m", SaveInterval(300.0, None)),
        ("1.5h", SaveInterval(5400.0, None)),
        ("200", SaveInterval(None, 200)),
        ("0s", SaveInterval(0.0, None)),
    ],
)
def test_save_intervals(text: str, expected: SaveInterval):
    assert SaveInterval.parse(text) == expected


@pytest.mark.parametrize("text", ["", "0", "-5", "5 minutes", "5d", "m", "1e3", "9" * 30])
def test_what_is_no_save_interval(text: str):
    with pytest.raises(UserError, match=r"--save-every .*expected a time"):
        SaveInterval.parse(text)


def test_a_timer_counts_steps():
    timer = SaveTimer(SaveInterval(None, 2))
    timer.count_step()
    assert not timer.is_due
    timer.count_step()
    assert timer.is_due
    timer.reset()
    assert not timer.is_due
    assert SaveTimer(SaveInterval(0.0)).is_due
    assert not SaveTimer(SaveInterval()).is_due
