"""Tables of own data: JSON, CSV, parquet, WebDataset, image folders, `save_to_disk` folders and data sets of the hub.

`datasets` finds the files and splits of a folder and reads everything but JSON, without decoding images. It would turn
texts such as "2017-09-01" of JSON files into dates; JSON is read by `annotations`, which also names the line.
"""

import csv
import dataclasses
import itertools
import re
import tarfile
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from blipfit.data import annotations, hub
from blipfit.data.question import SPLITS
from blipfit.errors import UserError

HUB = "hf://"
UNSPLIT = "all"
"""Name of the only table of a source without splits."""
SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test"}
_FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".tar": "webdataset",
}
_TABLE_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_NO_TABLES = ("dataset_infos.json", "dataset_info.json", "state.json", "dataset_dict.json")
_WEBDATASET_NAMES = {
    **dict.fromkeys(("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jp2", "ppm"), "image"),
    "txt": "text",
    "cls": "label",
}
"""What the files of a sample hold, by their suffixes."""

Skip = Callable[[UserError], None]


class Row(NamedTuple):
    """A row of a table: where it is, its number counted from 1, and its values by column.

    `base` is the folder that its paths are relative to.
    """

    location: str
    number: int
    values: Mapping[str, Any]
    base: Path


@dataclass(frozen=True, slots=True)
class Files:
    """The files of a source, by split, before they are read; `splits` is empty for what `datasets` opens itself."""

    format: str
    folder: Path
    splits: Mapping[str, Sequence[Path]]
    is_hub: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """The rows of one split."""

    name: str
    columns: Sequence[str]
    rows: Iterable[Row]
    is_text: bool = False
    """Whether all values are texts, as in CSV."""


def locate(source: str | Path) -> Files:
    """Return the format, files and splits of a source: a file, a folder, or `hf://owner/name@revision`.

    Raises UserError if it does not exist, is no data set, or a data set of the hub cannot be downloaded.
    """
    if str(source).startswith(HUB):
        return _locate_hub(str(source))
    source = Path(source)
    if source.is_file():
        return Files(_file_format(source), source.parent, {UNSPLIT: [source]})
    if not source.is_dir():
        raise UserError(f"{source} does not exist; give a file or a folder with --from (formats: docs/data.md)")
    if (source / "dataset_dict.json").is_file() or (source / "state.json").is_file():
        return Files("save_to_disk", source, {})
    if (source / "train.jsonl").is_file():
        names = [split for split in SPLITS if (source / f"{split}.jsonl").is_file()]
        return Files("jsonl", source, _name_single_split({split: [source / f"{split}.jsonl"] for split in names}))
    tables = [f for f in sorted(source.iterdir()) if f.suffix in _TABLE_SUFFIXES and f.name not in _NO_TABLES]
    if not tables:
        return _locate_with_datasets(source)
    splits = _group_by_split(tables)
    if splits is None and len(tables) > 1:
        raise UserError(f"{source} has several tables ({', '.join(f.name for f in tables[:6])}); give one with --from")
    splits = _name_single_split(splits or {UNSPLIT: tables})
    formats = {_file_format(file) for files in splits.values() for file in files}
    if len(formats) > 1:
        raise UserError(f"{source} has tables of several formats ({', '.join(sorted(formats))}); give one with --from")
    return Files(formats.pop(), source, splits)


def open_tables(files: Files, skip: Skip) -> dict[str, Table]:
    """Return the table of each split; `skip` receives the error of every line that is not valid JSON.

    Rows of JSON are read at once, others when they are iterated. Raises UserError if a file cannot be read.
    """
    if files.format == "save_to_disk":
        return _open_saved(files.folder)
    return {split: _open_table(files.format, paths, files.folder, skip) for split, paths in files.splits.items()}


def _open_table(file_format: str, paths: Sequence[Path], folder: Path, skip: Skip) -> Table:
    name = str(paths[0] if len(paths) == 1 else folder)
    if file_format in ("jsonl", "json"):
        records = list(_read_json(paths, skip))
        return Table(name, list(dict.fromkeys(key for row in records for key in row.values)), records)
    if file_format == "imagefolder":
        streams = [(str(folder), folder, _stream("imagefolder", paths))]
    elif file_format in ("csv", "tsv"):
        streams = [(str(path), path.parent, _stream_csv(path, "," if file_format == "csv" else "\t")) for path in paths]
    else:
        streams = [(str(path), path.parent, _stream(file_format, [path])) for path in paths]
    table = _join_streams(name, streams)
    if file_format not in ("csv", "tsv"):
        return table
    return dataclasses.replace(
        table, rows=list(table.rows), is_text=True
    )  # a reader that is not exhausted leaks a file


