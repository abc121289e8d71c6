"""VL-RewardBench: rows from JSONL and parquet, categories, keys, and a split that lets no image leak."""

import io
import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from blipfit import data
from blipfit.data import icons, rewardbench
from blipfit.data.images import open_image
from blipfit.data.prompts import prompt
from blipfit.data.rewardbench import Pair, category, split
from blipfit.errors import UserError


def png(seed: int, kind: str = "PNG") -> bytes:
    values = np.random.default_rng(seed).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).save(file, kind)
    return file.getvalue()


def row(number: int, **fields) -> dict:
    return {
        "id": f"RLAIF-V-{number}",
        "query": f"What is {number}?",
        "response": [f"It is {number}.", f"It is not {number}."],
        "human_ranking": [0, 1] if number % 2 else [1, 0],
        "image": None,
    } | fields


def jsonl(file: Path, rows: list[dict]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return file


def parquet(file: Path, rows: list[dict]) -> Path:
    """A file with the hub's columns, the unread ones too."""
    texts, text = pyarrow.list_(pyarrow.string()), pyarrow.string()
    schema = pyarrow.schema(
        [
            ("id", text),
            ("query", text),
            ("response", texts),
            ("image", pyarrow.struct([("bytes", pyarrow.binary()), ("path", text)])),
            ("human_ranking", pyarrow.list_(pyarrow.int64())),
            ("models", texts),
            ("judge", text),
            ("rationale", text),
            ("query_source", text),
            ("meta", text),
            ("human_error_analysis", texts),
            ("ground_truth", text),
        ]
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), file)
    return file


def test_real_rows_load_with_their_categories(shared: Path):
    pairs = rewardbench.read(shared / "vl_rewardbench" / "test_text_only.jsonl")
    assert len(pairs) == len({pair.key for pair in pairs}) == 400
    assert Counter(pair.category for pair in pairs) == {"hallucination": 235, "reasoning": 110, "general": 55}
    prefixes = {pair.id.replace("-", "_").split("_")[0]: pair.category for pair in pairs}
    assert prefixes["RLAIF"] == prefixes["RLHF"] == prefixes["hallucination"] == "hallucination"
    assert prefixes["mathverse"] == prefixes["mmmu"] == "reasoning"
    assert prefixes["wildvision"] == prefixes["jailbreak"] == prefixes["politics"] == "general"
    first = pairs[0]
    assert (first.id, first.ranking, first.best, first.image) == ("hallucination_pair-1003", (1, 0), 1, None)


@pytest.mark.parametrize(
    ("row_id", "expected"),
    [
        ("RLAIF-V-14", "hallucination"),
        ("RLHF-V-2", "hallucination"),
        ("hallucination_pair-1", "hallucination"),
        ("rlaif-v-14", "general"),  # case matters
        ("hallucinations_pair-1", "general"),  # the whole prefix
        ("mathverse_5", "reasoning"),
        ("mmmu_pro_test_Art_1", "reasoning"),
        ("mmmu", "reasoning"),
        ("LRVInstruction-000000007746", "general"),
        ("wildvision-battle-mathverse_1", "general"),
    ],
)
def test_category_by_prefix(row_id: str, expected: str):
    assert category(row_id) == expected


def test_a_repeated_id_is_another_row_and_a_repeated_row_is_not():
    same = Pair("a", "q", ("x", "y"), (0, 1))
    swapped = Pair("a", "q", ("y", "x"), (1, 0))
    other = Pair("a", "q", ("x", "z"), (0, 1))
    assert rewardbench.unique([same, other, swapped]) == [same, other]


def test_parquet_with_images_and_jsonl_with_paths_give_the_same(tmp_path: Path):
    made = [row(n, models=["a", "b"], judge="people", ground_truth=f"{n}") for n in range(1, 4)]
    inside = [r | {"image": {"bytes": png(n), "path": None}} for n, r in enumerate(made)]
    one = rewardbench.read(parquet(tmp_path / "hub" / "data" / "test-00000-of-00001.parquet", inside))
    assert one == rewardbench.read(tmp_path / "hub")
    for n, r in enumerate(made):
        (tmp_path / f"{n}.png").write_bytes(png(n))
        r["image"] = f"{n}.png"
    official = [{key: value for key, value in r.items() if key != "image"} | {"image_path": r["image"]} for r in made]
    for source in (jsonl(tmp_path / "rows.jsonl", made), jsonl(tmp_path / "data.jsonl", official).parent):
        for a, b in zip(one, rewardbench.read(source), strict=True):
            assert (a.id, a.query, a.responses, a.ranking, a.facts) == (b.id, b.query, b.responses, b.ranking, b.facts)
            assert a.image == b.image.read_bytes()
    assert one[0].facts == {"models": ["a", "b"], "judge": "people", "ground_truth": "1"}


