"""The store of image features with the miniature's real tower: same bits, kept through kills, found by content."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from blipfit.data import features, images
from blipfit.data.feature_shard import DamagedShard
from blipfit.data.features import BLOCK, Facts, Store
from blipfit.errors import UserError
from blipfit.model import image_features, loading
from blipfit.model.backbone import Backbone
from blipfit.recipe import ModelConfig


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """So small a tower gains nothing from more, and loses much where the cores are busy with decoding."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tower() -> Backbone:
    return loading.load(ModelConfig(name="tiny-t5"))


@pytest.fixture(scope="module")
def facts(tower: Backbone) -> Facts:
    return image_features.facts(tower)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return pictures(tmp_path_factory.mktemp("pictures"), 21)


@pytest.fixture(scope="module")
def exact(tower: Backbone, paths: list[Path]) -> torch.Tensor:
    """What the tower gives for each picture alone, unrounded."""
    return computed(tower, paths)


@pytest.fixture
def six_shards(monkeypatch: pytest.MonkeyPatch, facts: Facts) -> None:
    """Shards of one block of 4 images, so that 21 images make six."""
    monkeypatch.setattr(features, "SHARD_IMAGES", 4)


def pictures(folder: Path, count: int) -> list[Path]:
    draws = np.random.default_rng(3)
    for n in range(count):
        Image.fromarray(draws.integers(0, 256, (20 + n, 50, 3), dtype=np.uint8)).save(folder / f"{n}.png")
    return [folder / f"{n}.png" for n in range(count)]


def computed(tower: Backbone, paths: list[Path]) -> torch.Tensor:
    size = tower.image_size
    return torch.cat([tower.see(images.pixels([images.open_image(path)], size)) for path in paths])


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.view(torch.int16), other.view(torch.int16))


def count_seen(tower: Backbone) -> tuple[Callable[[torch.Tensor], torch.Tensor], list[int]]:
    sizes: list[int] = []

    def see(pixels: torch.Tensor) -> torch.Tensor:
        sizes.append(len(pixels))
        return tower.see(pixels)

    return see, sizes


# -------------------------------------------------------------------- same bits


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stored_features_are_the_computed_ones_bit_for_bit(precision: str, paths: list[Path], tmp_path: Path):
    tower = loading.load(ModelConfig(name="tiny-t5"), precision)
    facts = image_features.facts(tower)
    # A tower of 16 bits loses nothing in the store; one of 32 is rounded to the finer 16-bit type.
    assert facts.dtype == {"fp32": torch.float16, "bf16": torch.bfloat16}[precision]
    Store.open(tmp_path, facts).build(features.by_content(paths), tower.see)
    stored = Store.open(tmp_path, facts).read([features.content(path) for path in paths])
    assert stored.shape == (21, 65, 128)
    alone = computed(tower, paths)
    assert same_bits(stored, alone.to(facts.dtype))
    assert torch.equal(stored.to(alone.dtype), alone) is (precision == "bf16")


def test_rounding_is_to_the_nearest_float16(tower, facts: Facts, paths: list[Path], tmp_path: Path, exact):
    store = Store.open(tmp_path, facts)
    store.build(features.by_content(paths[:2]), tower.see)
    stored = store.read([features.content(path) for path in paths[:2]])
    assert np.array_equal(stored.numpy(), exact[:2].numpy().astype(np.float16))


def test_a_short_last_batch_is_filled_up(tower: Backbone, facts: Facts, paths: list[Path], tmp_path: Path):
    see, sizes = count_seen(tower)
    Store.open(tmp_path, facts).build(features.by_content(paths), see)
    assert sizes == [BLOCK] * 2


def test_compare_finds_another_tower(tower: Backbone, facts: Facts, paths: list[Path], tmp_path: Path):
    store, files = Store.open(tmp_path, facts), features.by_content(paths)
    store.build(files, tower.see)
    found = store.compare(files, tower.see)
    assert (found.images, found.different, found.largest) == (21, [], 0.0)
    odd = features.content(paths[18])
    row = list(files).index(odd) % BLOCK

    def slightly(pixels: torch.Tensor) -> torch.Tensor:
        seen = tower.see(pixels)
        if torch.equal(pixels[row], images.pixels([images.open_image(paths[18])], tower.image_size)[0]):
            seen[row, 3, 5] += 0.25
        return seen

    found = store.compare(files, slightly)
    assert found.different == [odd]
    assert found.largest == pytest.approx(0.25, abs=1e-3)


# ----------------------------------------------------------------------- content


