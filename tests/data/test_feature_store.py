"""The feature store with the vision tower of the miniature: stored values, image hashes, keys, sizes and errors."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from blipfit.data import feature_store, images
from blipfit.data.feature_store import VISION_BATCH_SIZE, FeatureSpec, FeatureStore
from blipfit.errors import UserError
from blipfit.model import image_features, loading
from blipfit.model.backbone import Backbone
from blipfit.recipe import ModelConfig
from image_tower import compute_features, count_images, has_same_bits


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stored_features_are_the_computed_ones_bit_for_bit(precision: str, image_paths: list[Path], tmp_path: Path):
    tower = loading.load(ModelConfig(name="tiny-t5"), precision)
    spec = image_features.feature_spec(tower)
    # The residual stream of a 16-bit tower is in fp32 too; float16 keeps 3 more bits of it than bfloat16.
    assert spec.dtype == torch.float16
    FeatureStore.open(tmp_path, spec).build(feature_store.hash_files(image_paths), tower.see)
    stored = FeatureStore.open(tmp_path, spec).read([feature_store.hash_file(path) for path in image_paths])
    assert stored.shape == (21, 65, 128)
    expected = compute_features(tower, image_paths)
    assert has_same_bits(stored, expected.to(spec.dtype))
    assert expected.dtype == torch.float32


def test_rounding_is_to_the_nearest_float16(
    tower, spec: FeatureSpec, image_paths: list[Path], tmp_path: Path, exact_features
):
    store = FeatureStore.open(tmp_path, spec)
    store.build(feature_store.hash_files(image_paths[:2]), tower.see)
    stored = store.read([feature_store.hash_file(path) for path in image_paths[:2]])
    assert np.array_equal(stored.numpy(), exact_features[:2].numpy().astype(np.float16))


def test_a_short_last_batch_is_padded(tower: Backbone, spec: FeatureSpec, image_paths: list[Path], tmp_path: Path):
    see, sizes = count_images(tower)
    FeatureStore.open(tmp_path, spec).build(feature_store.hash_files(image_paths), see)
    assert sizes == [VISION_BATCH_SIZE] * 2


def test_compare_finds_another_tower(tower: Backbone, spec: FeatureSpec, image_paths: list[Path], tmp_path: Path):
    store, files = FeatureStore.open(tmp_path, spec), feature_store.hash_files(image_paths)
    store.build(files, tower.see)
    result = store.compare(files, tower.see)
    assert (result.images, result.different, result.largest) == (21, [], 0.0)
    changed_image = feature_store.hash_file(image_paths[18])
    row = list(files).index(changed_image) % VISION_BATCH_SIZE

    def see_with_one_change(pixels: torch.Tensor) -> torch.Tensor:
        rows = tower.see(pixels)
        if torch.equal(pixels[row], images.to_pixels([images.open_image(image_paths[18])], tower.image_size)[0]):
            rows[row, 3, 5] += 0.25
        return rows

    result = store.compare(files, see_with_one_change)
    assert result.different == [changed_image]
    assert result.largest == pytest.approx(0.25, abs=1e-3)


def test_renamed_and_copied_images_are_found(
    tower: Backbone, spec: FeatureSpec, image_paths: list[Path], tmp_path: Path
):
    store = FeatureStore.open(tmp_path / "stores", spec)
    store.build(feature_store.hash_files(image_paths[:5]), tower.see)
    renamed, copy = tmp_path / "other.png", tmp_path / "copy.png"
    shutil.copy(image_paths[1], renamed)
    shutil.copy(image_paths[1], copy)
    files = feature_store.hash_files([renamed, copy, image_paths[1], image_paths[6]])
    assert list(files.values()) == [renamed, image_paths[6]]
    assert store.missing(files) == [feature_store.hash_file(image_paths[6])]
    store.build(files, tower.see)
    assert len(store) == 6


def test_a_changed_file_is_another_image(image_paths: list[Path], tmp_path: Path):
    path = tmp_path / "image.png"
    shutil.copy(image_paths[0], path)
    before = feature_store.hash_file(path)
    assert before == hashlib.sha256(image_paths[0].read_bytes()).hexdigest()
    shutil.copy(image_paths[1], path)
    assert feature_store.hash_file(path) == feature_store.hash_file(image_paths[1]) != before


def test_an_image_that_changes_during_the_build_stops_it(
    tower: Backbone, spec: FeatureSpec, image_paths, tmp_path: Path
):
    files = feature_store.hash_files(image_paths[:1])
    with pytest.raises(UserError, match=r"1\.png changed while"):
        FeatureStore.open(tmp_path, spec).build(dict.fromkeys(files, image_paths[1]), tower.see)


def test_an_absent_image_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"nothing\.png is missing"):
        feature_store.hash_file(tmp_path / "nothing.png")


def test_the_manifest_describes_the_store(spec: FeatureSpec, tmp_path: Path):
    home = FeatureStore.open(tmp_path, spec, "tiny-t5").home
    assert home == tmp_path / spec.key
    manifest = json.loads((home / "manifest.json").read_text())
    assert manifest["model"] == "tiny-t5"
    assert (manifest["shape"], manifest["dtype"]) == ([65, 128], "float16")
    assert manifest["preprocessing"]["size"] == 64
    assert manifest["versions"]["torch"] == torch.__version__
    before = (home / "manifest.json").read_bytes()
    FeatureStore.open(tmp_path, spec, "another name")
    assert (home / "manifest.json").read_bytes() == before


def test_every_field_of_the_spec_changes_the_key(spec: FeatureSpec, monkeypatch: pytest.MonkeyPatch):
    others = [
        replace(spec, tower_sha256="0" * 64),
        replace(spec, image_size=224),
        replace(spec, shape=(257, 128)),
        replace(spec, dtype=torch.bfloat16),
        replace(spec, computation="cuda"),
    ]
    keys = {spec.key, *(other.key for other in others)}
    monkeypatch.setitem(feature_store.PREPROCESSING, "version", 0)
    assert len(keys | {spec.key}) == 7
    monkeypatch.undo()
    assert replace(spec).key in keys


def test_pixels_change_only_with_the_preprocessing_version():
    """If this fails, raise the version in PREPROCESSING, so that older stores are not used."""
    generator = np.random.default_rng(0)
    image = Image.fromarray(generator.integers(0, 256, (37, 91, 3), dtype=np.uint8))
    # Integer levels only: Pillow's bicubic resizing is fixed-point arithmetic, equal on every machine.
    levels = np.asarray(images.resize(image, 64))
    assert feature_store.PREPROCESSING["version"] == 1
    assert (
        hashlib.sha256(levels.tobytes()).hexdigest()
        == "f22c000d277da79f99d2975cb43baf9876859a7e9c5affe2edc0b9faec057fd0"
    )
    first = images.to_pixels([image], 64)[0, :, 0, 0].double().numpy()
    assert np.allclose(first, (levels[0, 0] / 255 - np.array(images.MEAN)) / np.array(images.STD), atol=1e-6)


def test_a_foreign_folder_is_refused(spec: FeatureSpec, tmp_path: Path):
    home = tmp_path / spec.key
    home.mkdir()
    (home / "letters.txt").write_text("mine")
    with pytest.raises(UserError, match=r"is not a feature store .*move it away, or set BLIPFIT_CACHE"):
        FeatureStore.open(tmp_path, spec)
    assert [path.name for path in home.iterdir()] == ["letters.txt"]


@pytest.mark.parametrize("text", ["{}", "[]", '{"format": 0}'])
def test_a_foreign_manifest_is_refused(text: str, spec: FeatureSpec, tmp_path: Path):
    home = FeatureStore.open(tmp_path, spec).home
    (home / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"describes other features .*: delete"):
        FeatureStore.open(tmp_path, spec)


def test_a_file_instead_of_the_folder_is_reported(spec: FeatureSpec, tmp_path: Path):
    (tmp_path / "stores").write_text("a file")
    with pytest.raises(UserError, match=r"cannot be written .*: set BLIPFIT_CACHE to a writable folder"):
        FeatureStore.open(tmp_path / "stores", spec)


def test_the_default_folder(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("BLIPFIT_CACHE", raising=False)
    assert feature_store.default_folder() == Path.home() / ".cache" / "blipfit" / "features"
    monkeypatch.setenv("BLIPFIT_CACHE", "~/elsewhere")
    assert feature_store.default_folder() == Path.home() / "elsewhere" / "features"


def test_the_estimated_size_is_the_size_on_disk(
    tower: Backbone, spec: FeatureSpec, image_paths: list[Path], tmp_path: Path
):
    store = FeatureStore.open(tmp_path, spec)
    store.build(feature_store.hash_files(image_paths), tower.see)
    size = sum(path.stat().st_size for path in feature_store.list_shards(store.home))
    assert size == pytest.approx(feature_store.estimate_bytes(21, spec.shape), rel=0.001)
    # The shape of the published vision tower: 707 KiB per image.
    assert feature_store.format_bytes(feature_store.estimate_bytes(1, (257, 1408))) == "707 KiB"


def test_shards_are_bounded_and_hold_whole_batches():
    assert feature_store.images_per_shard((65, 128), 16) == 512
    rows = feature_store.images_per_shard((257, 1408), 16)
    assert rows % 16 == 0
    assert 0.9 * feature_store.SHARD_BYTES < rows * 257 * 1408 * 2 <= feature_store.SHARD_BYTES
    assert feature_store.images_per_shard((100_000, 10_000), 16) == 16


def test_too_small_a_disk_is_reported_before_any_computation(
    spec: FeatureSpec, image_paths: list[Path], tmp_path: Path
):
    huge_spec = replace(spec, shape=(10**8, 10**7))
    see = pytest.fail  # a call fails the test
    with pytest.raises(UserError, match=r"the features of 3 images need 5457 TiB, but .* left: make room"):
        FeatureStore.open(tmp_path, huge_spec).build(feature_store.hash_files(image_paths[:3]), see)


def test_a_failed_write_leaves_no_file(tower, spec: FeatureSpec, image_paths: list[Path], tmp_path: Path):
    store = FeatureStore.open(tmp_path, spec)
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot be written .*: free some space"):
            store.build(feature_store.hash_files(image_paths[:4]), tower.see)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in store.home.iterdir()] == ["manifest.json"]


@pytest.mark.parametrize("value", [70_000.0, -70_000.0, float("nan")])
def test_features_that_do_not_fit_are_refused_with_the_image(
    value, tower, spec: FeatureSpec, image_paths, tmp_path: Path
):
    def see_with_invalid_value(pixels: torch.Tensor) -> torch.Tensor:
        rows = tower.see(pixels)
        rows[2, 0, 7] = value
        return rows

    store = FeatureStore.open(tmp_path, spec)
    with pytest.raises(UserError, match=r"/2\.png: its features do not fit into torch.float16: use --set"):
        store.build(feature_store.hash_files(image_paths[:4]), see_with_invalid_value)
    assert len(FeatureStore.open(tmp_path, spec)) == 0