def places(parts: dict[str, list[Pair]]) -> dict[str, set[tuple]]:
    return {name: {pair.key for pair in pairs} for name, pairs in parts.items()}


def test_no_image_and_no_id_is_in_two_splits():
    # 30 pictures in 120 rows: as PNG and as BMP, under two ids each, and some ids with two pictures.
    pairs = [
        Pair(f"RLHF-V-{n % 60}", f"q{n}", ("x", "y"), (0, 1), png(n % 30, "BMP" if n % 4 else "PNG"))
        for n in range(120)
    ]
    pairs += [Pair("RLHF-V-59", "no image", ("x", "y"), (0, 1))]
    parts = split(pairs, seed=1)
    assert sum(map(len, parts.values())) == 121
    homes = {}
    for name, members in parts.items():
        for pair in members:
            for mark in [pair.id] + ([Image.open(io.BytesIO(pair.image)).tobytes()] if pair.image else []):
                assert homes.setdefault(mark, name) == name
    assert {name: len(members) for name, members in parts.items()} == {"train": 97, "val": 12, "test": 12}


def test_split_depends_on_the_seed_only(shared: Path):
    pairs = rewardbench.read(shared / "vl_rewardbench" / "test_text_only.jsonl")
    parts = split(pairs)
    assert {name: len(members) for name, members in parts.items()} == {"train": 318, "val": 41, "test": 41}
    for members in (parts["val"], parts["test"]):
        assert Counter(pair.category for pair in members) == {"hallucination": 24, "reasoning": 11, "general": 6}
    shuffled = random.Random(3).sample(pairs, len(pairs))
    assert places(split(shuffled)) == places(parts)
    assert places(split(pairs, seed=43)) != places(parts)
    assert [pair.key for pair in parts["train"]] == [p.key for p in pairs if p.key in places(parts)["train"]]


def test_shares_are_kept_or_refused():
    pairs = [Pair(f"RLHF-V-{n}", "q", ("x", "y"), (0, 1)) for n in range(40)]
    parts = split(pairs, shares={"train": 0.5, "test": 0.5})
    assert {name: len(members) for name, members in parts.items()} == {"train": 20, "val": 0, "test": 20}
    for shares in ({"train": 0.5}, {"train": 1.5, "val": -0.5}, {"train": 0.5, "dev": 0.5}, {}):
        with pytest.raises(UserError, match="sum to 1"):
            split(pairs, shares=shares)
    with pytest.raises(UserError, match="3 pairs are too few for val, test"):
        split(pairs[:3])


