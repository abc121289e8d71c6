"""VL-RewardBench (Li et al., 2024): 1 250 pairs of responses to one query about an image, one of them preferred.

As training data the prompt is the query and the target the preferred response. The benchmark has one split; the one
into train, val and test is ours, by image, and written to disk.
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

from blipfit.data import hub, records
from blipfit.data.images import decode_image, open_image
from blipfit.data.prepared import PrepareReport, folder
from blipfit.data.question import SPLITS, Question
from blipfit.errors import UserError

HUB_NAME = "MMInstruction/VL-RewardBench"
# A revision with all 1 250 rows; the default branch has lost three since.
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
# Fields that are kept beside the ones that are read.
_FACTS = ("models", "judge", "rationale", "query_source", "ground_truth")

SHARES = {"train": 0.8, "val": 0.1, "test": 0.1}
SETTINGS = "split.json"


@dataclass(frozen=True, slots=True)
class Pair:
    """One row: two responses to a query about an image, ranked by people (rank 0 is the better one)."""

    id: str
    query: str
    responses: tuple[str, str]
    ranking: tuple[int, int]
    image: Path | bytes | None = None
    """A file, a file's bytes, or None in rows without their image."""
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def best(self) -> int:
        """The place of the preferred response, 0 or 1."""
        return self.ranking.index(0)

    @property
    def category(self) -> str:
        return category(self.id)

    @property
    def key(self) -> tuple[str, ...]:
        """What makes a row unique, as in the official script: 25 of the 1 250 ids occur twice."""
        return (self.id, self.query, *sorted(self.responses))


def category(row_id: str) -> str:
    """Category by the id's prefix, the text before its first `_` or `-`; upper and lower case differ."""
    prefix = row_id.replace("-", "_").partition("_")[0]
    return _CATEGORY_OF.get(prefix, "general")


def read(source: Path | str) -> list[Pair]:
    """Read rows with the hub's field names, in order.

    `source` is `hub`, a folder with the hub's parquet files, one parquet file, one JSONL file, or a folder with
    `test.jsonl` or the official `data.jsonl`. In JSONL `image` (officially `image_path`) is a path from the file's
    folder, or null.
    """
    path = Path(source)
    if str(source) == "hub":
        return _from_parquet(hub.rows(hub.download(HUB_NAME, HUB_REVISION, ("test",)), "test"), HUB_NAME)
    if path.is_dir() and hub.is_download(path):
        return _from_parquet(hub.rows(path, "test"), str(path))
    if path.suffix == ".parquet" and path.is_file():
        return _from_parquet(hub.parquet([path]), str(path))
    for file in (path / "test.jsonl", path / "data.jsonl", path):
        if file.is_file():
            return [_from_line(record, where, file.parent) for where, record in records.read_lines(file)]
    raise UserError(
        f"{source} is no VL-RewardBench: give a .jsonl or .parquet file, a folder with test.jsonl or with the hub's "
        "parquet files, or `hub`"
    )


def unique(pairs: Iterable[Pair]) -> list[Pair]:
    """The pairs without those that repeat an earlier one's id, query and responses."""
    first: dict[tuple[str, ...], Pair] = {}
    for pair in pairs:
        first.setdefault(pair.key, pair)
    return list(first.values())