def test_renamed_and_copied_images_are_found(tower: Backbone, facts: Facts, paths: list[Path], tmp_path: Path):
    store = Store.open(tmp_path / "stores", facts)
    store.build(features.by_content(paths[:5]), tower.see)
    renamed, copy = tmp_path / "other.png", tmp_path / "copy.png"
    shutil.copy(paths[1], renamed)
    shutil.copy(paths[1], copy)
    files = features.by_content([renamed, copy, paths[1], paths[6]])
    assert list(files.values()) == [renamed, paths[6]]
    assert store.missing(files) == [features.content(paths[6])]
    store.build(files, tower.see)
    assert len(store) == 6


def test_a_changed_file_is_another_image(paths: list[Path], tmp_path: Path):
    path = tmp_path / "image.png"
    shutil.copy(paths[0], path)
    before = features.content(path)
    assert before == hashlib.sha256(paths[0].read_bytes()).hexdigest()
    shutil.copy(paths[1], path)
    assert features.content(path) == features.content(paths[1]) != before


def test_an_image_that_changes_during_the_build_stops_it(tower: Backbone, facts: Facts, paths, tmp_path: Path):
    files = features.by_content(paths[:1])
    with pytest.raises(UserError, match=r"1\.png changed while"):
        Store.open(tmp_path, facts).build(dict.fromkeys(files, paths[1]), tower.see)


def test_an_absent_image_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"nothing\.png is missing"):
        features.content(tmp_path / "nothing.png")


# ------------------------------------------------------------- killed, and two at once


@pytest.mark.usefixtures("six_shards")
def test_a_killed_build_goes_on(tower, facts: Facts, paths: list[Path], tmp_path: Path, exact):
    files, done = features.by_content(paths), []

    def killed(count: int) -> None:
        done.append(count)
        if len(done) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Store.open(tmp_path, facts).build(files, tower.see, 4, killed)
    store = Store.open(tmp_path, facts)
    assert 9 <= len(store) <= 12  # three whole shards, of which the short one may be one
    assert not [path for path in store.home.iterdir() if path.name.startswith(".")]
    see, sizes = count_seen(tower)
    again: list[int] = []
    store.build(files, see, 4, again.append)
    assert sizes == [4] * 3
    assert sum(again) == 21 - sum(done[:3])
    assert same_bits(store.read(list(files)), exact.half())
    # Built in one go it is the same, file for file.
    whole = Store.open(tmp_path / "whole", facts)
    whole.build(files, tower.see, 4)
    shards = features.shard_files(store.home)
    assert [path.name for path in shards] == [path.name for path in features.shard_files(whole.home)]
    assert [path.read_bytes() for path in shards] == [p.read_bytes() for p in features.shard_files(whole.home)]


@pytest.mark.usefixtures("six_shards")
def test_what_a_killed_builder_left_half_written_is_removed_later(tower, facts, paths, tmp_path: Path):
    store = Store.open(tmp_path, facts)
    old, fresh = store.home / ".old.safetensors.x1", store.home / ".fresh.safetensors.x2"
    for folder in (old, fresh):
        folder.mkdir()
        (folder / "a.safetensors").write_bytes(b"half")
    os.utime(old, (1e9, 1e9))
    store.build(features.by_content(paths[:3]), tower.see)
    assert not old.exists()
    assert fresh.exists()  # perhaps somebody is writing it
    assert len(Store.open(tmp_path, facts)) == 3


@pytest.mark.usefixtures("six_shards")
def test_another_builders_shards_are_taken_in(tower, facts: Facts, paths: list[Path], tmp_path, monkeypatch, exact):
    monkeypatch.setattr(features, "threads", lambda: 2)
    files, told = features.by_content(paths), []
    other = Store.open(tmp_path, facts)
    see, sizes = count_seen(tower)

    def meanwhile(count: int) -> None:
        if not told:
            other.build(files, tower.see, 4)
        told.append(count)

    store = Store.open(tmp_path, facts)
    store.build(files, see, 4, meanwhile)
    # Three blocks of the six were on their way already: two in threads, and the one in use.
    assert len(sizes) <= 3
    assert sum(told) == 21
    assert same_bits(store.read(list(files)), exact.half())


BUILDER = """
import sys
from pathlib import Path
import torch
from blipfit.data import features
from blipfit.data.features import Facts, Store
features.SHARD_IMAGES = 4
files = features.by_content(Path(name) for name in sys.argv[2:])
store = Store.open(Path(sys.argv[1]), Facts("0" * 64, 16, (48, 16), torch.float16, "cpu"))
print("ready", flush=True)
sys.stdin.readline()
store.build(files, lambda pixels: pixels.view(4, 48, 16), 4)
assert not store.missing(files)
"""


