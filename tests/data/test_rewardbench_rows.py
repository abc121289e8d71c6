"""VL-RewardBench: rows from JSONL and parquet, categories, keys, and splits that share no image."""

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
from blipfit.data.prompts import get_prompt
from blipfit.data.rewardbench import Pair, find_category, split_pairs
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


def write_jsonl(file: Path, rows: list[dict]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return file


def write_parquet(file: Path, rows: list[dict]) -> Path:
    """Write a parquet file with all columns of the hub."""
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
    pairs = rewardbench.read_pairs(shared / "vl_rewardbench" / "test_text_only.jsonl")
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
    assert find_category(row_id) == expected


def test_only_rows_with_equal_id_query_and_responses_are_duplicates():
    same = Pair("a", "q", ("x", "y"), (0, 1))
    swapped = Pair("a", "q", ("y", "x"), (1, 0))
    other = Pair("a", "q", ("x", "z"), (0, 1))
    assert rewardbench.drop_duplicates([same, other, swapped]) == [same, other]


def test_parquet_with_images_and_jsonl_with_paths_give_the_same(tmp_path: Path):
    rows = [row(n, models=["a", "b"], judge="people", ground_truth=f"{n}") for n in range(1, 4)]
    with_images = [r | {"image": {"bytes": png(n), "path": None}} for n, r in enumerate(rows)]
    expected = rewardbench.read_pairs(
        write_parquet(tmp_path / "hub" / "data" / "test-00000-of-00001.parquet", with_images)
    )
    assert expected == rewardbench.read_pairs(tmp_path / "hub")
    for n, r in enumerate(rows):
        (tmp_path / f"{n}.png").write_bytes(png(n))
        r["image"] = f"{n}.png"
    official = [{key: value for key, value in r.items() if key != "image"} | {"image_path": r["image"]} for r in rows]
    for source in (write_jsonl(tmp_path / "rows.jsonl", rows), write_jsonl(tmp_path / "data.jsonl", official).parent):
        for a, b in zip(expected, rewardbench.read_pairs(source), strict=True):
            assert (a.id, a.query, a.responses, a.ranking, a.extra_fields) == (
                b.id,
                b.query,
                b.responses,
                b.ranking,
                b.extra_fields,
            )
            assert a.image == b.image.read_bytes()
    assert expected[0].extra_fields == {"models": ["a", "b"], "judge": "people", "ground_truth": "1"}


def split_keys(parts: dict[str, list[Pair]]) -> dict[str, set[tuple]]:
    return {name: {pair.key for pair in pairs} for name, pairs in parts.items()}


def test_no_image_and_no_id_is_in_two_splits():
    # 30 images in 120 rows: as PNG and BMP, with two ids each, and some ids with two images.
    pairs = [
        Pair(f"RLHF-V-{n % 60}", f"q{n}", ("x", "y"), (0, 1), png(n % 30, "BMP" if n % 4 else "PNG"))
        for n in range(120)
    ]
    pairs += [Pair("RLHF-V-59", "no image", ("x", "y"), (0, 1))]
    parts = split_pairs(pairs, seed=1)
    assert sum(map(len, parts.values())) == 121
    split_names = {}
    for name, members in parts.items():
        for pair in members:
            for mark in [pair.id] + ([Image.open(io.BytesIO(pair.image)).tobytes()] if pair.image else []):
                assert split_names.setdefault(mark, name) == name
    assert {name: len(members) for name, members in parts.items()} == {"train": 97, "val": 12, "test": 12}


def test_split_depends_on_the_seed_only(shared: Path):
    pairs = rewardbench.read_pairs(shared / "vl_rewardbench" / "test_text_only.jsonl")
    parts = split_pairs(pairs)
    assert {name: len(members) for name, members in parts.items()} == {"train": 318, "val": 41, "test": 41}
    for members in (parts["val"], parts["test"]):
        assert Counter(pair.category for pair in members) == {"hallucination": 24, "reasoning": 11, "general": 6}
    shuffled = random.Random(3).sample(pairs, len(pairs))
    assert split_keys(split_pairs(shuffled)) == split_keys(parts)
    assert split_keys(split_pairs(pairs, seed=43)) != split_keys(parts)
    assert [pair.key for pair in parts["train"]] == [p.key for p in pairs if p.key in split_keys(parts)["train"]]


def test_invalid_shares_are_an_error():
    pairs = [Pair(f"RLHF-V-{n}", "q", ("x", "y"), (0, 1)) for n in range(40)]
    parts = split_pairs(pairs, shares={"train": 0.5, "test": 0.5})
    assert {name: len(members) for name, members in parts.items()} == {"train": 20, "val": 0, "test": 20}
    for shares in ({"train": 0.5}, {"train": 1.5, "val": -0.5}, {"train": 0.5, "dev": 0.5}, {}):
        with pytest.raises(UserError, match="sum to 1"):
            split_pairs(pairs, shares=shares)
    with pytest.raises(UserError, match="3 pairs are too few for val, test"):
        split_pairs(pairs[:3])


def test_prepared_folder_is_training_data(tmp_path: Path):
    rows = [row(n, image={"bytes": png(n // 2), "path": "x.png"}, query_source="COCO") for n in range(60)]
    rows += [row(99), rows[0] | {"response": rows[0]["response"][::-1], "human_ranking": [0, 1]}]
    rows += [rows[2] | {"query": "Another?", "response": ["a", "b"]}]
    source = write_parquet(tmp_path / "hub" / "test-00000-of-00001.parquet", rows)
    report = rewardbench.prepare(source.parent, tmp_path / "to", seed=5)
    assert sum(report.counts.values()) == 61
    assert report.left_out == {"without an image": 1, "repeating another row": 1}
    assert report.images == {"written": 30}
    splits = {name: data.load("rewardbench", tmp_path / "to", name) for name in ("train", "val", "test")}
    assert {name: len(members) for name, members in splits.items()} == report.counts
    questions = [q for members in splits.values() for q in members]
    assert len({q.id for q in questions}) == 61
    by_id = {q.id: q for q in questions}
    assert (by_id["RLAIF-V-2"].question, by_id["RLAIF-V-2"].answer) == ("What is 2?", "It is not 2.")
    assert (by_id["RLAIF-V-2#2"].question, by_id["RLAIF-V-2#2"].answer) == ("Another?", "b")
    assert by_id["RLAIF-V-3"].answer == "It is 3."
    assert by_id["RLAIF-V-3"].choices == ()
    assert by_id["RLAIF-V-3"].tags == {"category": "hallucination"}
    assert np.array_equal(open_image(by_id["RLAIF-V-9"].image), Image.open(io.BytesIO(png(4))))
    image_bytes = {name: {q.image.read_bytes() for q in members} for name, members in splits.items()}
    assert not image_bytes["train"] & image_bytes["val"] | image_bytes["train"] & image_bytes["test"]
    assert not image_bytes["val"] & image_bytes["test"]
    settings = json.loads((tmp_path / "to" / "split.json").read_text())
    assert settings["seed"] == 5
    assert {name: sum(counts.values()) for name, counts in settings["pairs"].items()} == report.counts
    pairs = rewardbench.read_pairs(tmp_path / "to" / "val.jsonl")
    assert pairs[0].extra_fields == {"query_source": "COCO"}


def test_pairs_without_a_clear_answer_are_counted(tmp_path: Path):
    rows = [row(number) for number in range(30)]
    rows[3] |= {"query": "<image>\n "}
    rows[5] |= {"response": ["same", "same"]}
    for number, entry in enumerate(rows):
        (tmp_path / f"{number}.png").write_bytes(png(number))
        entry["image"] = f"{number}.png"
    report = rewardbench.prepare(write_jsonl(tmp_path / "test.jsonl", rows), tmp_path / "out")
    assert f"note: 1 pairs with an empty query, first {rows[3]['id']}" in str(report)
    assert f"note: 1 pairs with two equal responses, first {rows[5]['id']}" in str(report)


def test_preparing_again_gives_the_same_folder(tmp_path: Path):
    icons.write_preferences(tmp_path / "icons", n=30)
    rewardbench.prepare(tmp_path / "icons", tmp_path / "one")
    report = rewardbench.prepare(tmp_path / "icons" / "test.jsonl", tmp_path / "two")
    rewardbench.prepare(tmp_path / "icons", tmp_path / "one")
    assert report.images == {"linked": 30}
    for name in ("train.jsonl", "val.jsonl", "test.jsonl", "split.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    question = data.load("rewardbench", tmp_path / "one", "train")[0]
    texts = get_prompt(data.get_data_set("rewardbench").prompt)(question)
    assert texts.prompt == question.question
    assert texts.target == question.answer
    assert texts.candidates == ()


def test_the_image_placeholder_is_removed_from_the_query():
    pair = Pair("mmmu_1", "<image>\nSee <image 1> and <image>.", ("x", "y"), (0, 1), Path("x.png"))
    assert rewardbench.to_question(pair).question == "See <image 1> and ."


def test_an_invalid_row_is_an_error_that_names_the_line(tmp_path: Path):
    for change, message in (
        ({"response": ["only one"]}, "rows.jsonl:2: 'response' must be a list of two texts"),
        ({"human_ranking": [0, 0]}, r"rows.jsonl:2: the ranking must be \[0, 1\] .* not \[0, 0\]"),
        ({"query": None}, "rows.jsonl:2: 'query' must be text but is null"),
        ({"image": 7}, "rows.jsonl:2: 'image' must be a path or null"),
        ({"image": "gone.png"}, "rows.jsonl:2: its image is missing"),
    ):
        with pytest.raises(UserError, match=message):
            rewardbench.read_pairs(write_jsonl(tmp_path / "rows.jsonl", [row(1), row(2, **change)]))
    renamed = {("responses" if key == "response" else key): value for key, value in row(1).items()}
    with pytest.raises(UserError, match=r"rows.jsonl:1: 'response' is missing; rename 'responses'"):
        rewardbench.read_pairs(write_jsonl(tmp_path / "rows.jsonl", [renamed]))
    with pytest.raises(UserError, match="is not VL-RewardBench"):
        rewardbench.read_pairs(tmp_path / "nowhere")
    with pytest.raises(UserError, match="none of its 1 rows has an image"):
        rewardbench.prepare(write_jsonl(tmp_path / "rows.jsonl", [row(1)]), tmp_path / "to")
    (tmp_path / "bad.parquet").write_bytes(b"nothing")
    with pytest.raises(UserError, match="not readable as parquet"):
        rewardbench.read_pairs(tmp_path / "bad.parquet")
    damaged = [row(n, image={"bytes": png(n)[: 40 if n == 7 else None], "path": None}) for n in range(20)]
    with pytest.raises(UserError, match="the image of RLAIF-V-7 is damaged"):
        rewardbench.prepare(write_parquet(tmp_path / "damaged.parquet", damaged), tmp_path / "to")
    assert not (tmp_path / "to").exists()


@pytest.mark.hub
def test_the_hub_has_the_published_rows():
    pairs = rewardbench.read_pairs("hub")
    assert Counter(pair.category for pair in pairs) == {"hallucination": 749, "reasoning": 318, "general": 183}
    assert (len({pair.id for pair in pairs}), len({pair.key for pair in pairs})) == (1225, rewardbench.PUBLISHED)
