"""Files that are complete or absent, and what killed processes left of others."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from blipfit import data, file_writes, run_folder
from blipfit.errors import UserError
from blipfit.file_writes import LEFTOVER_SECONDS, remove_leftovers, replacing
from leftovers import leave_temporary_folder

OTHER_HOST = "0123abcd"


def _hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob(".*"))


def test_the_next_write_removes_what_a_kill_left(tmp_path: Path):
    """A real kill in the middle of a write."""
    code = (
        "import os, signal, sys; from pathlib import Path; from blipfit.file_writes import replacing\n"
        "with replacing(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    target = tmp_path / "a.json"
    assert subprocess.run([sys.executable, "-c", code, str(target)]).returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert (left / "a.json").read_text() == "half"
    run_folder.write_text(target, "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_only_leftovers_of_the_same_target_go(tmp_path: Path):
    target = tmp_path / "o"
    mine = leave_temporary_folder(target)
    other_target = leave_temporary_folder(tmp_path / "p")
    living = leave_temporary_folder(target, pid=os.getppid())
    of_users = tmp_path / ".o.settings"
    of_users.mkdir()
    remove_leftovers(tmp_path, "o")
    assert not mine.exists()
    assert all(path.exists() for path in (other_target, living, of_users))
    remove_leftovers(tmp_path / "missing", "o")


def test_leftovers_of_other_machines_go_by_their_age(tmp_path: Path):
    target = tmp_path / "o"
    fresh = leave_temporary_folder(target, os.getpid(), OTHER_HOST)
    old = leave_temporary_folder(target, os.getpid() + 1, OTHER_HOST)
    written_lately = leave_temporary_folder(target, os.getpid() + 2, OTHER_HOST)
    for folder in (old, written_lately):
        os.utime(folder, (0, 0))
    os.utime(old / "o", (0, 0))
    remove_leftovers(tmp_path, "o", LEFTOVER_SECONDS)
    assert not old.exists()
    assert fresh.exists()
    assert written_lately.exists()
    remove_leftovers(tmp_path, "o", seconds=0)
    assert _hidden(tmp_path) == []


def test_a_link_to_a_folder_is_no_leftover(tmp_path: Path):
    (tmp_path / "full").mkdir()
    link = leave_temporary_folder(tmp_path / "o")
    (link / "o").unlink()
    link.rmdir()
    link.symlink_to(tmp_path / "full")
    remove_leftovers(tmp_path)
    assert link.is_symlink()


def test_two_writers_of_one_file_do_not_remove_each_others_folder(tmp_path: Path):
    target, texts = tmp_path / "a.txt", [str(number) * 1000 for number in range(8)]
    threads = [threading.Thread(target=run_folder.write_text, args=(target, text)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert target.read_text() in texts
    assert _hidden(tmp_path) == []


def test_content_is_flushed_before_its_name_and_the_name_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def logged_fsync(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def logged_replace(source: Path, target: Path) -> None:
        events.append(f"rename to {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "replace", logged_replace)
    with replacing(tmp_path / "adapter") as temporary:
        temporary.mkdir()
        (temporary / "weights").write_text("whole")
    assert sorted(events[:2]) == ["adapter", "weights"]
    assert events[2:] == ["rename to adapter", tmp_path.name]


def test_a_killed_prepare_leaves_nothing_after_the_next(tmp_path: Path):
    target = tmp_path / "icons"
    left = [leave_temporary_folder(target), leave_temporary_folder(tmp_path / "mme.drawn")]
    data.prepare("icons", target, train=1, val=1, test=1)
    data.prepare_drawn("mme", tmp_path / "mme", 1)
    assert not any(folder.exists() for folder in left)
    assert _hidden(tmp_path) == []


def test_a_folder_that_cannot_be_replaced_is_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target = tmp_path / "adapter"
    with replacing(target) as temporary:
        temporary.mkdir()
        (temporary / "old").touch()
    replace = os.replace

    def fail_at_target(source: Path, to: Path) -> None:
        if Path(to) == target and Path(source).name == target.name:
            raise OSError(28, "No space left on device")
        replace(source, to)

    monkeypatch.setattr(os, "replace", fail_at_target)
    with (
        pytest.raises(UserError, match=r"adapter cannot be written, because the disk has no room"),
        replacing(target) as temporary,
    ):
        temporary.mkdir()
    assert [path.name for path in target.iterdir()] == ["old"]
    assert _hidden(tmp_path) == []
    assert file_writes._is_alive(os.getpid())


@pytest.mark.parametrize("name", ["a.safetensors", "folder"])
def test_weights_can_be_read_by_whoever_can_read_other_new_files(tmp_path: Path, name: str):
    (tmp_path / "other").touch()
    with replacing(tmp_path / name) as temporary:
        if name == "folder":
            temporary.mkdir()
        file = temporary if name != "folder" else temporary / "b.safetensors"
        save_file({"x": torch.zeros(2)}, file)
    written = tmp_path / name if name != "folder" else tmp_path / name / "b.safetensors"
    assert written.stat().st_mode == (tmp_path / "other").stat().st_mode
