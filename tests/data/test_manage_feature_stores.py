"""A folder of feature stores: list, summarize, check with repair, delete."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from blipfit.data import feature_store, manage_feature_stores
from blipfit.data.feature_store import FeatureSpec, FeatureStore
from blipfit.errors import UserError

SPEC = FeatureSpec("0" * 64, 16, (48, 16), torch.float16, "cpu, sdpa attention")


@pytest.fixture
def stores(tmp_path: Path, draw, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two stores whose features are the pixels themselves: 6 images in shards of 4 and 2, and 2 images."""
    monkeypatch.setattr(feature_store, "SHARD_IMAGES", 4)
    paths = [draw(tmp_path / "images" / f"{n}.png", n) for n in range(6)]
    for spec, count in ((SPEC, 6), (replace(SPEC, dtype=torch.bfloat16), 2)):
        store = FeatureStore.open(tmp_path / "stores", spec, "some/model")
        store.build(feature_store.hash_files(paths[:count]), lambda pixels: pixels.view(2, 48, 16), 2)
    return tmp_path / "stores"


def home(stores: Path) -> Path:
    return stores / SPEC.key


def test_stores_are_listed_with_their_content(stores: Path):
    (stores / "something else").mkdir()
    summaries = {store.key: store for store in manage_feature_stores.list_stores(stores)}
    assert len(summaries) == 2
    store = summaries[SPEC.key]
    assert (store.images, store.shards, store.damaged) == (6, 2, [])
    assert (store.model, store.shape, store.dtype) == ("some/model", (48, 16), "float16")
    assert store.bytes == sum(path.stat().st_size for path in home(stores).glob("*.safetensors"))
    other = next(summaries[key] for key in summaries if key != SPEC.key)
    assert (other.images, other.shards, other.dtype) == (2, 1, "bfloat16")
    assert manage_feature_stores.list_stores(stores / "nowhere") == []


def test_a_store_is_found_by_the_beginning_of_its_key(stores: Path):
    assert manage_feature_stores.find(stores, SPEC.key[:6]) == home(stores)
    with pytest.raises(UserError, match=rf"'zz' is not a key in .*keys there: .*{SPEC.key}"):
        manage_feature_stores.find(stores, "zz")
    with pytest.raises(UserError, match="is not a key"):
        manage_feature_stores.find(stores, "")


def test_check_reads_everything_and_repairs_on_request(stores: Path):
    counts: list[int] = []
    assert manage_feature_stores.check(home(stores), progress=counts.append) == manage_feature_stores.CheckResult(6, {})
    assert sum(counts) == 6
    # A flipped bit in the features leaves the header valid, so only reading the row finds it.
    shard = max(home(stores).glob("*.safetensors"), key=lambda path: path.stat().st_size)
    data = bytearray(shard.read_bytes())
    data[-1] ^= 0x80
    shard.write_bytes(data)
    assert manage_feature_stores.summarize(home(stores)).damaged == []
    result = manage_feature_stores.check(home(stores))
    assert result.images == 2
    assert result.damaged == {shard: "the features of row 3 do not match their checksum"}
    assert shard.exists()
    manage_feature_stores.check(home(stores), repair=True)
    assert not shard.exists()
    assert manage_feature_stores.check(home(stores)) == manage_feature_stores.CheckResult(2, {})


def test_a_truncated_shard_is_reported_and_repaired(stores: Path):
    shard = feature_store.list_shards(home(stores))[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    [message] = manage_feature_stores.summarize(home(stores)).damaged
    assert message.startswith(f"{shard.name}: ")
    manage_feature_stores.check(home(stores), repair=True)
    assert manage_feature_stores.summarize(home(stores)).damaged == []
    assert manage_feature_stores.summarize(home(stores)).shards == 1


def test_delete_removes_one_store_only(stores: Path):
    size = manage_feature_stores.summarize(home(stores)).bytes
    open_store = FeatureStore.open(stores, SPEC)
    hashes = list(open_store._rows)
    assert manage_feature_stores.delete(home(stores)) == size
    assert [path.name for path in stores.iterdir()] == [replace(SPEC, dtype=torch.bfloat16).key]
    assert len(open_store.read(hashes)) == 6  # mapped shards stay readable


def test_other_folders_are_neither_summarized_nor_deleted(tmp_path: Path):
    (tmp_path / "letters.txt").write_text("mine")
    for action in (manage_feature_stores.summarize, manage_feature_stores.check, manage_feature_stores.delete):
        with pytest.raises(UserError, match=r"is not a feature store \(it has no manifest.json\)"):
            action(tmp_path)
    (tmp_path / "manifest.json").write_text('{"shape": [1, 2], "dtype": "float64"}')
    with pytest.raises(UserError, match="is not the manifest of a feature store"):
        manage_feature_stores.delete(tmp_path)
    assert (tmp_path / "letters.txt").exists()
