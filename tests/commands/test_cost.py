"""`blipfit cost`: what it counts for a model, a recipe and a run."""

import pytest
import torch

from blipfit import grid
from blipfit.commands import cost
from blipfit.data.feature_store import format_bytes
from blipfit.errors import UserError
from blipfit.model.cost import Lengths
from blipfit.recipe import ModelConfig
from blipfit.report import terminal
from blipfit.training.loop import train

LENGTHS = Lengths()


def test_an_experiment_of_the_grid():
    record = cost.run("scienceqa", "15", None, LENGTHS)
    assert record["trained_parameters"] == record["stored_parameters"] == 2_339_584
    assert record["total_parameters"] == 4_022_969_088
    assert record["parameters"]["qformer ffn"] == {"total": 113_338_368, "trained": 737_280, "stored": 737_280}
    assert record["measured"] is None


def test_a_model_trains_nothing_and_stores_all(small, family):
    record = cost.run(str(small[family]), None, None, LENGTHS)
    assert record["trained_parameters"] == 0
    assert record["stored_parameters"] == record["total_parameters"]


def test_a_run_counts_what_lies_in_its_folder(small, iconqa, tmp_path):
    recipe = grid.recipe("iconqa", 13, str(small["t5"])).override(
        ["training.max_epochs=1", "training.batch_size=4", "data.images=off"]
    )
    (run,) = train([recipe], iconqa, tmp_path, device="cpu")
    record = cost.run(str(run.folder), None, None, LENGTHS, torch.device("cpu"))
    assert record["model"] == str(small["t5"])
    assert record["stored_parameters"] == record["trained_parameters"] == run.result()["trained_parameters"]
    files = [file.stat().st_size for file in run.adapter.iterdir()]
    assert record["adapter_bytes"] == sum(files) > 4 * record["stored_parameters"]
    assert record["measured"]["answer_s"]["median"] > 0
    screen = terminal.console()
    with screen.capture() as printed:
        for part in cost.render(record):
            screen.print(part, soft_wrap=isinstance(part, str))
    assert "adapter on disk" in printed.get()
    assert "one answer on cpu" in printed.get()


def test_a_data_set_alone_is_not_enough():
    with pytest.raises(UserError, match="say which experiment: `blipfit cost icons 15`"):
        cost.run("icons", None, None, LENGTHS)


def test_an_unknown_model_is_told():
    with pytest.raises(UserError, match="unknown model 'tiny-t6'"):
        cost.run("tiny-t6", None, None, LENGTHS)
    assert ModelConfig(name="tiny-t6")


@pytest.mark.parametrize(
    ("count", "told"), [(12, "12 bytes"), (2048, "2.0 KiB"), (3 * 2**20, "3.0 MiB"), (2**31, "2.0 GiB")]
)
def test_sizes(count, told):
    assert format_bytes(count) == told


@pytest.mark.parametrize(("count", "told"), [(521e9, "521"), (1.04e12, "1,040"), (20.04e9, "20"), (77.3e6, "0.0773")])
def test_gigaflops(count, told):
    assert cost.format_gigaflops(count) == told
