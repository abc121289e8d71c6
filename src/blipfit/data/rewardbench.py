"""VL-RewardBench (Li et al., 2024): 1 250 pairs of responses to a query about an image; people preferred one of them.

As training data, the prompt is the query and the target is the preferred response. The benchmark has only one split;
blipfit divides it into train, val and test by image and writes the result to disk.
"""

import difflib
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from blipfit.data import annotations, hub
from blipfit.data.images import decode_image, open_image
from blipfit.data.question import SPLITS, Question
from blipfit.data.write_prepared import OutputFolder, PrepareReport, Source, output_folder
from blipfit.errors import UserError

HUB_NAME = "MMInstruction/VL-RewardBench"
# This revision has all 1 250 rows; the default branch has three fewer.
HUB_REVISION = "60630ac36ca93c0ca30249bd1ab3706170836cea"
PUBLISHED = 1250

CATEGORIES = ("general", "hallucination", "reasoning")
_CATEGORY_OF = {
    "hallucination": "hallucination",
    "RLAIF": "hallucination",
    "RLHF": "hallucination",
    "mathverse": "reasoning",
    "mmmu": "reasoning",
}
# Fields that are copied unchanged to the prepared files.
_EXTRA_FIELDS = ("models", "judge", "rationale", "query_source", "ground_truth")

SHARES = {"train": 0.8, "val": 0.1, "test": 0.1}
SETTINGS = "split.json"


@dataclass(frozen=True, slots=True)
class Pair:
    """Two responses to a query about an image, ranked by people."""

    id: str
    query: str
    responses: tuple[str, str]
    ranking: tuple[int, int]
    """The rank of each response; rank 0 is the preferred one."""
    image: Path | bytes | None = None
    """The image's file, its content, or None if the row has no image."""
    extra_fields: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the row that blipfit only copies, such as the judge and the models."""

    @property
    def best(self) -> int:
        """The index of the preferred response, 0 or 1."""
        return self.ranking.index(0)

    @property
    def category(self) -> str:
        """One of CATEGORIES."""
        return find_category(self.id)

    @property
    def key(self) -> tuple[str, ...]:
        """What identifies a row, as in the official script: 25 of the 1 250 ids occur twice."""
        return (self.id, self.query, *sorted(self.responses))


def find_category(row_id: str) -> str:
    """Return the category of a row by its id's prefix, the text before the first `_` or `-`; case-sensitive."""
    prefix = row_id.replace("-", "_").partition("_")[0]
    return _CATEGORY_OF.get(prefix, "general")


def read_pairs(source: Path | str) -> list[Pair]:
    """Read rows with the hub's field names, in order.

    `source` is `hub`, a folder with the hub's parquet files, one parquet file, one JSONL file, or a folder with
    `test.jsonl` or the official `data.jsonl`. In JSONL, `image` (`image_path` in the official file) is a path relative
    to the file's folder, or null. Raises UserError if the source is none of these or a row is invalid.
    """
    path = Path(source)
    if str(source) == "hub":
        return _parse_parquet_rows(hub.read_rows(hub.download(HUB_NAME, HUB_REVISION, ("test",)), "test"), HUB_NAME)
    if path.is_dir() and hub.is_download(path):
        return _parse_parquet_rows(hub.read_rows(path, "test"), str(path))
    if path.suffix == ".parquet" and path.is_file():
        return _parse_parquet_rows(hub.read_parquet([path]), str(path))
    for file in (path / "test.jsonl", path / "data.jsonl", path):
        if file.is_file():
            return [_parse_line(record, location, file.parent) for location, record in annotations.read_lines(file)]
    raise UserError(
        f"{source} is not VL-RewardBench: give a .jsonl or .parquet file, a folder with test.jsonl or with the hub's "
        "parquet files, or `hub`"
    )


def drop_duplicates(pairs: Iterable[Pair]) -> list[Pair]:
    """Return the pairs without those whose id, query and responses equal those of an earlier pair."""
    first: dict[tuple[str, ...], Pair] = {}
    for pair in pairs:
        first.setdefault(pair.key, pair)
    return list(first.values())


def split_pairs(pairs: Sequence[Pair], seed: int = 42, shares: Mapping[str, float] = SHARES) -> dict[str, list[Pair]]:
    """Divide pairs into train, val and test; no image and no id occurs in two of them.

    `shares` are the fractions of the splits; every category is divided by them. Rows with equal ids, or with images of
    equal pixels, stay together. Equal rows, seed and shares give equal splits, whatever the order of the rows and the
    file format of the images. Raises UserError for invalid shares or too few pairs.
    """
    _check_shares(shares)
    split_rows: dict[str, list[int]] = {split: [] for split in SPLITS}
    groups = sorted(_group_rows(pairs), key=lambda group: _digest(f"{seed}\n{group[0]}".encode()))
    for group_category in CATEGORIES:
        members = [rows for _, rows in groups if min(pairs[row].category for row in rows) == group_category]
        total = sum(map(len, members))
        room = {split: round(shares.get(split, 0) * total) for split in ("val", "test")}
        for rows in members:
            split = next((split for split, count in room.items() if count > 0), "train")
            split_rows[split] += rows
            if split in room:
                room[split] -= len(rows)
    if empty := [split for split in SPLITS if shares.get(split, 0) > 0 and not split_rows[split]]:
        raise UserError(f"{len(pairs)} pairs are too few for {', '.join(empty)}; give more rows or other shares")
    return {split: [pairs[row] for row in sorted(rows)] for split, rows in split_rows.items()}


