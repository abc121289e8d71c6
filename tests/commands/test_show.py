"""`blipfit show`: memory with quantization, and models of the other family."""

import pytest

from blipfit import grid
from blipfit.commands import show
from blipfit.errors import UserError
from blipfit.training.loop import train


def test_memory_counts_quantization():
    weights = {}
    for quantization in ("none", "8bit", "4bit"):
        recipe = grid.recipe("scienceqa", 49).override([f"model.quantization={quantization}"])
        weights[quantization] = show.run(recipe)["estimated_bytes"]["weights"] / 2**30
    assert weights["none"] == pytest.approx(15.1, abs=0.1)
    linear = 32 * (4 * 4096**2 + 3 * 4096 * 11008) / 2**30  # Vicuna's layers without embedding and head
    assert weights["none"] - weights["8bit"] == pytest.approx(linear)
    assert weights["none"] - weights["4bit"] == pytest.approx(linear * (1.5 - 4 / 64))


@pytest.mark.parametrize(
    ("experiment", "model"),
    [
        (15, "tiny-vicuna"),
        (33, "tiny-t5"),
        ("baseline-vicuna", "Salesforce/instructblip-flan-t5-xl"),
        ("baseline", "tiny-vicuna"),
    ],
)
def test_a_model_of_the_other_family_is_refused(experiment, model):
    recipe = grid.recipe("scienceqa", experiment, model)
    with pytest.raises(
        UserError, match=rf"experiment {experiment} .* is for .*{model} has a language model of another"
    ):
        show.run(recipe)


@pytest.mark.parametrize(
    "change", [[], ["adapter.method=ia3", "adapter.rank=8"], ["adapter.method=adalora", "adapter.rank=4"]]
)
def test_the_share_is_that_of_a_run(small, iconqa, tmp_path, change):
    """Trained parameters in % of the model with its adapter, before a training and after it."""
    own = ["training.batch_size=2", "training.max_epochs=1", "data.images=off", "training.learning_rate=0.03"]
    recipe = grid.recipe("iconqa", 31, str(small["t5"])).override([*own, *change])
    (run,) = train([recipe], iconqa, tmp_path / "results", device="cpu")
    record = show.run(recipe)
    for key in ("trained_parameters", "total_parameters", "trained_share"):
        assert record[key] == run.result()[key], key
    assert record["total_parameters"] > sum(record["total"].values())
    line = next(part for part in show.render(record) if "parameters are trained, " in str(part))
    assert line.endswith(f"% of the {record['total_parameters']:,} of the model with its adapter")


@pytest.mark.parametrize(("experiment", "model"), [(15, "tiny"), (49, "tiny"), ("baseline", "tiny-t5")])
def test_a_model_of_the_same_family_is_shown(experiment, model):
    assert show.run(grid.recipe("scienceqa", experiment, model))["trained_parameters"] > 0
