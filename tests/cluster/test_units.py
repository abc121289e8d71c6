"""Units of a sweep: their files, what they train, their state, and the plan for many GPUs."""

import json
import sys
from pathlib import Path

import pytest

from blipfit import __main__ as entry_point
from blipfit import folder_lock, grid, run_folder
from blipfit.cluster import plan, slurm, status
from blipfit.cluster.extras import load_engine
from blipfit.cluster.ray_engine import RayOptions
from blipfit.cluster.schedule import Failures
from blipfit.cluster.slurm import SlurmOptions
from blipfit.cluster.status import Job
from blipfit.cluster.units import SweepFolder, Unit, train_unit
from blipfit.data import icons
from blipfit.errors import UserError
from blipfit.recipe import Recipe
from blipfit.runtime.save_interval import SaveInterval
from blipfit.sweep import PlannedGroup
from blipfit.training.bank_trials import Trial
from blipfit.training.model_cache import ModelCache

TEMPLATE = Unit(0, (), Path(), Path(), "cpu", SaveInterval(seconds=None, steps=20))


def recipes(*ids: int) -> list[Recipe]:
    return [grid.recipe("icons", i, "tiny").override(["training.max_epochs=1"]) for i in ids]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("icons") / "data"
    icons.prepare(folder, train=16, val=4, test=4)
    return {"icons": folder}


@pytest.fixture(autouse=True)
def fast_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_lock, "HEARTBEAT_SECONDS", 0.1)


def make_units(drawn: dict[str, Path], results: Path, bank: int | None = 2) -> tuple[SweepFolder, list[Unit]]:
    members = recipes(13, 14, 15, 45)
    folder = SweepFolder.of(members, drawn, results)
    template = Unit(0, (), Path(), results, "cpu", TEMPLATE.save_interval)
    return folder, plan.make_units(members, drawn, results, folder, bank, None, template)


def states(folder: SweepFolder, jobs: dict[int, Job] | None = None) -> dict[int, tuple[str, str | None]]:
    collected = status.collect(folder, folder.read_units(), jobs or {})
    return {each.number: (each.state, each.reason) for each in collected}


def test_units_are_files_that_are_found_again(drawn, tmp_path: Path) -> None:
    folder, units = make_units(drawn, tmp_path)
    assert [[recipe.experiment for recipe in unit.recipes] for unit in units] == [["13"], ["14", "15"], ["45"]]
    assert folder.read_units() == units
    assert make_units(drawn, tmp_path, bank=1)[1] == units, "what was submitted is not cut again"
    other = SweepFolder.of(recipes(13), drawn, tmp_path)
    assert other.folder != folder.folder
    folder.unit_file(0).write_text("{}")
    with pytest.raises(UserError, match="is not a unit"):
        folder.read_units()


