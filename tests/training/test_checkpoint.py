"""Resume state is one file, whole or absent."""

from pathlib import Path

import pytest
import torch

from blipfit.errors import UserError
from blipfit.training import checkpoint
from blipfit.training.checkpoint import Progress

PROGRESS = Progress(
    epoch=2,
    step=5,
    updates=25,
    loss_sum=12.5,
    label_count=7,
    best_score=100 / 3,
    best_epoch=1,
    bad_epochs=1,
    seconds=0.1 + 0.2,
    history=[{"epoch": 1, "loss": 0.1, "val_accuracy": 100 / 3}],
)
TENSORS = {
    "values": {"a.b": torch.randn(2, 3), "c/d": torch.tensor([1.0])},
    "best": {"a.b": torch.randn(2, 3).double()},
}


def test_what_was_saved_comes_back_to_the_bit(tmp_path: Path):
    checkpoint.save(tmp_path / "checkpoint", PROGRESS, TENSORS)
    progress, tensors = checkpoint.load(tmp_path / "checkpoint")
    assert progress == PROGRESS
    assert tensors.keys() == TENSORS.keys()
    for group, named in TENSORS.items():
        assert tensors[group].keys() == named.keys()
        for name, tensor in named.items():
            assert tensors[group][name].dtype == tensor.dtype
            assert torch.equal(tensors[group][name], tensor)
    assert len(list((tmp_path / "checkpoint").iterdir())) == 1


def test_no_state_is_none(tmp_path: Path):
    assert checkpoint.load(tmp_path / "none") is None


def test_a_failed_save_leaves_the_state_of_before(tmp_path: Path):
    checkpoint.save(tmp_path, PROGRESS, TENSORS)
    with pytest.raises(AttributeError):
        checkpoint.save(tmp_path, Progress(epoch=3), {"values": {"a": None}})  # type: ignore[dict-item]
    with pytest.raises(TypeError):
        checkpoint.save(tmp_path, Progress(history=[{"epoch": object()}]), TENSORS)
    assert checkpoint.load(tmp_path)[0] == PROGRESS
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("spoil", ["cut", "header", "foreign"])
def test_a_damaged_state_is_told(tmp_path: Path, spoil: str):
    from safetensors.torch import save_file

    checkpoint.save(tmp_path, PROGRESS, TENSORS)
    (file,) = tmp_path.iterdir()
    if spoil == "cut":
        file.write_bytes(file.read_bytes()[:-5])
    else:
        save_file({"values/a": torch.ones(1)}, file, {"progress": "{"} if spoil == "header" else None)
    with pytest.raises(UserError, match=r"is damaged .*; delete .* to train this experiment from the start"):
        checkpoint.load(tmp_path)
