"""Download data sets from the Hugging Face hub as parquet files, at a pinned revision, and read their rows.

Rows are streamed from the files, so `datasets` does not store a second copy in its own cache.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from blipfit import disk_space
from blipfit.errors import UserError

SPLIT_NAMES = {"train": "train", "val": "validation", "test": "test"}
TIMEOUT = 5.0  # seconds to wait for the hub before it counts as offline
_OFFLINE = "offline:"


def download(name: str, revision: str, splits: Sequence[str] = tuple(SPLIT_NAMES)) -> Path:
    """Return the folder with the parquet files of these splits; download them if the local cache lacks some.

    `name` is the data set's repository, `revision` a commit. Raises UserError if the hub refuses the download or cannot
    be reached; without a connection this happens at once, not after the client's many retries.
    """
    patterns = [f"data/{SPLIT_NAMES[split]}-*.parquet" for split in splits]
    cached = _find_cached(name, revision, patterns)
    if cached is not None and all(_complete(cached, split) for split in splits):
        return cached
    return _download(name, revision, patterns)


def download_all(name: str, revision: str) -> Path:
    """Return the folder with all files of a data set, downloaded if the hub can be reached, else from the local cache.

    Raises UserError if the hub refuses the download, or cannot be reached and the cache lacks files.
    """
    try:
        return _download(name, revision, None)
    except UserError as error:
        cached = _find_cached(name, revision, None) if str(error).startswith(_OFFLINE) else None
        if cached is None or not _has_all_shards(cached):
            raise
        return cached


def _find_cached(name: str, revision: str, patterns: Sequence[str] | None) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    options: dict[str, Any] = {"repo_type": "dataset", "revision": revision, "allow_patterns": patterns}
    try:
        return Path(snapshot_download(name, local_files_only=True, **options))
    except LocalEntryNotFoundError:
        return None


def _download(name: str, revision: str, patterns: Sequence[str] | None) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    # Connection errors: OSError and the errors of the HTTP library, which differs between versions of huggingface_hub.
    connection_errors: tuple[type[Exception], ...] = HfHubHTTPError.__bases__

    try:
        HfApi().dataset_info(name, revision=revision, timeout=TIMEOUT)
        options: dict[str, Any] = {"repo_type": "dataset", "revision": revision, "allow_patterns": patterns}
        return Path(snapshot_download(name, **options))
    except HfHubHTTPError as error:
        raise UserError(f"the hub refused `{name}` at revision {revision}: {_first_line(error)}") from None
    except connection_errors as error:
        disk_space.refuse_full_disk(error)
        raise UserError(
            f"{_OFFLINE} `{name}` is not in the local cache ({_first_line(error)}); connect, or run "
            f"`hf download {name} --repo-type dataset --local-dir DIR` elsewhere and give --from DIR"
        ) from None


def _has_all_shards(folder: Path) -> bool:
    """Return whether no file of a series `NAME-00000-of-00002` is missing, so far as names tell."""
    series: Counter[tuple[str, int]] = Counter()
    for file in folder.rglob("*"):
        if match := re.fullmatch(r"(.*)-\d+-of-(\d+)(\..*)?", str(file)):
            series[match[1] + (match[3] or ""), int(match[2])] += 1
    return all(count == total for (_, total), count in series.items())


def is_download(folder: Path) -> bool:
    """Return whether the folder contains parquet files of at least one split, named as on the hub."""
    return any(_files(folder, split) for split in SPLIT_NAMES)


def read_rows(folder: Path, split: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a split; an image is `{"bytes": FILE CONTENT, "path": …}` or None.

    Raises UserError if files of the split are missing or damaged.
    """
    files = _files(folder, split)
    if not _complete(folder, split):
        raise UserError(f"{folder} lacks parquet files of {SPLIT_NAMES[split]} (has {len(files)}); download it again")
    yield from read_parquet(files)


def read_parquet(files: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """Yield the rows of parquet files with a column `image`; an image has the form that `read_rows` describes.

    Raises UserError if a file is not valid parquet.
    """
    import datasets
    import pyarrow

    names = [str(file) for file in files]
    try:
        stream = datasets.load_dataset("parquet", data_files=names, split="train", streaming=True)
        yield from stream.cast_column("image", datasets.Image(decode=False))
    except (pyarrow.ArrowInvalid, datasets.exceptions.DatasetGenerationError) as error:
        raise UserError(
            f"{', '.join(names)}: not readable as parquet ({_first_line(error)}); download it again"
        ) from None


def file_sizes(folder: Path, splits: Iterable[str]) -> list[int]:
    """Return the sizes in bytes of the parquet files of some splits; their images are stored as they are."""
    return [file.stat().st_size for split in splits for file in _files(folder, split)]


def _files(folder: Path, split: str) -> list[Path]:
    pattern = f"{SPLIT_NAMES[split]}-*.parquet"
    return sorted(folder.glob(f"data/{pattern}")) or sorted(folder.glob(pattern))


def _complete(folder: Path, split: str) -> bool:
    files = _files(folder, split)
    total = re.search(r"-of-(\d+)", files[0].name) if files else None
    return bool(files) and len(files) == (int(total[1]) if total else len(files))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
