"""`blipfit features` says in sentences what it did and found."""

import pytest
import torch

from blipfit.commands import features

CPU = torch.device("cpu")


@pytest.fixture
def family() -> str:
    return "t5"


def test_build_check_and_delete_in_sentences(small, family, iconqa, tmp_path):
    store, model = tmp_path / "stores", str(small[family])

    def render(action, key=None, dataset=None):
        data = iconqa if dataset else None
        return features.render(features.run(action, key, dataset, data, model, store, CPU))

    assert render("check") == ["there is no feature store"]
    (nothing,) = render("check", dataset="iconqa")
    assert nothing.startswith("no features of these images are stored; `blipfit features build`")
    assert render("build", dataset="iconqa") == [f"computed the features of 23 images, for 23 questions, in {store}"]
    (key,) = (record["key"] for record in features.run("list", None, None, None, model, store, None)["stores"])
    assert render("check") == [f"{key}: every byte of 23 images is as it was written"]
    (equal,) = render("check", dataset="iconqa")
    assert equal == "computed the features of 23 images again: equal to the stored ones in every bit"
    (shard,) = (store / key).glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    line, damaged = render("check")
    assert line == f"{key}: every byte of 0 images is as it was written"
    assert damaged.startswith(f"  damaged: {shard}: ")
    (deleted,) = render("delete", key)
    assert deleted.startswith(f"deleted {key}, which took ")


def test_features_that_differ_are_counted():
    record = {"compared": {"images": 9, "different": [f"hash{n}" for n in range(7)], "largest": 0.125}}
    (line,) = features.render(record)
    assert line.startswith(
        "computed the features of 9 images again: 7 differ, by at most 0.125; images by their hash: "
    )
    assert line.endswith("hash4 …")