def prepare(
    source: str | Path,
    to: Path,
    seed: int = 42,
    shares: Mapping[str, float] = SHARES,
    *,
    allow_outside: bool = False,
) -> PrepareReport:
    """Write `SPLIT.jsonl` with the hub's field names, `images/`, and the settings of the split in `split.json`.

    `source` is what `read_pairs` reads; `seed` and `shares` go to `split_pairs`. Rows without an image and duplicate
    rows are left out and counted. Images outside the source need `allow_outside` and are copied. Raises UserError if a
    row or an image is invalid, or `to` cannot be written.
    """
    rows = read_pairs(source)
    path = Path(source)
    allowed = Source(path if path.is_dir() else path.parent, allow_outside)
    for pair in rows:
        if isinstance(pair.image, Path):
            allowed.check(pair.image)
    with_image = [pair for pair in rows if pair.image is not None]
    pairs = drop_duplicates(with_image)
    if not pairs:
        raise UserError(f"{source}: none of its {len(rows)} rows has an image; give the data set with its images")
    splits = split_pairs(pairs, seed, shares)
    with output_folder(to, [SETTINGS], allowed) as out:
        out.require_space(
            [pair.image for pair in pairs if isinstance(pair.image, Path)],
            [len(pair.image) for pair in pairs if isinstance(pair.image, bytes)],
        )
        image_names: dict[str, str] = {}
        for split, members in splits.items():
            lines = [
                json.dumps(_format_record(pair, _add_image(out, pair, image_names)), ensure_ascii=False)
                for pair in members
            ]
            out.write_text("".join(line + "\n" for line in lines), f"{split}.jsonl")
        counts = {split: Counter(pair.category for pair in members) for split, members in splits.items()}
        settings = {"seed": seed, "shares": dict(shares), "by": "image pixels and id", "pairs": counts}
        out.write_json(settings, SETTINGS, indent=2)
    left_out = {"without an image": len(rows) - len(with_image), "repeating another row": len(with_image) - len(pairs)}
    totals = {split: len(members) for split, members in splits.items()}
    return PrepareReport("rewardbench", to, totals, left_out, out.image_counts, notes=_notes(pairs))


def _notes(pairs: Iterable[Pair]) -> list[str]:
    """Return sentences on the pairs without a clear answer: their number and the first one's id."""
    empty = [pair.id for pair in pairs if not clean_query(pair).strip()]
    equal = [pair.id for pair in pairs if pair.responses[0] == pair.responses[1]]
    kinds = (("with an empty query", empty), ("with two equal responses", equal))
    return [f"{len(ids)} pairs {kind}, first {ids[0]}" for kind, ids in kinds if ids]


def load(folder: Path, split: str) -> list[Question]:
    """Load the queries of a split with the preferred responses as answers, without choices; tags: category.

    If an id occurs again in the split, its number is added: `ID#2`. Raises UserError if the file is missing or a row
    or an image is invalid.
    """
    file = folder / f"{split}.jsonl"
    if not file.is_file():
        raise UserError(f"{file} is missing; run `blipfit prepare rewardbench --from DIR --to {folder}`")
    id_counts: Counter[str] = Counter()
    questions = []
    for pair in read_pairs(file):
        id_counts[pair.id] += 1
        number = id_counts[pair.id]
        questions.append(to_question(pair, pair.id if number == 1 else f"{pair.id}#{number}"))
    return questions


def to_question(pair: Pair, question_id: str | None = None) -> Question:
    """Return the query as a question and the preferred response as its answer; the id is the pair's by default.

    Raises UserError if the pair has no image file.
    """
    if not isinstance(pair.image, Path):
        raise UserError(f"{pair.id} has no image file; prepare the data set with its images")
    return Question(
        id=question_id or pair.id,
        image=pair.image,
        question=clean_query(pair),
        answer=pair.responses[pair.best],
        tags={"category": pair.category},
        transparency="dropped",
    )


def clean_query(pair: Pair) -> str:
    """Return the query without `<image>`, which InstructBLIP's tokenizers treat as a placeholder of an image."""
    return pair.query.replace("<image>\n", "").replace("<image>", "")