def split(pairs: Sequence[Pair], seed: int = 42, shares: Mapping[str, float] = SHARES) -> dict[str, list[Pair]]:
    """Divide pairs into train, val and test so that no image and no id is in two of them.

    Rows whose images have the same pixels, or whose ids are the same, stay together; where an image is null its id
    stands for it. Every category is divided by the shares. The same rows, seed and shares give the same split,
    whatever the rows' order and the images' file format.
    """
    _check_shares(shares)
    parts: dict[str, list[int]] = {name: [] for name in SPLITS}
    groups = sorted(_together(pairs), key=lambda group: _digest(f"{seed}\n{group[0]}".encode()))
    for wanted in CATEGORIES:
        members = [rows for _, rows in groups if min(pairs[at].category for at in rows) == wanted]
        total = sum(map(len, members))
        room = {name: round(shares.get(name, 0) * total) for name in ("val", "test")}
        for rows in members:
            name = next((name for name, left in room.items() if left > 0), "train")
            parts[name] += rows
            if name in room:
                room[name] -= len(rows)
    if empty := [name for name in SPLITS if shares.get(name, 0) > 0 and not parts[name]]:
        raise UserError(f"{len(pairs)} pairs are too few for {', '.join(empty)}; give more rows or other shares")
    return {name: [pairs[at] for at in sorted(rows)] for name, rows in parts.items()}


def prepare(source: str | Path, to: Path, seed: int = 42, shares: Mapping[str, float] = SHARES) -> PrepareReport:
    """Write `SPLIT.jsonl` with the hub's field names, `images/`, and `split.json` that says how it was divided.

    Rows without an image and rows that repeat another are left out and counted; every image is decoded first.
    """
    rows = read(source)
    seen = [pair for pair in rows if pair.image is not None]
    kept = unique(seen)
    if not kept:
        raise UserError(f"{source}: none of its {len(rows)} rows has an image; give the data set with its images")
    parts = split(kept, seed, shares)
    with folder(to, ours=[SETTINGS]) as out:
        names: dict[str, str] = {}
        for name, pairs in parts.items():
            lines = [json.dumps(_record(pair, _put(out, pair, names)), ensure_ascii=False) for pair in pairs]
            out.write_text("".join(line + "\n" for line in lines), f"{name}.jsonl")
        counts = {name: Counter(pair.category for pair in pairs) for name, pairs in parts.items()}
        settings = {"seed": seed, "shares": dict(shares), "by": "image pixels and id", "pairs": counts}
        out.write_json(settings, SETTINGS, indent=2)
    left_out = {"without an image": len(rows) - len(seen), "repeating another row": len(seen) - len(kept)}
    return PrepareReport("rewardbench", to, {name: len(p) for name, p in parts.items()}, left_out, out.placed)


def load(folder: Path, split: str) -> list[Question]:
    """The queries of a split with the preferred responses as answers, without choices; tags: category.

    An id that occurs again in the split gets its number there: `ID#2`.
    """
    file = folder / f"{split}.jsonl"
    if not file.is_file():
        raise UserError(f"{file} is missing; run `blipfit prepare rewardbench --from DIR --to {folder}`")
    seen: Counter[str] = Counter()
    questions = []
    for pair in read(file):
        seen[pair.id] += 1
        number = seen[pair.id]
        questions.append(question(pair, pair.id if number == 1 else f"{pair.id}#{number}"))
    return questions


def question(pair: Pair, name: str | None = None) -> Question:
    """A pair as a question: the query is asked, the preferred response answers it."""
    if not isinstance(pair.image, Path):
        raise UserError(f"{pair.id} has no image file; prepare the data set with its images")
    return Question(
        id=name or pair.id,
        image=pair.image,
        question=query(pair),
        answer=pair.responses[pair.best],
        tags={"category": pair.category},
    )


def query(pair: Pair) -> str:
    """The query without the mark of the image's place, which tokenizers of InstructBLIP take for an image."""
    return pair.query.replace("<image>\n", "").replace("<image>", "")


def _from_parquet(rows: Iterator[dict[str, Any]], source: str) -> list[Pair]:
    pairs = []
    for number, row in enumerate(rows):
        image = row.get("image") or {}
        pairs.append(_pair(row, image.get("bytes"), f"{source}: row {number}"))
    return pairs


def _from_line(record: Mapping[str, Any], where: str, base: Path) -> Pair:
    name = record.get("image", record.get("image_path"))
    if name is None:
        return _pair(record, None, where)
    if not isinstance(name, str):
        raise UserError(f"{where}: 'image' must be a path or null")
    image = records.find_image([base / name], where, "put the images beside the file")
    return _pair(record, image, where)