def _file_format(file: Path) -> str:
    """Return the format by the suffix; other suffixes are JSON lines, and so is a .json file that is no list."""
    name = _FORMATS.get(file.suffix.lower(), "jsonl")
    if name == "json":
        with file.open("rb") as opened:
            name = "json" if opened.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[") else "jsonl"
    return name


def _group_by_split(tables: Sequence[Path]) -> dict[str, list[Path]] | None:
    """Return files by split (`train.csv`, `test-00000-of-00002.parquet`); None if one is not named by a split."""
    splits: dict[str, list[Path]] = {}
    for file in tables:
        match = re.fullmatch(r"([a-z]+)(?:[-_.]?\d.*)?", file.stem.lower())
        if match is None or match[1] not in SPLIT_NAMES:
            return None
        splits.setdefault(SPLIT_NAMES[match[1]], []).append(file)
    return splits


def _locate_hub(address: str) -> Files:
    match = re.fullmatch(r"hf://(?:datasets/)?([\w.-]+/[\w.-]+)@([\w./-]+?)(?:#([\w.-]+))?", address)
    if match is None:
        raise UserError(
            f"{address} is no data set of the hub; write hf://owner/name@revision, with a commit, tag or branch, and "
            "#CONFIG if it has several"
        )
    folder = hub.download_all(match[1], match[2])
    return _locate_with_datasets(folder, match[3], address)


def _locate_with_datasets(folder: Path, config: str | None = None, address: str = "") -> Files:
    """Let `datasets` find the files and splits of a folder, by its rules for the hub."""
    import datasets

    name = address or str(folder)
    with tempfile.TemporaryDirectory() as cache:
        try:
            builder = datasets.load_dataset_builder(str(folder.absolute()), config, cache_dir=cache)
        except (datasets.exceptions.DatasetNotFoundError, OSError, RuntimeError, ValueError) as error:
            if str(error).startswith("Config name is missing"):
                fix = f"{address}#CONFIG" if address else "the folder of one of them"
                raise UserError(
                    f"{name} has several configurations; give {fix} with --from ({_summarize(error)})"
                ) from None
            raise UserError(
                f"{name} is not a data set: give a .jsonl file, or a folder with train.jsonl, val.jsonl, test.jsonl, "
                f"or another format of docs/data.md ({_summarize(error)})"
            ) from None
    file_format = type(builder).__module__.rpartition(".")[2]
    if file_format not in ("json", "csv", "parquet", "imagefolder", "webdataset", "arrow"):
        raise UserError(f"{name} has files of the kind {file_format!r}, which holds no images with questions")
    data_files = {str(split): [Path(file) for file in files] for split, files in builder.config.data_files.items()}
    if file_format == "imagefolder":
        metadata = {split: sorted({f for f in files if f.name in _METADATA}) for split, files in data_files.items()}
        if any(metadata.values()):
            data_files = {split: files for split, files in metadata.items() if files}
    if file_format in ("json", "csv") or any(f.name in _METADATA for fs in data_files.values() for f in fs):
        file_format = _file_format(next(iter(data_files.values()))[0])
    return Files(file_format, folder, _rename_splits(data_files, name), is_hub=bool(address))


def _name_single_split(splits: dict[str, Any]) -> dict[str, Any]:
    """Return the splits; a single split, whatever its name, is the whole source."""
    return splits if len(splits) > 1 else {UNSPLIT: next(iter(splits.values()))}


def _rename_splits(splits: Mapping[str, Any], name: str) -> dict[str, Any]:
    if len(splits) == 1:
        return _name_single_split(dict(splits))
    unknown = [split for split in splits if split not in SPLIT_NAMES]
    renamed = {SPLIT_NAMES[split]: value for split, value in splits.items() if split not in unknown}
    if unknown or len(renamed) < len(splits):
        raise UserError(f"{name} has the splits {', '.join(splits)}; expected one, or train, validation and test")
    return renamed


def _read_json(files: Sequence[Path], skip: Skip) -> Iterator[Row]:
    number = 0
    for file in files:
        if _file_format(file) == "json":
            values = annotations.require_list(annotations.read_json(file), str(file))
            entries: Iterable[Any] = ((f"{file}: entry {n}", value) for n, value in enumerate(values, start=1))
        else:
            entries = annotations.split_lines(file)
        for location, entry in entries:
            number += 1
            try:
                is_line = isinstance(entry, bytes)
                record = annotations.parse_line(entry, location) if is_line else entry
                yield Row(location, number, annotations.require_object(record, location), file.parent)
            except UserError as error:
                skip(error)


def _stream_csv(file: Path, separator: str) -> Any:
    """Return the rows of a CSV file as a stream; every value is a text, so that `007` and `NA` stay what they are."""
    import datasets

    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            columns = next(csv.reader(opened, delimiter=separator), [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file}:1: no names of columns can be read ({error}); save the file as UTF-8") from None
    if not columns:
        raise UserError(f"{file}:1: the first line has no names of columns; write them there")
    if len(set(columns)) < len(columns):
        raise UserError(f"{file}:1: a column name occurs twice ({', '.join(columns)}); rename a column")
    texts = datasets.Features({column: datasets.Value("string") for column in columns})
    options: dict[str, Any] = {"sep": separator, "features": texts, "na_filter": False, "keep_default_na": False}
    return _stream("csv", [file], **options, index_col=False)  # otherwise a long row shifts the columns of all


def _stream(file_format: str, files: Sequence[Path], **options: Any) -> Any:
    """Return the rows of files as a stream of `datasets`."""
    import datasets

    data_files = {"train": [str(file) for file in files]}
    with _errors_as_user_errors(str(files[0])), tempfile.TemporaryDirectory() as cache:
        options |= {"data_files": data_files, "cache_dir": cache, "split": "train", "streaming": True}
        match file_format:  # names of formats, so that no repository with code can be meant (tests/test_safety.py)
            case "csv":
                return datasets.load_dataset("csv", **options)
            case "parquet":
                return datasets.load_dataset("parquet", **options)
            case "arrow":
                return datasets.load_dataset("arrow", **options)
            case "imagefolder":
                return datasets.load_dataset("imagefolder", **options)
            case "webdataset":
                for file in files:
                    _require_no_pickle(file)
                return datasets.load_dataset("webdataset", **options)
    raise ValueError(file_format)


def _require_no_pickle(archive: Path) -> None:
    """Raise UserError if a WebDataset holds a pickle, which `datasets` would load, though without running its code."""
    with tarfile.open(archive) as tar:
        for member in tar:
            if "pth" in member.name.lower().split("."):
                raise UserError(f"{archive} holds a pickle ({member.name}), which is not read: leave it out")


def _open_saved(folder: Path) -> dict[str, Table]:
    """Open a folder that `save_to_disk` wrote."""
    import datasets

    with _errors_as_user_errors(str(folder)):
        saved = datasets.load_from_disk(str(folder))
    parts = _rename_splits(saved if isinstance(saved, dict) else {UNSPLIT: saved}, str(folder))
    streams = {split: part.with_format(None).to_iterable_dataset() for split, part in parts.items()}
    names = {split: f"{folder}" if split == UNSPLIT else f"{folder} ({split})" for split in parts}
    return {split: _join_streams(names[split], [(names[split], folder, stream)]) for split, stream in streams.items()}


def _join_streams(name: str, streams: Sequence[tuple[str, Path, Any]]) -> Table:
    """Return a table of streams with their names and the folders that their paths are relative to."""
    columns = dict.fromkeys(column for _, _, stream in streams for column in _flat_columns(stream.features or {}))
    return Table(name, list(columns), _read_streams(streams))


def _read_streams(streams: Sequence[tuple[str, Path, Any]]) -> Iterator[Row]:
    import datasets

    number = 0
    for name, base, stream in streams:
        features = stream.features or {}
        labels = {key: value for key, value in features.items() if isinstance(value, datasets.ClassLabel)}
        rows = iter(stream.decode(False))
        for position in itertools.count(1):
            with _errors_as_user_errors(name):  # files are read in pieces, so the row is not known
                values = next(rows, None)
            if values is None:
                break
            for key, label in labels.items():
                values[key] = label.int2str(values[key]) if values[key] not in (None, -1) else None
            number += 1
            yield Row(f"{name}: row {position}", number, _flatten(values), base)


def _flat_columns(features: Mapping[str, Any]) -> Iterator[str]:
    """Yield the columns after `_flatten`."""
    for name, feature in features.items():
        if "__key__" in features and name == "json" and isinstance(feature, dict):
            yield from feature
        elif name not in ("__key__", "__url__"):
            yield _WEBDATASET_NAMES.get(name, name) if "__key__" in features else name


def _flatten(values: dict[str, Any]) -> dict[str, Any]:
    """Give the files of a WebDataset sample (`jpg`, `txt`, `cls`, `json`) names; other rows stay as they are."""
    if "__key__" not in values:
        return values
    fields = {_WEBDATASET_NAMES.get(name, name): value for name, value in values.items() if value is not None}
    record = fields.pop("json", None)
    return fields | (record if isinstance(record, dict) else {})


@contextmanager
def _errors_as_user_errors(location: str) -> Iterator[None]:
    """Turn the errors of `datasets`, pandas and pyarrow about a file's content into a UserError."""
    import datasets

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Length of header or names does not match")  # of pandas: data lost
            yield
    except Warning:
        raise UserError(f"{location} cannot be read (a row has more values than the header has names)") from None
    except (datasets.exceptions.DatasetsError, OSError, ValueError, TypeError, KeyError, tarfile.TarError) as error:
        raise UserError(f"{location} cannot be read ({_summarize(error)})") from None


def _summarize(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
