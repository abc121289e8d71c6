"""Sweeps: which experiments are meant, how banks are planned, and that a bank changes no result."""

from pathlib import Path
from typing import Any

import pytest

from blipfit import grid, run_folder, sweep
from blipfit.data import icons
from blipfit.errors import UserError
from blipfit.recipe import Recipe
from blipfit.training.bank_trials import Trial
from blipfit.training.loop import train
from blipfit.training.model_cache import ModelCache

SHORT = ["training.max_epochs=2", "training.dropout=false"]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("icons") / "data"
    icons.prepare(folder, train=48, val=12, test=24)
    return {"icons": folder}


@pytest.fixture(scope="module")
def model_cache(tmp_path_factory: pytest.TempPathFactory) -> ModelCache:
    return ModelCache("cpu", store=tmp_path_factory.mktemp("store"))


def recipes(*ids: int | str) -> list[Recipe]:
    return [grid.recipe("icons", i, "tiny").override(SHORT) for i in ids]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("1-4", ["1", "2", "3", "4"]),
        ("13,15,28", ["13", "15", "28"]),
        ("13, 15-16, baseline", ["13", "15", "16", "baseline"]),
        ("5,5-6,5", ["5", "6"]),
        ("baseline-vicuna", ["baseline-vicuna"]),
    ],
)
def test_experiments(text: str, names: list[str]) -> None:
    assert grid.parse_experiments(text) == names


def test_all_is_the_grid() -> None:
    assert grid.parse_experiments("all") == [str(i) for i in range(1, 65)]


@pytest.mark.parametrize("text", ["", "4-1", "1-65", "x", "1..4", "base", "-3"])
def test_no_experiments(text: str) -> None:
    with pytest.raises(UserError, match="names no experiments"):
        grid.parse_experiments(text)


def test_a_plan_measures_and_divides(drawn, model_cache, tmp_path: Path) -> None:
    planned = sweep.make_plan(recipes(13, 14, 1, 29, 45), drawn, tmp_path, model_cache)
    titles = [[recipe.experiment for recipe in bank.recipes] for bank in planned.banks]
    assert sorted(name for bank in titles for name in bank) == ["1", "13", "14", "29", "45"]
    # A fully trained Q-Former and another language model each ask for a bank of their own.
    assert ["1"] in titles
    assert ["45"] in titles
    for bank in planned.banks:
        group = next(t for name, t in planned.trials.items() if bank.trial in t)
        assert bank.trial.seconds_each == min(t.seconds_each for t in group)
        assert bank.trial.memory > 10_000_000
        assert bank.seconds > 0
    assert not (tmp_path / "icons").exists(), "a plan claims nothing"


def test_a_fixed_bank_is_kept(drawn, model_cache, tmp_path: Path) -> None:
    planned = sweep.make_plan(recipes(13, 14, 15, 16, 17), drawn, tmp_path, model_cache, bank=2)
    assert [len(bank.recipes) for bank in planned.banks] == [1, 2, 2]


def test_growth_stops_where_it_no_longer_pays(drawn, model_cache, monkeypatch: pytest.MonkeyPatch) -> None:
    shares = {1: 1.0, 2: 0.7, 4: 0.6, 8: 0.9}
    asked: list[int] = []

    def measure(backbone: Any, chosen: list[Recipe], encoded_split: Any, image_features: Any) -> Trial:
        asked.append(len(chosen))
        return Trial(len(chosen), shares[len(chosen)] * len(chosen), 1, 0.0)

    monkeypatch.setattr(sweep.bank_trials, "measure", measure)
    members = recipes(*range(13, 29))
    trials = sweep.measure_trials(members, drawn["icons"], model_cache, None)
    assert asked == [1, 2, 4, 8]
    group = sweep._describe_group(members, trials, drawn, model_cache)
    assert [len(bank.recipes) for bank in sweep._divide(group)] == [4, 4, 4, 4]


def test_memory_that_ends_is_no_end(drawn, model_cache, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(backbone: Any, chosen: list[Recipe], encoded_split: Any, image_features: Any) -> Trial | None:
        return Trial(len(chosen), 1.0, 1, 0.0) if len(chosen) < 4 else None

    monkeypatch.setattr(sweep.bank_trials, "measure", measure)
    trials = sweep.measure_trials(recipes(*range(13, 29)), drawn["icons"], model_cache, None)
    assert [t.experiments for t in trials] == [1, 2]
    with pytest.raises(UserError, match="a bank of 4 does not fit"):
        sweep.measure_trials(recipes(13, 14, 15, 16), drawn["icons"], model_cache, 4)


def results(planned: sweep.Plan, drawn: dict[str, Path], folder: Path, model_cache: ModelCache) -> dict[str, dict]:
    runs = sweep.run(planned, drawn, folder, model_cache)
    return {one.folder.name: {**one.result(), "lines": run_folder.read_lines(one.predictions_file)} for one in runs}


@pytest.mark.parametrize("ids", [(13, 15, 18, 20, 23, 26, 28, 31), (2, 7, 11, "baseline")], ids=["lora", "full"])
def test_a_swept_bank_equals_single_runs(ids, drawn, model_cache, tmp_path: Path) -> None:
    chosen = recipes(*ids)
    planned = sweep.make_plan(chosen, drawn, tmp_path / "bank", model_cache, bank=len(ids))
    assert len(planned.banks) == 1
    together = results(planned, drawn, tmp_path / "bank", model_cache)
    for recipe in chosen:
        (alone,) = train([recipe], drawn["icons"], tmp_path / "alone", model_cache=model_cache)
        one, other = alone.result(), together[recipe.experiment]
        for a, b in zip(one["history"], other["history"], strict=True):
            assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
        lines = run_folder.read_lines(alone.predictions_file)
        assert [line["prediction"] for line in lines] == [line["prediction"] for line in other["lines"]]


def test_a_sweep_skips_and_refuses(drawn, model_cache, tmp_path: Path) -> None:
    chosen = recipes(13, 14)
    results(sweep.make_plan(chosen[:1], drawn, tmp_path, model_cache, bank=2), drawn, tmp_path, model_cache)
    planned = sweep.make_plan(chosen, drawn, tmp_path, model_cache, bank=2)
    assert [recipe.experiment for recipe in planned.finished] == ["13"]
    assert [recipe.experiment for recipe in planned.banks[0].recipes] == ["14"]
    other = [chosen[0].override(["training.max_epochs=1"])]
    with pytest.raises(UserError, match="another recipe"):
        sweep.make_plan(other, drawn, tmp_path, model_cache)


def test_one_that_fails_leaves_and_the_others_go_on(drawn, model_cache, tmp_path: Path) -> None:
    chosen = recipes(13, 14, 15)
    chosen[1] = chosen[1].override(["training.learning_rate=1e30"])
    runs = sweep.run(sweep.make_plan(chosen, drawn, tmp_path, model_cache, bank=3), drawn, tmp_path, model_cache)
    assert {one.folder.name: one.state() for one in runs} == {"13": "finished", "14": "new", "15": "finished"}
    assert "non-finite" in (tmp_path / "icons/14/failure.json").read_text()
