"""Effects from run folders that the training's own record writes, with accuracies that follow a known law."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest

import checkpoints
from blipfit import grid
from blipfit.adapters.bank import Bank
from blipfit.commands import ablation
from blipfit.data import encoded_split
from blipfit.errors import UserError
from blipfit.evaluation.evaluate_split import SplitEvaluation
from blipfit.evaluation.metrics import accuracy
from blipfit.recipe import AdapterConfig, Recipe
from blipfit.report import terminal
from blipfit.run_folder import Inputs, Run
from blipfit.training import write_result
from blipfit.training.checkpoint import Progress
from blipfit.training.model_cache import SPLITS

QUESTIONS = 1000
POINTS = {"self_attn": 4.0, "cross_attn": -2.0, "ffn": 1.5}
LANGUAGE = {"attn": 3.0, "ffn": 0.5}


def law(recipe: Recipe) -> float:
    """Accuracy in percent: a sum over sublayers, 0.7 a doubling of the rank, 6 for a full Q-Former, −2.5 for Vicuna."""
    adapter = recipe.adapter
    adapted = bool(adapter.llm) or adapter.qformer not in ("full", ())
    points = 50 + sum(LANGUAGE[part] for part in adapter.llm) + (0.7 * math.log2(adapter.rank) if adapted else 0)
    points += 6 if adapter.qformer == "full" else sum(POINTS[part] for part in adapter.qformer)
    return points - 2.5 * recipe.model.name.endswith("vicuna")


@pytest.fixture(scope="module")
def finish(small, iconqa) -> Callable[[Path, Recipe, float], Run]:
    """Write a finished run of a recipe with that test accuracy, as the training loop does."""
    backbones = {family: checkpoints.load(small[family]) for family in checkpoints.FAMILIES}
    data = grid.recipe("iconqa", 1).data
    splits = {
        family: {split: encoded_split.load(backbone.text, data, iconqa, split) for split in SPLITS}
        for family, backbone in backbones.items()
    }

    def write(results: Path, recipe: Recipe, percent: float) -> Run:
        family = Path(recipe.model.name).name
        run = Run.of(results, recipe)
        run.claim(recipe, Inputs("questions"))
        bank = Bank(backbones[family], [recipe.adapter], [0])
        state, counts = bank.state(0), bank.trained_parameters(0)
        bank.remove()
        finished = write_result.Finished(run, recipe, Inputs("questions"), Progress(best_epoch=0), state, counts)
        right = round(percent * QUESTIONS / 100)
        judged = SplitEvaluation([], {"method": "ranking", **accuracy([n < right for n in range(QUESTIONS)]), "by": {}})
        write_result.write(finished, backbones[family], splits[family], {"val": judged, "test": judged}, "")
        return run

    return write


@pytest.fixture(scope="module")
def grown(tmp_path_factory, finish, small) -> Path:
    """The whole grid and the baselines, without noise."""
    results = tmp_path_factory.mktemp("results")
    for name in (*grid.IDS, *grid.BASELINES):
        family = grid.BASELINES[name] if isinstance(name, str) else grid.decode_id(name)[0]
        recipe = grid.recipe("iconqa", name, str(small[family]))
        finish(results, recipe, law(recipe))
    return results / "iconqa"


def _effects(record) -> dict[tuple[str, str, str], dict]:
    return {(e["kind"], e["what"], e["against"]): e for e in record["effects"]}


def test_the_grid_gives_the_law_back(grown):
    (found,) = ablation.run([grown])
    assert (found["dataset"], found["experiments"]) == ("iconqa", 66)
    effects = _effects(found)
    for (kind, what, _), effect in effects.items():
        tower, _, parts = what.partition(" ")
        points = POINTS if tower == "qformer" else LANGUAGE
        wanted = None
        if kind == "added" and effect["pairs"]:
            without_rank = [float(a in grid.BASELINES) * 0.7 * math.log2(_rank(b)) for a, b, _ in effect["runs"]]
            wanted = sum(points[part] for part in parts.split("+")) + sum(without_rank) / len(without_rank)
        elif kind == "instead":
            others = [points[part] for part in points if part != parts]
            wanted = points[parts] - sum(others) / len(others)
        elif kind == "rank":
            wanted = 0.7
        elif kind == "family":
            wanted = -2.5
        if wanted is not None:
            assert effect["mean"] == pytest.approx(wanted, abs=1e-3), what
            low, high = effect["interval"]
            assert low <= effect["mean"] <= high
        assert effect["pairs"] == len(effect["runs"]) == len({tuple(sorted(p[:2])) for p in effect["runs"]}) or (
            kind == "instead"
        )
    # A fully trained Q-Former has no rank; beside a frozen language model the law's points of the rank fall out.
    full = effects["full", "qformer full", "LoRA in self_attn+cross_attn+ffn"]
    assert full["mean"] == pytest.approx(2.5 - 0.7 * 1.5 / 2, abs=1e-3)


def _rank(experiment: str) -> int:
    return grid.decode_id(int(experiment))[2]


def test_the_pairs_are_all_there_are(grown):
    """Counted by hand from the rows of the grid: per family four ranks a row, and the baseline beside four."""
    effects = _effects(ablation.run([grown])[0])
    counts = {key: effect["pairs"] for key, effect in effects.items()}
    assert counts["added", "llm attn", ""] == 2 * (4 + 4)  # rows ffn → all, and the baseline → attn
    assert counts["added", "llm ffn", ""] == 2 * (4 + 4)
    assert counts["added", "llm attn+ffn", ""] == 2 * (4 + 4)  # Q-Former LoRA all, and the baseline → all
    for part in POINTS:
        assert counts["added", f"qformer {part}", ""] == 0  # no two experiments differ in just it
        assert counts["instead", f"qformer {part}", "another alone"] == 2 * 4 * 2
    assert counts["added", "qformer cross_attn+ffn", ""] == 2 * 4
    assert counts["instead", "llm attn", "another alone"] == 2 * 4
    assert counts["rank", "rank doubled", ""] == 2 * 8 * 3
    assert counts["rank", "rank 4", "rank 2"] == 2 * 8
    assert counts["family", "vicuna", "t5"] == 32 + 1
    assert counts["full", "qformer full", "LoRA in self_attn+cross_attn+ffn"] == 2 * (4 + 4)
    assert counts["full", "qformer full", "LoRA in ffn"] == 2 * 4
    assert not [key for key in counts if key[0] == "method"]
    learned = {e: effects[e]["same_settings"] for e in effects}
    # Vicuna's batches are cut in two, which changes no step; of the published rates and epochs these 12 differ.
    differs = [n for n in range(1, 33) if _tuned(n) != _tuned(n + 32)]
    assert learned["family", "vicuna", "t5"] == 33 - len(differs) > 20
    assert differs


def _tuned(number: int) -> tuple[float, int]:
    training = grid.recipe("iconqa", number).training
    return training.learning_rate, training.max_epochs


def test_a_single_sublayer_of_the_qformer_where_experiments_differ_in_it(tmp_path, finish, small):
    noise = random.Random(3)
    for number, parts in enumerate((("self_attn",), ("self_attn", "ffn"), ("cross_attn", "self_attn"), ())):
        for rank in (2, 4):
            for experiment in (18, 26):
                like = grid.recipe("iconqa", experiment, str(small["t5"]))
                adapter = AdapterConfig(qformer=parts, llm=("attn",), rank=rank)
                name = f"{experiment}-{number}-{rank}"
                changes = {"experiment": name, "adapter": adapter}
                changes["training"] = like.training.model_copy(update={"seed": experiment})
                recipe = like.model_copy(update=changes)
                finish(tmp_path, recipe, law(recipe) + noise.uniform(-1, 1))
    effects = _effects(ablation.run([tmp_path / "iconqa"])[0])
    for part, pairs in (("self_attn", 4), ("cross_attn", 4), ("ffn", 4)):
        effect = effects["added", f"qformer {part}", ""]
        assert effect["pairs"] == pairs  # of the same seed and rank
        low, high = effect["interval"]
        assert low < effect["mean"] < high
        assert low - 2 < POINTS[part] < high + 2
        assert all(one.split("-")[::2] == other.split("-")[::2] for one, other, _ in effect["runs"])


def test_methods_are_compared(tmp_path, finish, small):
    like = grid.recipe("iconqa", 32, str(small["t5"]))
    for method, percent in (("lora", 60), ("dora", 61), ("ia3", 57)):
        finish(tmp_path, like.override([f"experiment={method}", f"adapter.method={method}"]), percent)
    effects = _effects(ablation.run([tmp_path / "iconqa"])[0])
    methods = {key[1:]: (e["mean"], e["interval"], e["pairs"]) for key, e in effects.items() if key[0] == "method"}
    assert methods == {("dora", "lora"): (1, None, 1), ("ia3", "lora"): (-3, None, 1), ("ia3", "dora"): (-4, None, 1)}


def test_more_than_one_difference_is_no_pair(tmp_path, finish, small):
    like = grid.recipe("iconqa", 32, str(small["t5"]))
    other = grid.recipe("iconqa", 27, str(small["t5"])).override(["training.seed=1"])
    for recipe in (like, other, like.override(["experiment=x", "adapter.rank=4", "adapter.llm=attn"])):
        finish(tmp_path, recipe, 50)
    assert sum(e["pairs"] for e in ablation.run([tmp_path / "iconqa"])[0]["effects"]) == 0


def test_data_sets_stand_side_by_side(grown, tmp_path, finish, small, capsys):
    few = [grid.recipe("iconqa", n, str(small["t5"])) for n in (2, 10)]
    for recipe in few:
        finish(tmp_path, recipe, law(recipe))
    records = ablation.run([grown, tmp_path / "iconqa"])
    assert json.loads(json.dumps(records)) == records
    drawn, *sentences = ablation.render(records)
    assert [column.header for column in drawn.columns] == ["effect of", "against", "iconqa", "pairs", "iconqa", "pairs"]
    terminal.console().print(drawn)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    (attn,) = (row for row in rows if row[:2] == ["llm attn", "without"])
    assert attn[2].startswith("+3.52 [+3.")  # half the pairs are with the baseline, which has no rank
    assert attn[3] == "16"
    assert attn[4:] == ["+3.00", "1"]
    (rank,) = (row for row in rows if row[:1] == ["rank doubled"])
    assert rank[2:] == ["+0.70 [+0.70 – +0.70]", "48", "–", "0"]
    assert any("66 experiments" in sentence for sentence in sentences)
    assert any("no two experiments differ in just qformer self_attn" in sentence for sentence in sentences)


@pytest.mark.parametrize("make", [lambda folder: None, lambda folder: (folder / "iconqa" / "13").mkdir(parents=True)])
def test_a_folder_without_results_is_told(tmp_path, make):
    make(tmp_path)
    for folder in (tmp_path, tmp_path / "iconqa"):
        with pytest.raises(UserError, match=r"holds no finished run; give .*RESULTS/DATASET"):
            ablation.run([folder])


def test_what_training_itself_writes_is_read(iconqa, tmp_path, small):
    """Two short trainings end to end, one with LoRA in the language model beside."""
    from blipfit.training import loop
    from blipfit.training.model_cache import ModelCache

    own = ["training.batch_size=4", "training.max_epochs=1", "training.learning_rate=5e-4"]
    two = [grid.recipe("iconqa", n, str(small["t5"])).override(own) for n in (28, 32)]
    runs = loop.train(two, iconqa, tmp_path, model_cache=ModelCache("cpu", store=tmp_path / "features"))
    effect = _effects(ablation.run([tmp_path / "iconqa"])[0])["added", "llm attn+ffn", ""]
    first, second = (run.result()["metrics"]["test"]["accuracy"] for run in runs)
    assert effect["runs"] == [["28", "32", pytest.approx(second - first, abs=1e-4)]]
    assert (effect["pairs"], effect["same_settings"], effect["interval"]) == (1, 1, None)
