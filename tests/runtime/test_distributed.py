"""Processes that share a batch: what they exchange, which device each has, and the commands that start them."""

import json
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import processes
from blipfit.data import icons
from blipfit.errors import UserError
from blipfit.runtime import distributed

TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
OPTIONS = ["--model", "tiny", "--set", "training.max_epochs=1", "--device", "cpu", "--json"]


@pytest.mark.slow
def test_every_way_to_start_two_processes_gives_the_results_of_one(tmp_path: Path) -> None:
    icons.prepare(tmp_path / "data", train=32, val=10, test=10)
    commands = {
        "single": ["-m", "blipfit", "train", "icons", "13", "45"],
        "option": ["-m", "blipfit", "train", "icons", "13", "45", "--processes", "2"],
        "torchrun": [*TORCHRUN, "-m", "blipfit", "train", "icons", "13", "45"],
        "sweep": ["-m", "blipfit", "sweep", "icons", "13,45", "--processes", "2"],
        "sharded": ["-m", "blipfit", "train", "icons", "13", "45", "--processes", "2"],
    }
    results = {}
    for name, command in commands.items():
        folders = ["--data", str(tmp_path / "data"), "--results", str(tmp_path / name)]
        sharding = ["--set", "performance.shard_language_model=true"] if name == "sharded" else []
        process = subprocess.run(
            [sys.executable, *command, *OPTIONS, *folders, *sharding], capture_output=True, text=True, check=False
        )
        assert process.returncode == 0, process.stderr
        results[name] = json.loads(process.stdout)["results"]
        assert sorted(p.name for p in (tmp_path / name / "icons").iterdir()) == ["13", "45"]
        assert process.stderr.count("epoch  1") == 2
        for single, result in zip(results["single"], results[name], strict=True):
            assert single["metrics"] == result["metrics"]
            assert result["history"][0]["loss"] == pytest.approx(single["history"][0]["loss"], rel=1e-5)
    adapters = [[result["adapter_sha256"] for result in results[name]] for name in ("single", "option")]
    assert adapters[0] != adapters[1]  # sums of two parts are rounded elsewhere: there were really two processes


@pytest.mark.slow
def test_a_mistake_is_one_sentence_and_a_finished_run_is_skipped_once(tmp_path: Path) -> None:
    icons.prepare(tmp_path / "data", train=32, val=10, test=10)
    command = [sys.executable, "-m", "blipfit", "train", "icons", "13", *OPTIONS[:-1], "--processes", "2"]
    command += ["--data", str(tmp_path / "data"), "--results", str(tmp_path / "results")]
    mistake = [*command, "--set", "training.batch_size=1"]
    process = subprocess.run(mistake, capture_output=True, text=True, check=False)
    assert process.returncode == 2
    assert process.stderr == "blipfit: 2 processes cannot share batches of 1; launch fewer\n"
    subprocess.run(command, capture_output=True, check=True)
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    assert process.stderr.count("finished already, skipped") == 1
    assert process.stdout.count("run folders:") == 1


def test_sums_gathers_and_variances_are_over_all_processes():
    rows = torch.arange(21.0).view(7, 3).square()

    def exchange():
        own = distributed.own_share(rows)
        with distributed.without_collectives():
            alone = distributed.all_reduce_sum(own.sum()).item(), len(distributed.own_share(rows))
        with distributed.without_collectives(alone=True):
            whole = len(distributed.own_share(rows)), distributed.process_count(), distributed.any_process(False)
        index = distributed.state().process_index
        together = distributed.all_reduce_sum(own.sum()).item(), distributed.variance(own).item()
        return together, distributed.all_gather([index]), distributed.any_process(index == 1), alone, whole

    results = processes.run(3, exchange)
    for index, (together, gathered, is_any, alone, whole) in enumerate(results):
        assert together == pytest.approx((rows.sum().item(), rows.var().item()))
        assert (gathered, is_any) == ([0, 1, 2], True)
        assert alone == (rows[index::3].sum().item(), len(rows[index::3]))
        assert whole == (7, 1, False)


def test_a_single_process_computes_torchs_variance():
    rows = torch.randn(5, 3)
    assert torch.equal(distributed.variance(rows), rows.var())


def test_processes_take_turns():
    def take_turn():
        with distributed.in_turn():
            started = time.monotonic()
            time.sleep(0.1)
            return started, time.monotonic()

    turns = processes.run(3, take_turn)
    assert all(end <= start for (_, end), (start, _) in pairwise(turns))


def test_each_of_several_processes_has_its_own_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="each of several processes has its own GPU"):
        distributed.select_device("cuda:0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(UserError, match="3 processes need 3 GPUs, this machine has 2"):
        distributed._connect(cpu=False)


@pytest.mark.parametrize(
    "name", ["mps", "xpu", "meta", "cuda:99", "cpu:3", "vulkan", "hpu", "", "gpu", "cuda:x", "a\0b", 3.5]
)
def test_a_device_that_is_not_here_is_one_sentence(name) -> None:
    with pytest.raises(UserError, match="--device") as error:
        distributed.select_device(name)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("name", ["cpu", "cpu:0", torch.device("cpu")])
def test_the_cpu_is_always_here(name) -> None:
    assert distributed.select_device(name).type == "cpu"