def test_units_without_a_measurement_need_a_bank_size(drawn, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--bank K, or run this command with --plan --gpus"):
        make_units(drawn, tmp_path, bank=None)


def test_a_unit_trains_and_its_state_is_known(drawn, tmp_path: Path) -> None:
    folder, units = make_units(drawn, tmp_path)
    assert {state for state, _ in states(folder).values()} == {"waiting"}
    runs = train_unit(folder.unit_file(1), ModelCache("cpu", store=tmp_path / "store"))
    assert [run.state() for run in runs] == ["finished", "finished"]
    run_folder.write_json(units[0].runs[0].create().failure_file, {"reason": "non-finite loss"})
    assert states(folder) == {0: ("failed", "non-finite loss"), 1: ("finished", None), 2: ("waiting", None)}
    units[0].runs[0].failure_file.unlink()
    folder.add_jobs([{"engine": "slurm", "id": "7_0", "unit": 0}])
    assert states(folder)[0] == ("lost", None), "it was submitted, and no engine knows of it"
    assert states(folder, {0: Job("7_0", "waiting", reason="Priority")})[0] == ("waiting", "Priority")
    assert states(folder, {0: Job("7_0", "failed", reason="Slurm: job 7_0 timeout")})[0][0] == "failed"


def test_a_unit_runs_as_long_as_its_owner_lives(drawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, units = make_units(drawn, tmp_path)
    with units[0].runs[0].lock():
        (first, *_) = status.collect(folder, units, {})
        assert (first.state, first.host) == ("running", folder_lock.platform.node())
        assert first.since is not None
        monkeypatch.setattr(folder_lock._Claim, "renew", lambda claim: None)
        folder.add_jobs([{"engine": "ray", "id": "local", "unit": 0}])
        assert states(folder)[0] == ("lost", None), "an owner without a sign of life"


def test_a_unit_that_cannot_be_trained_says_why(drawn, tmp_path: Path) -> None:
    folder, units = make_units(drawn, tmp_path)
    other = units[0].recipes[0].override(["training.max_epochs=3"])
    units[0].runs[0].claim(other, run_folder.Inputs("other"))
    (units[0].runs[0].checkpoint).mkdir()
    (units[0].runs[0].checkpoint / "state-000001.safetensors").touch()
    with pytest.raises(UserError):
        train_unit(folder.unit_file(0), ModelCache("cpu", store=tmp_path / "store"))
    state, reason = states(folder)[0]
    assert state == "failed"
    assert "another recipe" in str(reason)


def test_a_plan_for_many_gpus(drawn, tmp_path: Path) -> None:
    group = PlannedGroup(
        tuple(recipes(*range(13, 29))), (Trial(1, 1.0, 1, 0.1), Trial(4, 2.0, 1, 0.2), Trial(8, 6.0, 1, 0.4)), 10, 4, 4
    )
    measured = plan.MeasuredPlan((group,), "CPU, 2 threads", 5.0)
    folder = SweepFolder.of(group.recipes, drawn, tmp_path)
    run_folder.write_json(folder.plan_file, measured.to_json())
    assert plan.MeasuredPlan.read(folder.plan_file, group.recipes) == measured
    assert [len(part) for part, _ in measured.cut(1)] == [4, 4, 4, 4]
    assert [len(part) for part, _ in measured.cut(16)] == [1] * 16
    # 10 steps of 1 second, 2 validations of 4 questions and a test of 4.
    assert group.bank_seconds(group.recipes[:1]) == pytest.approx(10 * 1.0 + 12 * 0.1)
    assert group.bank_seconds(group.recipes[:2]) == pytest.approx(10 * 4 / 3 + 12 * 0.4 / 3)
    assert group.bank_seconds(group.recipes) == pytest.approx(10 * 12.0 + 12 * 0.8)
    few, many = plan.estimate(measured, [1, 16], Failures(), 2.0)
    assert few["seconds"] > many["seconds"]
    assert few["busy"] == many["busy"] == 1.0
    assert many["price"] == pytest.approx(2.0 * many["gpu_hours"], abs=0.01)
    template = Unit(0, (), Path(), tmp_path, "cpu")
    units = plan.make_units(group.recipes, drawn, tmp_path, folder, None, 16, template)
    assert [len(unit.recipes) for unit in units] == [1] * 16
    assert units[0].seconds == pytest.approx(5 + 11.2)


@pytest.mark.parametrize(
    ("text", "minutes"), [("90", 90), ("01:30:00", 90), ("1-00:00:00", 1440), ("2:30", 3), ("0:30", 1)]
)
def test_time_limits_are_read_as_sbatch_reads_them(text: str, minutes: int) -> None:
    assert SlurmOptions(time=text).minutes == minutes


@pytest.mark.parametrize("text", ["", "soon", "0", "1:2:3:4"])
def test_other_time_limits_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="--time"):
        _ = SlurmOptions(time=text).minutes


def test_memory_is_read() -> None:
    assert RayOptions(memory="48G").memory_bytes == 48 * 2**30
    for text in ("48", "much", "G", ""):
        with pytest.raises(UserError, match="--memory"):
            _ = RayOptions(memory=text).memory_bytes


def test_containers_get_the_folders(drawn, tmp_path: Path) -> None:
    folder, units = make_units(drawn, tmp_path)
    parameters = slurm._parameters(folder, units, SlurmOptions(container="blipfit:1", gres="gpu:1", parallelism=2))
    assert parameters["srun_args"][0] == "--container-image=blipfit:1"
    assert f"{tmp_path}:{tmp_path}" in parameters["srun_args"][1]
    assert (parameters["gres"], parameters["array_parallelism"]) == ("gpu:1", 2)
    assert slurm._python("a.sif", folder, units).startswith("apptainer exec --nv --bind")


@pytest.mark.parametrize(
    ("state", "expected"),
    [("RUNNING", "running"), ("PENDING", "waiting"), ("COMPLETED", "ended"), ("TIMEOUT", "failed")],
)
def test_states_of_slurm(state: str, expected: str) -> None:
    assert slurm._read_job("7_1", state, "None", "node1").state == expected


def test_an_extra_that_is_missing_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"ray is not installed; it is an extra: pip install 'blipfit\[cluster\]'"):
        load_engine("ray")


def test_status_and_cancel_are_commands(
    drawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_units(drawn, tmp_path)
    command = ["blipfit", "sweep", "icons", "13,14,15,45", "--model", "tiny", "--set", "training.max_epochs=1"]
    command += ["--data", str(drawn["icons"]), "--results", str(tmp_path)]

    def run(*options: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [*command, *options])
        with pytest.raises(SystemExit) as ended:
            entry_point.main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    code, out, _ = run("--status", "--json")
    units = json.loads(out)["units"]
    assert (code, [(unit["unit"], unit["state"]) for unit in units]) == (0, [(n, "waiting") for n in range(3)])
    assert "3 waiting" in run("--status")[1]
    code, _, err = run("--cancel")
    assert code == 2
    assert "nothing of this sweep was given to an engine" in err
    for options, sentence in [
        (["--engine", "condor"], "expected local, slurm, ray"),
        (["--engine", "ray", "--processes", "2"], "exclude each other"),
        (["--gpus", "1,8"], "add --plan"),
        (["--plan", "--gpus", "many"], "expected positive numbers"),
    ]:
        code, _, err = run(*options)
        assert code == 2
        assert sentence in err
