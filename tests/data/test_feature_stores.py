"""Looking after a folder of stores: list, describe, check with repair, delete."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from blipfit.data import feature_stores, features
from blipfit.data.features import Facts, Store
from blipfit.errors import UserError

FACTS = Facts("0" * 64, 16, (48, 16), torch.float16, "cpu, sdpa attention")


@pytest.fixture
def stores(tmp_path: Path, draw, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two stores whose features are the pixels themselves: 6 images in shards of 4 and 2, and 2 images."""
    monkeypatch.setattr(features, "SHARD_IMAGES", 4)
    paths = [draw(tmp_path / "images" / f"{n}.png", n) for n in range(6)]
    for facts, count in ((FACTS, 6), (replace(FACTS, dtype=torch.bfloat16), 2)):
        store = Store.open(tmp_path / "stores", facts, "some/model")
        store.build(features.by_content(paths[:count]), lambda pixels: pixels.view(2, 48, 16), 2)
    return tmp_path / "stores"


def home(stores: Path) -> Path:
    return stores / FACTS.key


def test_stores_are_listed_with_what_they_hold(stores: Path):
    (stores / "something else").mkdir()
    found = {store.key: store for store in feature_stores.list_stores(stores)}
    assert len(found) == 2
    store = found[FACTS.key]
    assert (store.images, store.shards, store.damaged) == (6, 2, [])
    assert (store.model, store.shape, store.dtype) == ("some/model", (48, 16), "float16")
    assert store.bytes == sum(path.stat().st_size for path in home(stores).glob("*.safetensors"))
    other = next(found[key] for key in found if key != FACTS.key)
    assert (other.images, other.shards, other.dtype) == (2, 1, "bfloat16")
    assert feature_stores.list_stores(stores / "nowhere") == []


def test_a_store_is_found_by_the_beginning_of_its_key(stores: Path):
    assert feature_stores.find(stores, FACTS.key[:6]) == home(stores)
    with pytest.raises(UserError, match=rf"'zz' is no key in .*there are: .*{FACTS.key}"):
        feature_stores.find(stores, "zz")
    with pytest.raises(UserError, match="is no key"):
        feature_stores.find(stores, "")


def test_check_reads_everything_and_repairs_on_request(stores: Path):
    told: list[int] = []
    assert feature_stores.check(home(stores), progress=told.append) == feature_stores.Check(6, {})
    assert sum(told) == 6
    # A bit flipped among the features: the header still fits, so only a check or a reading finds it.
    shard = max(home(stores).glob("*.safetensors"), key=lambda path: path.stat().st_size)
    data = bytearray(shard.read_bytes())
    data[-1] ^= 0x80
    shard.write_bytes(data)
    assert feature_stores.describe(home(stores)).damaged == []
    found = feature_stores.check(home(stores))
    assert found.images == 2
    assert found.damaged == {shard: "the features of row 3 are not those written"}
    assert shard.exists()
    feature_stores.check(home(stores), repair=True)
    assert not shard.exists()
    assert feature_stores.check(home(stores)) == feature_stores.Check(2, {})


def test_a_shard_that_is_cut_off_is_described_and_repaired(stores: Path):
    shard = features.shard_files(home(stores))[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    [told] = feature_stores.describe(home(stores)).damaged
    assert told.startswith(f"{shard.name}: ")
    feature_stores.check(home(stores), repair=True)
    assert feature_stores.describe(home(stores)).damaged == []
    assert feature_stores.describe(home(stores)).shards == 1


def test_delete_takes_one_store_and_nothing_else(stores: Path):
    size = feature_stores.describe(home(stores)).bytes
    open_still = Store.open(stores, FACTS)
    names = list(open_still._where)
    assert feature_stores.delete(home(stores)) == size
    assert [path.name for path in stores.iterdir()] == [replace(FACTS, dtype=torch.bfloat16).key]
    assert len(open_still.read(names)) == 6  # what is mapped stays readable


def test_other_folders_are_neither_described_nor_deleted(tmp_path: Path):
    (tmp_path / "letters.txt").write_text("mine")
    for action in (feature_stores.describe, feature_stores.check, feature_stores.delete):
        with pytest.raises(UserError, match=r"is not a feature store \(it has no manifest.json\)"):
            action(tmp_path)
    (tmp_path / "manifest.json").write_text('{"shape": [1, 2], "dtype": "float64"}')
    with pytest.raises(UserError, match="is not the manifest of a feature store"):
        feature_stores.delete(tmp_path)
    assert (tmp_path / "letters.txt").exists()