def test_prepared_folder_is_training_data(tmp_path: Path):
    made = [row(n, image={"bytes": png(n // 2), "path": "x.png"}, query_source="COCO") for n in range(60)]
    made += [row(99), made[0] | {"response": made[0]["response"][::-1], "human_ranking": [0, 1]}]
    made += [made[2] | {"query": "Another?", "response": ["a", "b"]}]
    source = parquet(tmp_path / "hub" / "test-00000-of-00001.parquet", made)
    report = rewardbench.prepare(source.parent, tmp_path / "to", seed=5)
    assert sum(report.counts.values()) == 61
    assert report.left_out == {"without an image": 1, "repeating another row": 1}
    assert report.images == {"written": 30}
    found = {name: data.load("rewardbench", tmp_path / "to", name) for name in ("train", "val", "test")}
    assert {name: len(questions) for name, questions in found.items()} == report.counts
    everything = [q for questions in found.values() for q in questions]
    assert len({q.id for q in everything}) == 61
    by_id = {q.id: q for q in everything}
    assert (by_id["RLAIF-V-2"].question, by_id["RLAIF-V-2"].answer) == ("What is 2?", "It is not 2.")
    assert (by_id["RLAIF-V-2#2"].question, by_id["RLAIF-V-2#2"].answer) == ("Another?", "b")
    assert by_id["RLAIF-V-3"].answer == "It is 3."
    assert by_id["RLAIF-V-3"].choices == ()
    assert by_id["RLAIF-V-3"].tags == {"category": "hallucination"}
    assert np.array_equal(open_image(by_id["RLAIF-V-9"].image), Image.open(io.BytesIO(png(4))))
    pictures = {name: {q.image.read_bytes() for q in questions} for name, questions in found.items()}
    assert not pictures["train"] & pictures["val"] | pictures["train"] & pictures["test"]
    assert not pictures["val"] & pictures["test"]
    settings = json.loads((tmp_path / "to" / "split.json").read_text())
    assert settings["seed"] == 5
    assert {name: sum(counts.values()) for name, counts in settings["pairs"].items()} == report.counts
    again = rewardbench.read(tmp_path / "to" / "val.jsonl")
    assert again[0].facts == {"query_source": "COCO"}


def test_prepared_again_the_folder_is_the_same(tmp_path: Path):
    icons.write_preferences(tmp_path / "icons", n=30)
    rewardbench.prepare(tmp_path / "icons", tmp_path / "one")
    report = rewardbench.prepare(tmp_path / "icons" / "test.jsonl", tmp_path / "two")
    rewardbench.prepare(tmp_path / "icons", tmp_path / "one")
    assert report.images == {"linked": 30}
    for name in ("train.jsonl", "val.jsonl", "test.jsonl", "split.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    question = data.load("rewardbench", tmp_path / "one", "train")[0]
    asked = prompt(data.dataset("rewardbench").prompt)(question)
    assert asked.prompt == question.question
    assert asked.target == question.answer
    assert asked.candidates == ()


def test_the_mark_of_an_image_does_not_reach_the_prompt():
    pair = Pair("mmmu_1", "<image>\nSee <image 1> and <image>.", ("x", "y"), (0, 1), Path("x.png"))
    assert rewardbench.question(pair).question == "See <image 1> and ."


def test_odd_rows_are_told(tmp_path: Path):
    for change, told in (
        ({"response": ["only one"]}, "rows.jsonl:2: 'response' must be a list of two texts"),
        ({"human_ranking": [0, 0]}, r"rows.jsonl:2: the ranking must be \[0, 1\] .* not \[0, 0\]"),
        ({"query": None}, "rows.jsonl:2: 'query' must be text but is null"),
        ({"image": 7}, "rows.jsonl:2: 'image' must be a path or null"),
        ({"image": "gone.png"}, "rows.jsonl:2: its image is missing"),
    ):
        with pytest.raises(UserError, match=told):
            rewardbench.read(jsonl(tmp_path / "rows.jsonl", [row(1), row(2, **change)]))
    lacking = {("responses" if key == "response" else key): value for key, value in row(1).items()}
    with pytest.raises(UserError, match=r"rows.jsonl:1: 'response' is missing; rename 'responses'"):
        rewardbench.read(jsonl(tmp_path / "rows.jsonl", [lacking]))
    with pytest.raises(UserError, match="is no VL-RewardBench"):
        rewardbench.read(tmp_path / "nowhere")
    with pytest.raises(UserError, match="none of its 1 rows has an image"):
        rewardbench.prepare(jsonl(tmp_path / "rows.jsonl", [row(1)]), tmp_path / "to")
    (tmp_path / "bad.parquet").write_bytes(b"nothing")
    with pytest.raises(UserError, match="not readable as parquet"):
        rewardbench.read(tmp_path / "bad.parquet")
    damaged = [row(n, image={"bytes": png(n)[: 40 if n == 7 else None], "path": None}) for n in range(20)]
    with pytest.raises(UserError, match="the image of RLAIF-V-7 is damaged"):
        rewardbench.prepare(parquet(tmp_path / "damaged.parquet", damaged), tmp_path / "to")
    assert not (tmp_path / "to").exists()


@pytest.mark.hub
def test_the_hub_has_the_published_rows():
    pairs = rewardbench.read("hub")
    assert Counter(pair.category for pair in pairs) == {"hallucination": 749, "reasoning": 318, "general": 183}
    assert (len({pair.id for pair in pairs}), len({pair.key for pair in pairs})) == (1225, rewardbench.PUBLISHED)
