"""Building and reading a feature store: interrupted builds, several builders at once, damaged shards."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from blipfit.data import feature_store, images
from blipfit.data.feature_shard import DamagedShard
from blipfit.data.feature_store import FeatureSpec, FeatureStore
from blipfit.errors import UserError
from blipfit.model.backbone import Backbone
from image_tower import count_images, has_same_bits


@pytest.mark.usefixtures("six_shards")
def test_a_killed_build_is_resumed(tower, spec: FeatureSpec, image_paths: list[Path], tmp_path: Path, exact_features):
    files, counts = feature_store.hash_files(image_paths), []

    def interrupt(count: int) -> None:
        counts.append(count)
        if len(counts) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        FeatureStore.open(tmp_path, spec).build(files, tower.see, 4, interrupt)
    store = FeatureStore.open(tmp_path, spec)
    assert 9 <= len(store) <= 12  # three complete shards, perhaps with the short one among them
    assert not [path for path in store.home.iterdir() if path.name.startswith(".")]
    see, sizes = count_images(tower)
    resumed_counts: list[int] = []
    store.build(files, see, 4, resumed_counts.append)
    assert sizes == [4] * 3
    assert sum(resumed_counts) == 21 - sum(counts[:3])
    assert has_same_bits(store.read(list(files)), exact_features.half())
    # An uninterrupted build gives the same files.
    whole = FeatureStore.open(tmp_path / "whole", spec)
    whole.build(files, tower.see, 4)
    shards = feature_store.list_shards(store.home)
    assert [path.name for path in shards] == [path.name for path in feature_store.list_shards(whole.home)]
    assert [path.read_bytes() for path in shards] == [p.read_bytes() for p in feature_store.list_shards(whole.home)]


@pytest.mark.usefixtures("six_shards")
def test_temporary_folders_of_a_killed_build_are_removed_later(tower, spec, image_paths, tmp_path: Path):
    store = FeatureStore.open(tmp_path, spec)
    old, fresh = store.home / ".old.safetensors.k1ll3d_1", store.home / ".fresh.safetensors.k1ll3d_2"
    for folder in (old, fresh):
        folder.mkdir()
        (folder / "a.safetensors").write_bytes(b"half")
    for path in (old / "a.safetensors", old):
        os.utime(path, (1e9, 1e9))
    store.build(feature_store.hash_files(image_paths[:3]), tower.see)
    assert not old.exists()
    assert fresh.exists()  # another process may be writing it
    assert len(FeatureStore.open(tmp_path, spec)) == 3


@pytest.mark.usefixtures("six_shards")
def test_shards_of_another_build_are_used(
    tower, spec: FeatureSpec, image_paths: list[Path], tmp_path, monkeypatch, exact_features
):
    monkeypatch.setattr(feature_store, "thread_count", lambda: 2)
    files, counts = feature_store.hash_files(image_paths), []
    other = FeatureStore.open(tmp_path, spec)
    see, sizes = count_images(tower)

    def build_in_other_store(count: int) -> None:
        if not counts:
            other.build(files, tower.see, 4)
        counts.append(count)

    store = FeatureStore.open(tmp_path, spec)
    store.build(files, see, 4, build_in_other_store)
    # Three of the six blocks had started already: two in threads, and the current one.
    assert len(sizes) <= 3
    assert sum(counts) == 21
    assert has_same_bits(store.read(list(files)), exact_features.half())


BUILDER = """
import sys
from pathlib import Path
import torch
from blipfit.data import feature_store
from blipfit.data.feature_store import FeatureSpec, FeatureStore
feature_store.SHARD_IMAGES = 4
files = feature_store.hash_files(Path(name) for name in sys.argv[2:])
store = FeatureStore.open(Path(sys.argv[1]), FeatureSpec("0" * 64, 16, (48, 16), torch.float16, "cpu"))
print("ready", flush=True)
sys.stdin.readline()
store.build(files, lambda pixels: pixels.view(4, 48, 16), 4)
assert not store.missing(files)
"""


@pytest.mark.usefixtures("six_shards")
def test_two_processes_build_at_once(image_paths: list[Path], tmp_path: Path):
    """The pixels themselves are the features, so that the other process needs no model."""
    spec = FeatureSpec("0" * 64, 16, (48, 16), torch.float16, "cpu")
    files = feature_store.hash_files(image_paths)
    command = [sys.executable, "-W", "error", "-c", BUILDER, str(tmp_path), *map(str, image_paths)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as other:
        assert other.stdout.readline() == "ready\n"
        other.stdin.write("go\n")
        other.stdin.flush()
        FeatureStore.open(tmp_path, spec).build(files, lambda pixels: pixels.view(4, 48, 16), 4)
        _, errors = other.communicate(timeout=60)
    assert (other.returncode, errors) == (0, "")
    store = FeatureStore.open(tmp_path, spec)
    expected = images.to_pixels([images.open_image(path) for path in files.values()], 16).view(21, 48, 16)
    assert has_same_bits(store.read(list(files)), expected.half())
    assert not [path for path in store.home.iterdir() if path.name.startswith(".")]


@pytest.mark.usefixtures("six_shards")
def test_reading_ahead_keeps_the_order(
    tower, spec: FeatureSpec, image_paths: list[Path], tmp_path: Path, exact_features
):
    store, files = FeatureStore.open(tmp_path, spec), feature_store.hash_files(image_paths)
    store.build(files, tower.see, 4)
    generator, hashes = np.random.default_rng(1), list(files)
    batches = [[hashes[n] for n in generator.integers(0, 21, size)] for size in (16, 3, 1, 16, 7, 30)]
    expected = dict(zip(hashes, exact_features.half(), strict=True))
    thread_names = {thread.name for thread in threading.enumerate()}
    for batch, rows in zip(batches, store.prefetch(batches), strict=True):
        assert has_same_bits(rows, torch.stack([expected[image] for image in batch]))
        thread_names |= {thread.name for thread in threading.enumerate()}
    assert any(name.startswith("prefetch") for name in thread_names)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="/proc is needed to list memory maps")
def test_shards_are_mapped_not_loaded(spec: FeatureSpec, tmp_path: Path, tower: Backbone, image_paths: list[Path]):
    FeatureStore.open(tmp_path, spec).build(feature_store.hash_files(image_paths), tower.see)
    store = FeatureStore.open(tmp_path, spec)
    [shard] = feature_store.list_shards(store.home)
    assert str(shard) in Path("/proc/self/maps").read_text()


def test_a_flipped_bit_is_found_at_the_first_reading(tower, spec, image_paths: list[Path], tmp_path: Path):
    files = feature_store.hash_files(image_paths[:4])
    FeatureStore.open(tmp_path, spec).build(files, tower.see)
    [shard] = feature_store.list_shards(tmp_path / spec.key)
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    store = FeatureStore.open(tmp_path, spec)
    store.read(list(files)[:3])
    with pytest.raises(DamagedShard, match=rf"{shard.name} is damaged .* delete it, and its images are computed again"):
        store.read(list(files))


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-100],
        lambda data: data[:5],
        lambda data: b"",
        lambda data: b"something else altogether",
        lambda data: data.replace(b'"rows":"', b'"rows":"0', 1).replace(b":", b"", 1),
        lambda data: data.replace(b'"rows"', b'"rose"', 1),
        lambda data: data.replace(data[data.index(b'"rows":"') + 8 :][:64], b"0" * 64, 1),
        lambda data: data.replace(b"F16", b"I16", 1),
    ],
    ids=["cut off", "cut in the header", "empty", "foreign", "list cut", "no list", "other image", "type"],
)
def test_a_damaged_shard_is_named_with_the_fix(damage, tower, spec, image_paths, tmp_path: Path, exact_features):
    files = feature_store.hash_files(image_paths[:4])
    FeatureStore.open(tmp_path, spec).build(files, tower.see)
    [shard] = feature_store.list_shards(tmp_path / spec.key)
    shard.write_bytes(damage(shard.read_bytes()))
    with pytest.raises(UserError, match=rf"{shard.name} is damaged .* delete it"):
        FeatureStore.open(tmp_path, spec)
    shard.unlink()
    store = FeatureStore.open(tmp_path, spec)
    store.build(files, tower.see)
    assert has_same_bits(store.read(list(files)), exact_features[:4].half())