@pytest.mark.usefixtures("six_shards")
def test_two_processes_build_at_once(paths: list[Path], tmp_path: Path):
    """The pixels themselves serve as features: the other process need not load a model."""
    facts = Facts("0" * 64, 16, (48, 16), torch.float16, "cpu")
    files = features.by_content(paths)
    command = [sys.executable, "-W", "error", "-c", BUILDER, str(tmp_path), *map(str, paths)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as other:
        assert other.stdout.readline() == "ready\n"
        other.stdin.write("go\n")
        other.stdin.flush()
        Store.open(tmp_path, facts).build(files, lambda pixels: pixels.view(4, 48, 16), 4)
        _, complaints = other.communicate(timeout=60)
    assert (other.returncode, complaints) == (0, "")
    store = Store.open(tmp_path, facts)
    expected = images.pixels([images.open_image(path) for path in files.values()], 16).view(21, 48, 16)
    assert same_bits(store.read(list(files)), expected.half())
    assert not [path for path in store.home.iterdir() if path.name.startswith(".")]


# ------------------------------------------------------------------------- reading


@pytest.mark.usefixtures("six_shards")
def test_reading_ahead_keeps_the_order(tower, facts: Facts, paths: list[Path], tmp_path: Path, exact):
    store, files = Store.open(tmp_path, facts), features.by_content(paths)
    store.build(files, tower.see, 4)
    draws, names = np.random.default_rng(1), list(files)
    batches = [[names[n] for n in draws.integers(0, 21, size)] for size in (16, 3, 1, 16, 7, 30)]
    expected = dict(zip(names, exact.half(), strict=True))
    readers = {thread.name for thread in threading.enumerate()}
    for batch, rows in zip(batches, store.ahead(batches), strict=True):
        assert same_bits(rows, torch.stack([expected[image] for image in batch]))
        readers |= {thread.name for thread in threading.enumerate()}
    assert any(name.startswith("ahead") for name in readers)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc to see maps in")
def test_shards_are_mapped_not_loaded(facts: Facts, tmp_path: Path, tower: Backbone, paths: list[Path]):
    Store.open(tmp_path, facts).build(features.by_content(paths), tower.see)
    store = Store.open(tmp_path, facts)
    [shard] = features.shard_files(store.home)
    assert str(shard) in Path("/proc/self/maps").read_text()


def test_a_flipped_bit_is_found_at_the_first_reading(tower, facts, paths: list[Path], tmp_path: Path):
    files = features.by_content(paths[:4])
    Store.open(tmp_path, facts).build(files, tower.see)
    [shard] = features.shard_files(tmp_path / facts.key)
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    store = Store.open(tmp_path, facts)
    store.read(list(files)[:3])
    with pytest.raises(DamagedShard, match=rf"{shard.name} is damaged .* delete it, and its images are computed again"):
        store.read(list(files))


@pytest.mark.parametrize(
    "spoil",
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
def test_a_damaged_shard_is_named_with_the_mend(spoil, tower, facts, paths, tmp_path: Path, exact):
    files = features.by_content(paths[:4])
    Store.open(tmp_path, facts).build(files, tower.see)
    [shard] = features.shard_files(tmp_path / facts.key)
    shard.write_bytes(spoil(shard.read_bytes()))
    with pytest.raises(UserError, match=rf"{shard.name} is damaged .* delete it"):
        Store.open(tmp_path, facts)
    shard.unlink()
    store = Store.open(tmp_path, facts)
    store.build(files, tower.see)
    assert same_bits(store.read(list(files)), exact[:4].half())


# ------------------------------------------------------------------ folders and keys


def test_the_manifest_describes_the_store(facts: Facts, tmp_path: Path):
    home = Store.open(tmp_path, facts, "tiny-t5").home
    assert home == tmp_path / facts.key
    manifest = json.loads((home / "manifest.json").read_text())
    assert manifest["model"] == "tiny-t5"
    assert (manifest["shape"], manifest["dtype"]) == ([65, 128], "float16")
    assert manifest["preprocessing"]["size"] == 64
    assert manifest["versions"]["torch"] == torch.__version__
    written = (home / "manifest.json").read_bytes()
    Store.open(tmp_path, facts, "another name")
    assert (home / "manifest.json").read_bytes() == written


def test_every_fact_changes_the_key(facts: Facts, monkeypatch: pytest.MonkeyPatch):
    others = [
        replace(facts, tower="0" * 64),
        replace(facts, size=224),
        replace(facts, shape=(257, 128)),
        replace(facts, dtype=torch.bfloat16),
        replace(facts, computing="cuda"),
    ]
    keys = {facts.key, *(other.key for other in others)}
    monkeypatch.setitem(features.PREPROCESSING, "version", 0)
    assert len(keys | {facts.key}) == 7
    monkeypatch.undo()
    assert replace(facts).key in keys


def test_the_version_of_preprocessing_stands_for_these_pixels():
    """Other pixels from the same picture need another PREPROCESSING version: stores made before must not be used."""
    draws = np.random.default_rng(0)
    picture = Image.fromarray(draws.integers(0, 256, (37, 91, 3), dtype=np.uint8))
    # Whole levels only: bicubic resizing in Pillow is fixed-point arithmetic, the same on every machine.
    levels = np.asarray(images.plain(picture, 64))
    assert features.PREPROCESSING["version"] == 1
    assert (
        hashlib.sha256(levels.tobytes()).hexdigest()
        == "f22c000d277da79f99d2975cb43baf9876859a7e9c5affe2edc0b9faec057fd0"
    )
    first = images.pixels([picture], 64)[0, :, 0, 0].double().numpy()
    assert np.allclose(first, (levels[0, 0] / 255 - np.array(images.MEAN)) / np.array(images.STD), atol=1e-6)


def test_a_foreign_folder_is_refused(facts: Facts, tmp_path: Path):
    home = tmp_path / facts.key
    home.mkdir()
    (home / "letters.txt").write_text("mine")
    with pytest.raises(UserError, match=r"is not a feature store .*move it away, or set BLIPFIT_CACHE"):
        Store.open(tmp_path, facts)
    assert [path.name for path in home.iterdir()] == ["letters.txt"]


@pytest.mark.parametrize("text", ["{}", "[]", '{"format": 0}'])
def test_a_foreign_manifest_is_refused(text: str, facts: Facts, tmp_path: Path):
    home = Store.open(tmp_path, facts).home
    (home / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"describes other features .*: delete"):
        Store.open(tmp_path, facts)


def test_a_file_in_the_way_is_told(facts: Facts, tmp_path: Path):
    (tmp_path / "stores").write_text("a file")
    with pytest.raises(UserError, match=r"cannot be written .*: set BLIPFIT_CACHE to a folder of yours"):
        Store.open(tmp_path / "stores", facts)


def test_the_default_folder(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("BLIPFIT_CACHE", raising=False)
    assert features.default_folder() == Path.home() / ".cache" / "blipfit" / "features"
    monkeypatch.setenv("BLIPFIT_CACHE", "~/elsewhere")
    assert features.default_folder() == Path.home() / "elsewhere" / "features"


# ---------------------------------------------------------------------------- size


def test_the_size_is_told_beforehand_and_true(tower: Backbone, facts: Facts, paths: list[Path], tmp_path: Path):
    store = Store.open(tmp_path, facts)
    store.build(features.by_content(paths), tower.see)
    size = sum(path.stat().st_size for path in features.shard_files(store.home))
    assert size == pytest.approx(features.size_estimate(21, facts.shape), rel=0.001)
    # The published shape: FACTS say 707 KiB an image.
    assert features.told(features.size_estimate(1, (257, 1408))) == "707 KiB"


def test_shards_are_bounded_and_hold_whole_batches():
    assert features.shard_rows((65, 128), 16) == 512
    rows = features.shard_rows((257, 1408), 16)
    assert rows % 16 == 0
    assert 0.9 * features.SHARD_BYTES < rows * 257 * 1408 * 2 <= features.SHARD_BYTES
    assert features.shard_rows((100_000, 10_000), 16) == 16


def test_too_small_a_disk_is_told_before_anything_is_computed(facts: Facts, paths: list[Path], tmp_path: Path):
    vast = replace(facts, shape=(10**8, 10**7))
    see = pytest.fail  # called with pixels it would end the test
    with pytest.raises(UserError, match=r"the features of 3 images take 5457 TiB and .* left: free some space"):
        Store.open(tmp_path, vast).build(features.by_content(paths[:3]), see)


def test_a_disk_that_refuses_leaves_nothing_half_written(tower, facts: Facts, paths: list[Path], tmp_path: Path):
    store = Store.open(tmp_path, facts)
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot be written .*: free some space"):
            store.build(features.by_content(paths[:4]), tower.see)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in store.home.iterdir()] == ["manifest.json"]


@pytest.mark.parametrize("value", [70_000.0, -70_000.0, float("nan")])
def test_features_that_do_not_fit_are_refused_with_the_image(value, tower, facts: Facts, paths, tmp_path: Path):
    def vast(pixels: torch.Tensor) -> torch.Tensor:
        seen = tower.see(pixels)
        seen[2, 0, 7] = value
        return seen

    store = Store.open(tmp_path, facts)
    with pytest.raises(UserError, match=r"/2\.png: its features do not fit into torch.float16; use --set"):
        store.build(features.by_content(paths[:4]), vast)
    assert len(Store.open(tmp_path, facts)) == 0
