"""Own data in the formats that people bring: every format gives the same prepared folder."""

import base64
import csv
import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest

from blipfit.data import own
from blipfit.errors import UserError

REVISION = "0123456789" * 4
ANSWERS = ["2017-09-01", "NA", "007", "a red kite, “naïve”", "1.0", "null"]
"""Texts that readers of tables like to turn into dates, numbers and missing values."""


class Records(list[dict[str, str]]):
    """`image` (path relative to `folder`, named by content), `question` and `answer` of six entries."""

    folder: Path

    def bytes(self, record: dict[str, str]) -> bytes:
        return (self.folder / record["image"]).read_bytes()

    def hold_images(self, kind: str) -> list[dict[str, Any]]:
        """The records with their images as `bytes`, `base64`, `address`, or the dictionary of `datasets.Image`."""
        convert: dict[str, Callable[[bytes], Any]] = {
            "bytes": lambda data: data,
            "base64": lambda data: base64.b64encode(data).decode(),
            "address": lambda data: "data:image/png;base64," + base64.b64encode(data).decode(),
            "dictionary": lambda data: {"bytes": data, "path": "photo.png"},
        }
        return [{**record, "image": convert[kind](self.bytes(record))} for record in self]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Records:
    import numpy as np
    from PIL import Image

    result = Records()
    result.folder = tmp_path_factory.mktemp("source")
    (result.folder / "images").mkdir()
    for number, answer in enumerate(ANSWERS):
        values = np.random.default_rng(number).integers(0, 256, (12, 16, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(values).save(buffer, "PNG")
        name = f"images/{hashlib.sha256(buffer.getvalue()).hexdigest()[:32]}.png"
        (result.folder / name).write_bytes(buffer.getvalue())
        result.append({"image": name, "question": f'Which "day", {number}?', "answer": answer})
    return result


@pytest.fixture
def folder(records: Records, tmp_path: Path) -> Path:
    """A folder with the images, for tables with paths."""
    target = tmp_path / "set"
    (target / "images").mkdir(parents=True)
    for record in records:
        (target / record["image"]).write_bytes(records.bytes(record))
    return target


def write_json_lines(records: Records, folder: Path) -> Path:
    return _write(folder / "data.jsonl", "".join(json.dumps(record) + "\n" for record in records))


def write_json_lines_with_base64(records: Records, folder: Path) -> Path:
    lines = [json.dumps(record) + "\n" for record in records.hold_images("address")]
    return _write(folder / "data.jsonl", "".join(lines))


def write_json_list(records: Records, folder: Path) -> Path:
    renamed = [{"prompt": r["question"], "img": r["image"], "output": r["answer"], "split": 3} for r in records]
    return _write(folder / "data.json", json.dumps(renamed, indent=1))


def write_csv(records: Records, folder: Path) -> Path:
    return _write_csv(folder / "data.csv", ["image", "question", "answer"], records)


def write_tsv_with_base64(records: Records, folder: Path) -> Path:
    table = _write_csv(folder / "data.tsv", ["image", "question", "answer"], records.hold_images("base64"), "\t")
    return _write(table, "\ufeff" + table.read_text(encoding="utf-8"))


def write_parquet_with_bytes(records: Records, folder: Path) -> Path:
    datasets.Dataset.from_list(records.hold_images("bytes")).to_parquet(folder / "data.parquet")
    return folder / "data.parquet"


def write_image_folder(records: Records, folder: Path) -> Path:
    """An image folder with metadata.csv, whose column of the images is `file_name`."""
    renamed = [{"file_name": r["image"], "text": r["question"], "label": r["answer"]} for r in records]
    _write_csv(folder / "metadata.csv", ["file_name", "text", "label"], renamed)
    return folder


def write_saved_data_set(records: Records, folder: Path) -> Path:
    _with_image_feature(records).save_to_disk(folder / "saved")
    return folder / "saved"


def write_web_dataset(records: Records, folder: Path) -> Path:
    with tarfile.open(folder / "data.tar", "w") as tar:
        for number, record in enumerate(records):
            texts = {"question": record["question"], "answer": record["answer"]}
            for suffix, data in (("png", records.bytes(record)), ("json", json.dumps(texts).encode())):
                info = tarfile.TarInfo(f"{number:03}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return folder / "data.tar"


def write_llava(records: Records, folder: Path) -> Path:
    entries = []
    for record in records:
        question = {"from": "human", "value": f"<image>\n{record['question']}"}
        messages = [question, {"from": "gpt", "value": record["answer"]}]
        entries.append({"image": record["image"], "conversations": messages})
    return _write(folder / "llava.json", json.dumps(entries))


def write_messages(records: Records, folder: Path) -> Path:
    entries = []
    for record in records.hold_images("address"):
        image = {"type": "image_url", "image_url": {"url": record["image"]}}
        content = [image, {"type": "text", "text": record["question"]}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": record["answer"]}]
        entries.append({"messages": messages})
    return _write(folder / "messages.jsonl", "".join(json.dumps(entry) + "\n" for entry in entries))


def write_share_gpt(records: Records, folder: Path) -> Path:
    entries = []
    for record in records:
        messages = [{"role": "user", "content": f"<image>{record['question']}"}]
        messages.append({"role": "assistant", "content": record["answer"]})
        entries.append({"messages": messages, "images": [record["image"]]})
    return _write(folder / "share.json", json.dumps(entries))


def write_hub_cache(records: Records, folder: Path) -> str:
    """A data set of the hub in the local cache, which `hub_cache` makes the only one."""
    snapshot = folder / "hub" / "datasets--owner--name" / "snapshots" / REVISION
    (snapshot / "data").mkdir(parents=True)
    _with_image_feature(records).to_parquet(snapshot / "data" / "train-00000-of-00001.parquet")
    return f"hf://owner/name@{REVISION}"


def _with_image_feature(records: Records) -> datasets.Dataset:
    rows = datasets.Dataset.from_list(records.hold_images("dictionary"))
    return rows.cast_column("image", datasets.Image())


def _write(file: Path, text: str) -> Path:
    file.write_text(text, encoding="utf-8")
    return file


def _write_csv(file: Path, columns: list[str], records: list[dict[str, str]], delimiter: str = ",") -> Path:
    with file.open("w", encoding="utf-8", newline="") as opened:
        writer = csv.DictWriter(opened, columns, delimiter=delimiter)
        writer.writeheader()
        writer.writerows(records)
    return file


FORMATS: list[Callable[[Records, Path], Path | str]] = [
    write_json_lines_with_base64,
    write_json_list,
    write_csv,
    write_tsv_with_base64,
    write_parquet_with_bytes,
    write_image_folder,
    write_saved_data_set,
    write_web_dataset,
    write_llava,
    write_messages,
    write_share_gpt,
    write_hub_cache,
]


def read_tree(folder: Path) -> dict[str, bytes]:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "set" / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("write_source", FORMATS, ids=lambda function: function.__name__)
def test_every_format_gives_the_same_folder(write_source, records: Records, folder: Path, tmp_path: Path, hub_cache):
    expected = own.prepare(write_json_lines(records, folder), tmp_path / "expected")
    (folder / "data.jsonl").unlink()
    recognized: list[Any] = []
    report = own.prepare(write_source(records, folder), tmp_path / "out", announce=recognized.append)
    assert report.counts == expected.counts == {"train": 4, "val": 1, "test": 1}
    assert read_tree(tmp_path / "out") == read_tree(tmp_path / "expected")
    answers = [q.answer for split in ("train", "val", "test") for q in own.load(tmp_path / "out", split)]
    assert sorted(answers) == sorted(ANSWERS)
    if write_source is not write_json_lines_with_base64:
        assert recognized == [report.recognized]
        assert report.recognized["example"]["answer"] == ANSWERS[0]
    assert not list(tmp_path.glob(".out*"))


def prepare(source: Path | str, to: Path, **options: Any) -> tuple[Any, list[dict[str, Any]]]:
    """The report and all prepared lines, in the order of their ids."""
    report = own.prepare(source, to, **options)
    lines = [line for split in ("train", "val", "test") for line in (to / f"{split}.jsonl").read_text().splitlines()]
    return report, sorted((json.loads(line) for line in lines), key=lambda record: str(record["id"]))


def test_class_folders_become_answers(draw, tmp_path: Path):
    for name in ("kite", "owl"):
        for number in range(2):
            draw(tmp_path / "set" / name / f"{number}.png", number + 2 * (name == "owl"))
    report, lines = prepare(tmp_path / "set", tmp_path / "out")
    assert [(line["image"], line["answer"]) for line in lines] == [
        ("kite/0.png", "kite"),
        ("kite/1.png", "kite"),
        ("owl/0.png", "owl"),
        ("owl/1.png", "owl"),
    ]
    assert "data.prompt=caption-v1" in str(report)


def test_captions_need_no_question(records: Records, folder: Path, tmp_path: Path):
    rows = [{"file_name": r["image"], "text": r["answer"]} for r in records]
    _write_csv(folder / "metadata.csv", ["file_name", "text"], rows)
    report, lines = prepare(folder, tmp_path / "out")
    assert report.recognized["columns"] == {"image": "file_name", "answer": "text"}
    assert {line["question"] for line in lines} == {"A short image description:"}
    assert sorted(line["answer"] for line in lines) == sorted(ANSWERS)


def test_turns_become_questions_with_context(records: Records, folder: Path, tmp_path: Path):
    entries = []
    for number, record in enumerate(records):
        texts = ["<image>\nWho?", "A kite.", "Where?", "At sea."]
        messages = [{"from": "system", "value": "Be brief."}] if number == 0 else []
        messages += [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]
        entries.append({"id": f"k{number}", "image": record["image"], "conversations": messages})
    report, lines = prepare(_write(folder / "data.json", json.dumps(entries)), tmp_path / "out")
    assert [lines[0].get(key) for key in ("id", "question", "answer", "context")] == [
        "k0-1", "Who?", "A kite.", "Be brief.",
    ]  # fmt: skip
    assert lines[1]["context"] == "Be brief. Question: Who? Answer: A kite."
    assert [lines[3].get(key) for key in ("id", "question", "answer", "context")] == [
        "k1-2", "Where?", "At sea.", "Question: Who? Answer: A kite.",
    ]  # fmt: skip
    assert "context" not in lines[2]
    assert "6 conversations have several turns" in str(report)


def test_the_first_of_several_answers_is_kept(records: Records, folder: Path, tmp_path: Path):
    entries = [{**r, "answer": [{"answer": f"first {n}"}, {"answer": "second"}]} for n, r in enumerate(records)]
    rows = datasets.Dataset.from_list([{**e, "answers": e["answer"]} for e in entries]).remove_columns("answer")
    rows.to_parquet(folder / "data.parquet")
    report, lines = prepare(folder / "data.parquet", tmp_path / "out")
    assert [line["answer"] for line in lines] == [f"first {n}" for n in range(6)]
    assert "6 entries have several answers: the first is kept" in str(report)


@pytest.mark.parametrize(("answer", "index"), [("blue", 1), ("1", 1), ("7", 2)])
def test_choices_of_a_csv_file(records: Records, folder: Path, tmp_path: Path, answer: str, index: int):
    choices = json.dumps(["red", "blue", "7"])
    rows = [{"image": r["image"], "question": "Which?", "options": choices, "label": answer} for r in records]
    table = _write_csv(folder / "data.csv", ["image", "question", "options", "label"], rows)
    _, lines = prepare(table, tmp_path / "out")
    assert {(line["answer"], *line["choices"]) for line in lines} == {(index, "red", "blue", "7")}


def test_splits_are_kept_and_a_missing_one_is_halved(records: Records, folder: Path, tmp_path: Path):
    columns = ["image", "question", "answer"]
    _write_csv(folder / "train.csv", columns, records[:2])
    _write_csv(folder / "validation.csv", columns, records[2:])
    report, _ = prepare(folder, tmp_path / "out")
    assert report.counts == {"train": 2, "val": 2, "test": 2}
    assert "the source has no test: val is halved by its images" in str(report)
    assert {q.answer for q in own.load(tmp_path / "out", "train")} == set(ANSWERS[:2])
    _write_csv(folder / "test.csv", columns, records[4:])
    _write_csv(folder / "validation.csv", columns, records[2:4])
    report, _ = prepare(folder, tmp_path / "again")
    assert {q.answer for q in own.load(tmp_path / "again", "test")} == set(ANSWERS[4:])


def test_a_key_that_only_one_split_has_is_read(records: Records, folder: Path, tmp_path: Path):
    for split, part in (("train", records[:2]), ("val", records[2:4]), ("test", records[4:])):
        extra = {"hint": "By the sea."} if split == "val" else {}
        rows = [{"img": r["image"], "question": r["question"], "answer": r["answer"], **extra} for r in part]
        _write(folder / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    prepare(folder, tmp_path / "out")
    assert {q.context for q in own.load(tmp_path / "out", "val")} == {"By the sea."}
    assert {q.context for q in own.load(tmp_path / "out", "train")} == {""}


def test_columns_by_name(records: Records, folder: Path, tmp_path: Path):
    rows = [{"path": r["image"], "ask": r["question"], "label": "no", "note": r["answer"]} for r in records]
    table = _write(folder / "data.json", json.dumps(rows))
    report, lines = prepare(table, tmp_path / "out", columns="image=path, question=ask,answer=note")
    assert sorted(line["answer"] for line in lines) == sorted(ANSWERS)
    assert report.recognized["columns"] == {"image": "path", "question": "ask", "answer": "note"}
    assert report.recognized["ignored"] == ("label",)


@pytest.mark.parametrize(
    ("change", "columns", "sentence"),
    [
        ({"img": "a.png"}, None, "data.json: image and img can all hold the image; give the one to use with --columns "
         "image=image (columns: image, question, answer, img)"),
        ({"prompt": "?"}, None, "question and prompt can all hold the question"),
        ({"answer": None}, "answer=", "no column is recognized as answer (usual names: answer, answers, label"),
        ({}, "image=path", "data.json has no column 'path' for --columns image=path; columns: image, question, answer"),
        ({}, "imge=image", "--columns: unknown part 'imge'; did you mean 'image'?"),
        ({}, "image", "--columns: 'image' is no assignment; write image=NAME"),
        ({}, "image=image,image=x", "--columns: 'image=x' is given twice"),
        ({"image": "https://example.org/a.jpg"}, None, "entry 1: 'image' is an address (https://example.org/a.jpg)"),
        ({"image": "none.png"}, None, "entry 1: image"),
        ({"image": None}, None, "entry 1: 'image' is missing; expected a path, bytes or base64 text"),
        ({"image": ["a.png", "b.png"]}, None, "entry 1: 'image' holds 2 images, but a question has exactly one"),
        ({"image": "data:image/png;base64,AAAA"}, None, "entry 1: the image is damaged or not an image"),
        ({"image": "data:image/png;base64,!"}, None, "entry 1: 'image' is a data address with damaged base64 text"),
        ({"question": None}, None, "entry 1: 'question' is missing"),
        ({"answer": 1.5}, None, "entry 1: 'answer' must be text but is the number 1.5"),
        ({"options": ["a", "b"], "answer": "c"}, None, "entry 1: 'answer' is 'c', which is none of ['a', 'b']"),
        ({"options": ["a", "b"], "answer": ["a", "b"]}, None, "entry 1: 'answer' holds 2 answers, but only one choice"),
        ({"id": "6"}, None, "entry 6: 'id' 6 is already used"),
        ({"messages": [{"role": "user", "content": "?"}]}, None, "the conversation does not end with an answer"),
        ({"messages": [{"role": "assistant", "content": "?"}]}, None, "message 1 is from 'assistant', but one from"),
    ],
)  # fmt: skip
def test_errors(records: Records, folder: Path, tmp_path: Path, change: dict, columns: str | None, sentence: str):
    entries: list[dict[str, Any]] = [dict(record) for record in records]
    entries[0] |= change
    with pytest.raises(UserError) as error:
        own.prepare(_write(folder / "data.json", json.dumps(entries)), tmp_path / "out", columns=columns)
    assert sentence in str(error.value)
    assert str(tmp_path / "out") not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]


def test_bad_rows_are_left_out(records: Records, folder: Path, tmp_path: Path):
    entries = records.hold_images("bytes")
    entries[1]["image"], entries[3]["answer"] = b"no image", " "
    datasets.Dataset.from_list(entries).to_parquet(folder / "data.parquet")
    report, lines = prepare(folder / "data.parquet", tmp_path / "out", skip_bad=True)
    assert [line["id"] for line in lines] == ["1", "3", "5", "6"]
    assert [entry.partition("parquet: ")[2] for entry in sorted(report.bad)] == [
        "row 2: the image is damaged or not an image (expected JPEG, PNG, WEBP, GIF, BMP, TIFF, AVIF, JPEG2000 or "
        "PPM): download or copy the file again",
        "row 4: 'answer' is empty",
    ]


def test_an_image_outside_the_table_s_folder_is_refused(records: Records, folder: Path, tmp_path: Path):
    (tmp_path / "list").mkdir()
    rows = [{**record, "image": f"../set/{record['image']}"} for record in records]
    table = _write_csv(tmp_path / "list" / "data.csv", ["image", "question", "answer"], rows)
    with pytest.raises(UserError, match=r"data\.csv: row 1: .*is outside the data folder .*--allow-outside"):
        own.prepare(table, tmp_path / "out")
    report = own.prepare(table, tmp_path / "out", allow_outside=True)
    assert report.images == {"copied from outside the data folder": 6}


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("data.csv", b"image,question,answer\na.png,?,x,y\n", r"data\.csv cannot be read \(a row has more values"),
        ("data.csv", b"image,question,answer\na,?,x\nb,?,x,y\n", r"data\.csv cannot be read \(.*line 3, saw 4"),
        ("data.csv", "image,größe\n".encode("latin-1"), r"data\.csv:1: no names of columns can be read"),
        ("data.csv", b"image,image\n", r"data\.csv:1: a column name occurs twice"),
        ("data.csv", b"", r"data\.csv:1: the first line has no names of columns"),
        ("data.parquet", b"PAR1 no parquet", r"data\.parquet cannot be read"),
        ("data.tar", b"no tar", r"data\.tar cannot be read"),
        ("data.json", b"[1]", r"data\.json: entry 1: expected an object"),
    ],
)
def test_a_damaged_table_is_an_error(tmp_path: Path, name: str, content: bytes, sentence: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        own.prepare(tmp_path / name, tmp_path / "out")


def test_a_pickle_in_an_archive_is_refused(records: Records, folder: Path, tmp_path: Path):
    archive = write_web_dataset(records, folder)
    with tarfile.open(archive, "a") as tar:
        tar.addfile(tarfile.TarInfo("005.PTH"))
    with pytest.raises(UserError, match=r"data\.tar holds a pickle \(005\.PTH\)"):
        own.prepare(archive, tmp_path / "out")


def test_a_script_in_a_folder_does_not_run(folder: Path, tmp_path: Path):
    _write(folder / "set.py", f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UserError, match=r"is not a data set: .*scripts are no longer supported"):
        own.prepare(folder, tmp_path / "out")
    assert not (tmp_path / "ran").exists()


def test_an_address_of_the_hub_needs_a_revision(tmp_path: Path):
    with pytest.raises(UserError, match="write hf://owner/name@revision"):
        own.prepare("hf://owner/name", tmp_path / "out")


def test_a_data_set_of_the_hub_names_no_other_files(records: Records, folder: Path, tmp_path: Path, hub_cache):
    snapshot = folder / "hub" / "datasets--owner--name" / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    (snapshot / "near.png").symlink_to(folder / records[0]["image"])
    rows = [{**record, "image": "near.png"} for record in records]
    rows[1]["image"] = f"../../../../{records[1]['image']}"
    _write_csv(snapshot / "data.csv", ["image", "question", "answer"], rows)
    with pytest.raises(UserError, match=r"data\.csv: row 2: image .*is outside the downloaded folder"):
        own.prepare(f"hf://owner/name@{REVISION}", tmp_path / "out")


def test_a_configuration_of_a_data_set_of_the_hub(records: Records, folder: Path, tmp_path: Path, hub_cache):
    snapshot = folder / "hub" / "datasets--owner--name" / "snapshots" / REVISION
    for name, rows in (("small", records[:3]), ("large", records)):
        (snapshot / name).mkdir(parents=True)
        _write_csv(snapshot / name / "data.csv", ["image", "question", "answer"], rows)
    for record in records:
        for name in ("small", "large"):
            (snapshot / name / "images").mkdir(exist_ok=True)
            (snapshot / name / record["image"]).write_bytes(records.bytes(record))
    configs = [{"config_name": name, "data_files": f"{name}/data.csv"} for name in ("small", "large")]
    _write(snapshot / "README.md", f"---\n{json.dumps({'configs': configs})}\n---\n")
    with pytest.raises(UserError, match=r"several configurations; give hf://owner/name@\w+#CONFIG .*small.*large"):
        own.prepare(f"hf://owner/name@{REVISION}", tmp_path / "out")
    report, _ = prepare(f"hf://owner/name@{REVISION}#large", tmp_path / "out")
    assert sum(report.counts.values()) == 6


def test_an_incomplete_download_is_not_used(records: Records, folder: Path, tmp_path: Path, hub_cache):
    address = write_hub_cache(records, folder)
    (file,) = folder.rglob("train-00000-of-00001.parquet")
    file.rename(file.with_name("train-00000-of-00002.parquet"))
    with pytest.raises(UserError, match=r"^offline: `owner/name` is not in the local cache"):
        own.prepare(address, tmp_path / "out")


def test_a_missing_connection_is_one_sentence(tmp_path: Path, hub_cache):
    with pytest.raises(UserError, match=r"^offline: `owner/other` is not in the local cache \(") as error:
        own.prepare(f"hf://owner/other@{REVISION}", tmp_path / "out")
    assert "\n" not in str(error.value)


def test_the_command_prints_what_it_recognized(records: Records, folder: Path, tmp_path: Path, capsys):
    from blipfit import cli

    table = write_image_folder(records, folder)
    cli.app(["prepare", "own", "--from", str(table), "--to", str(tmp_path / "out"), "--json"], standalone_mode=False)
    out, err = capsys.readouterr()
    assert "format csv; columns: image=file_name, question=text, answer=label\n" in err
    assert f"  image: {records[0]['image']}\n" in err
    assert json.loads(out)["recognized"]["columns"]["question"] == "text"
