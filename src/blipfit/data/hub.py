"""Data sets on the Hugging Face hub, as parquet files: downloaded once at a pinned revision, then read.

Rows are streamed from the files, so nothing is kept a second time in another cache.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from blipfit.errors import UserError

SPLIT_NAMES = {"train": "train", "val": "validation", "test": "test"}
TIMEOUT = 5.0  # seconds to find out whether the hub can be reached


def download(name: str, revision: str, splits: Sequence[str] = tuple(SPLIT_NAMES)) -> Path:
    """Return the folder with the parquet files of these splits, fetched if the local cache lacks them.

    Without a connection this fails at once, not after the client's many retries.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    # Errors of the connection: OSError, and those of its HTTP library, which differs between its versions.
    connection: tuple[type[Exception], ...] = HfHubHTTPError.__bases__

    patterns = [f"data/{SPLIT_NAMES[split]}-*.parquet" for split in splits]

    def snapshot(**how: Any) -> Path:
        return Path(snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=patterns, **how))

    try:
        cached = snapshot(local_files_only=True)
        if all(_complete(cached, split) for split in splits):
            return cached
    except LocalEntryNotFoundError:
        pass
    try:
        HfApi().dataset_info(name, revision=revision, timeout=TIMEOUT)
        return snapshot()
    except HfHubHTTPError as error:
        raise UserError(f"the hub refused `{name}` at revision {revision}: {_first_line(error)}") from None
    except connection as error:
        raise UserError(
            f"offline: `{name}` is not in the local cache ({_first_line(error)}); connect, or run "
            f"`hf download {name} --repo-type dataset --local-dir DIR` elsewhere and give --from DIR"
        ) from None


def is_download(folder: Path) -> bool:
    """Whether the folder holds parquet files of at least one split, as the hub names them."""
    return any(_files(folder, split) for split in SPLIT_NAMES)


def rows(folder: Path, split: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a split; an image is its file's bytes: `{"bytes": …, "path": …}`, or None."""
    files = _files(folder, split)
    if not _complete(folder, split):
        raise UserError(f"{folder} lacks parquet files of {SPLIT_NAMES[split]} (has {len(files)}); download it again")
    yield from parquet(files)


def parquet(files: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """Yield the rows of parquet files that have a column `image`; an image is as in `rows`."""
    import datasets
    import pyarrow

    names = [str(file) for file in files]
    try:
        stream = datasets.load_dataset("parquet", data_files=names, split="train", streaming=True)
        yield from stream.cast_column("image", datasets.Image(decode=False))
    except (pyarrow.ArrowInvalid, datasets.exceptions.DatasetGenerationError) as error:
        raise UserError(f"{', '.join(names)}: not readable as parquet ({_first_line(error)}); fetch it again") from None


def _files(folder: Path, split: str) -> list[Path]:
    pattern = f"{SPLIT_NAMES[split]}-*.parquet"
    return sorted(folder.glob(f"data/{pattern}")) or sorted(folder.glob(pattern))


def _complete(folder: Path, split: str) -> bool:
    files = _files(folder, split)
    wanted = re.search(r"-of-(\d+)", files[0].name) if files else None
    return bool(files) and len(files) == (int(wanted[1]) if wanted else len(files))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