def _parse_parquet_rows(rows: Iterator[dict[str, Any]], source: str) -> list[Pair]:
    pairs = []
    for number, row in enumerate(rows):
        image = row.get("image") or {}
        pairs.append(_parse_pair(row, image.get("bytes"), f"{source}: row {number}"))
    return pairs


def _parse_line(record: Mapping[str, Any], location: str, base: Path) -> Pair:
    name = record.get("image", record.get("image_path"))
    if name is None:
        return _parse_pair(record, None, location)
    if not isinstance(name, str):
        raise UserError(f"{location}: 'image' must be a path or null")
    image = annotations.find_image(
        [base / name], location, "image paths are relative to the file; put the images there"
    )
    return _parse_pair(record, image, location)


def _parse_pair(record: Mapping[str, Any], image: Path | bytes | None, location: str) -> Pair:
    for key in ("id", "query", "response", "human_ranking"):
        if key not in record:
            similar = difflib.get_close_matches(key, record, n=1)
            raise UserError(f"{location}: {key!r} is missing" + (f"; rename {similar[0]!r}" if similar else ""))
    return Pair(
        id=annotations.require_text(record, "id", location),
        query=annotations.require_text(record, "query", location),
        responses=parse_responses(record["response"], location),
        ranking=parse_ranking(record["human_ranking"], location),
        image=image,
        extra_fields={name: record[name] for name in _EXTRA_FIELDS if record.get(name) is not None},
    )


def parse_responses(value: Any, location: str) -> tuple[str, str]:
    """Return the two responses; raises UserError unless `value` is a list of two texts."""
    if not isinstance(value, list) or len(value) != 2 or not all(isinstance(text, str) for text in value):
        raise UserError(f"{location}: 'response' must be a list of two texts")
    return value[0], value[1]


def parse_ranking(value: Any, location: str) -> tuple[int, int]:
    """Return the ranks: (0, 1) if the first response is preferred, (1, 0) if the second; raises UserError otherwise."""
    if value not in ([0, 1], [1, 0]):
        raise UserError(
            f"{location}: the ranking must be [0, 1] (the first response is better) or [1, 0], not {value!r}"
        )
    return value[0], value[1]


def _check_shares(shares: Mapping[str, float]) -> None:
    unknown = [split for split in shares if split not in SPLITS]
    if unknown or min(shares.values(), default=0) < 0 or abs(sum(shares.values()) - 1) > 1e-9:
        raise UserError(
            f"invalid shares {dict(shares)}: give a number of 0 or more for {', '.join(SPLITS)}; they must sum to 1"
        )


def _group_rows(pairs: Sequence[Pair]) -> list[tuple[str, list[int]]]:
    """Return groups of rows that share an image or an id, each with a name that does not depend on the row order.

    A union-find: `parents` are the links of the rows' trees, and every group is one tree.
    """
    parents = list(range(len(pairs)))

    def root(row: int) -> int:
        while parents[row] != row:
            row = parents[row]
        return row

    first_rows: dict[str, int] = {}
    names: list[str] = []
    for row, pair in enumerate(pairs):
        keys = [f"id {pair.id}"] + ([] if pair.image is None else [f"image {_hash_pixels(pair)}"])
        names.append(keys[-1])
        for key in keys:
            parents[root(row)] = root(first_rows.setdefault(key, row))
    groups: dict[int, list[int]] = {}
    for row in range(len(pairs)):
        groups.setdefault(root(row), []).append(row)
    return [(min(names[row] for row in rows), rows) for rows in groups.values()]


def _hash_pixels(pair: Pair) -> str:
    """Return a hash of the decoded pixels of a pair's image; equal for lossless copies in other file formats."""
    assert pair.image is not None
    if isinstance(pair.image, Path):
        image = open_image(pair.image, "dropped")
    else:
        image = decode_image(pair.image, f"the image of {pair.id}", "dropped")
    return _digest(f"{image.width} {image.height}\n".encode() + image.tobytes())


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=12).hexdigest()


def _add_image(out: OutputFolder, pair: Pair, names: dict[str, str]) -> str:
    """Add a pair's image to the folder unless it is there already; return its name. `names` are by content hash."""
    data = pair.image.read_bytes() if isinstance(pair.image, Path) else pair.image
    assert data is not None
    content_hash = _digest(data)
    if content_hash not in names:
        with Image.open(io.BytesIO(data)) as image:
            names[content_hash] = f"images/{content_hash}.{(image.format or 'image').lower()}"
        if isinstance(pair.image, Path):
            out.add_image(pair.image, names[content_hash])
        else:
            out.write_image(data, names[content_hash])
    return names[content_hash]


def _format_record(pair: Pair, image: str) -> dict[str, Any]:
    return {
        "id": pair.id,
        "query": pair.query,
        "response": list(pair.responses),
        "image": image,
        "human_ranking": list(pair.ranking),
        **pair.extra_fields,
    }