def _pair(record: Mapping[str, Any], image: Path | bytes | None, where: str) -> Pair:
    for key in ("id", "query", "response", "human_ranking"):
        if key not in record:
            near = difflib.get_close_matches(key, record, n=1)
            raise UserError(f"{where}: {key!r} is missing" + (f"; rename {near[0]!r}" if near else ""))
    return Pair(
        id=records.text(record, "id", where),
        query=records.text(record, "query", where),
        responses=responses(record["response"], where),
        ranking=ranking(record["human_ranking"], where),
        image=image,
        facts={name: record[name] for name in _FACTS if record.get(name) is not None},
    )


def responses(value: Any, where: str) -> tuple[str, str]:
    """Two texts, or a UserError."""
    if not isinstance(value, list) or len(value) != 2 or not all(isinstance(text, str) for text in value):
        raise UserError(f"{where}: 'response' must be a list of two texts")
    return value[0], value[1]


def ranking(value: Any, where: str) -> tuple[int, int]:
    """(0, 1): the first is preferred, (1, 0): the second; anything else is a UserError."""
    if value not in ([0, 1], [1, 0]):
        raise UserError(f"{where}: the ranking must be [0, 1] (the first response is better) or [1, 0], not {value!r}")
    return value[0], value[1]


def _check_shares(shares: Mapping[str, float]) -> None:
    odd = [name for name in shares if name not in SPLITS]
    if odd or min(shares.values(), default=0) < 0 or abs(sum(shares.values()) - 1) > 1e-9:
        raise UserError(f"shares {dict(shares)} must be of {', '.join(SPLITS)}, none below 0, and sum to 1")


def _together(pairs: Sequence[Pair]) -> list[tuple[str, list[int]]]:
    """Groups of rows that share an image or an id, each with a name that does not depend on the order of rows."""
    above = list(range(len(pairs)))

    def top(at: int) -> int:
        while above[at] != at:
            at = above[at]
        return at

    first: dict[str, int] = {}
    names: list[str] = []
    for at, pair in enumerate(pairs):
        marks = [f"id {pair.id}"] + ([] if pair.image is None else [f"image {_pixels(pair)}"])
        names.append(marks[-1])
        for mark in marks:
            above[top(at)] = top(first.setdefault(mark, at))
    groups: dict[int, list[int]] = {}
    for at in range(len(pairs)):
        groups.setdefault(top(at), []).append(at)
    return [(min(names[at] for at in rows), rows) for rows in groups.values()]


def _pixels(pair: Pair) -> str:
    """A name for what an image shows: of its decoded pixels, so a picture saved anew without loss keeps it."""
    found = pair.image
    assert found is not None
    image = open_image(found) if isinstance(found, Path) else decode_image(found, f"the image of {pair.id}")
    return _digest(f"{image.width} {image.height}\n".encode() + image.tobytes())


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=12).hexdigest()


def _put(out: Any, pair: Pair, names: dict[str, str]) -> str:
    """Bring a pair's image in, once a picture; return its name in the folder."""
    data = pair.image.read_bytes() if isinstance(pair.image, Path) else pair.image
    assert data is not None
    content = _digest(data)
    if content not in names:
        with Image.open(io.BytesIO(data)) as image:
            names[content] = f"images/{content}.{(image.format or 'image').lower()}"
        if isinstance(pair.image, Path):
            out.place(pair.image, names[content])
        else:
            out.write_image(data, names[content])
    return names[content]


def _record(pair: Pair, image: str) -> dict[str, Any]:
    return {
        "id": pair.id,
        "query": pair.query,
        "response": list(pair.responses),
        "image": image,
        "human_ranking": list(pair.ranking),
        **pair.facts,
    }
