"""docs/inputs.md is true: a real input raises every message that it quotes, and its lists and limits are the code's."""

import io
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import blipfit
from blipfit import grid, inference, recipe_parsing
from blipfit import recipe as recipes
from blipfit.adapters import open_model, peft_format
from blipfit.adapters.bank import Bank
from blipfit.data import batches, iconqa, images, mme, own, prompts, rewardbench, scienceqa
from blipfit.errors import UserError
from blipfit.model import loading, tiny
from blipfit.recipe import AdapterConfig, ModelConfig, TrainingConfig
from blipfit.runtime import distributed

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "inputs.md").read_text(encoding="utf-8")
VALID_RECIPE = grid.recipe("icons", 28, "tiny").to_yaml()
WEIGHTS = "model/model.safetensors"
LINE = {"image": "a.png", "question": "Which?", "choices": ["red", "blue"], "answer": 0}
PROBLEM = {"question": "Q?", "choices": ["a", "b"], "answer": 0, "hint": "", "lecture": "", "image": "image.png"}
ICON = {"question": "Q?", "choices": ["a", "b"], "answer": 0, "ques_type": "choose_txt", "split": "train"}
ROW = {"id": "RLHF-1", "query": "Q?", "response": ["x", "y"], "human_ranking": [0, 1], "image": "a.png"}


@pytest.fixture(scope="module")
def model() -> inference.Model:
    return blipfit.load("tiny-t5", device="cpu")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with an image `a.png`, so that messages have short paths."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8), "red").save("a.png")
    return tmp_path


def refused_messages() -> Iterator[tuple[str, str]]:
    """(case, message) of every row of the page's tables whose last column is `message`."""
    is_table_of_messages = False
    for line in PAGE.split("\n"):
        cells = [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if not cells:
            is_table_of_messages = False
        elif cells[-1] == "message":
            is_table_of_messages = True
        elif is_table_of_messages and not set(cells[-1]) <= set("-: "):
            yield re.sub("`", "", cells[0]), re.sub("^`+ ?| ?`+$", "", cells[-1])


def write(name: str, data: bytes | str) -> Path:
    """Write a file in the working folder."""
    file = Path(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data)
    return file


def open_image(name: str, data: bytes | str) -> None:
    images.open_image(write(name, data))


def open_pixels(name: str, mode: str) -> None:
    Image.new(mode, (2, 2)).save(name)
    images.open_image(Path(name))


def open_huge() -> None:
    header = b"P5 20000 10000 255\n"
    open_image("scan.png", header)


def read_own(*lines: Any, name: str = "data.jsonl") -> None:
    """Read lines of own data; what is not bytes or text is written as JSON."""
    texts = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    own.read_questions(write(name, b"\n".join(texts)))


def prepare_own(image: str) -> None:
    own.prepare(write("set/data.jsonl", json.dumps({**LINE, "image": image})), Path("out"))


def prepare_csv(text: str) -> None:
    own.prepare(write("data.csv", text), Path("out"))


def prepare_link() -> None:
    Path("set").mkdir()
    Path("set/link.png").symlink_to("../a.png")
    prepare_own("link.png")


def prepare_three_lines_of_one_image() -> None:
    lines = "\n".join(json.dumps(LINE) for _ in range(3))
    own.prepare(write("data.jsonl", lines), Path("out"))


def prepare_scienceqa(splits: dict[str, list[str]] | None = None, **changes: Any) -> None:
    write("sqa/problems.json", json.dumps({"1": {**PROBLEM, **changes}, "2": PROBLEM}))
    write("sqa/pid_splits.json", json.dumps(splits or {"train": ["1"], "val": ["2"], "test": []}))
    for split in ("train", "val", "test"):
        for pid in ("1", "2"):
            Path(f"sqa/images/{split}/{pid}").mkdir(parents=True)
            shutil.copy("a.png", f"sqa/images/{split}/{pid}/image.png")
    scienceqa.prepare("sqa", Path("out"))


def load_iconqa(*ids: str) -> None:
    """Load a prepared folder with problems of these ids."""
    entries = [{**ICON, "id": number} for number in ids]
    write("out/annotations/train.json", json.dumps(entries))
    for number in ids:
        Path(f"out/train/choose_txt/{number}").mkdir(parents=True, exist_ok=True)
        shutil.copy("a.png", f"out/train/choose_txt/{number}/image.png")
    iconqa.load(Path("out"), "train")


def read_mme(*lines: str) -> None:
    write("mme/count.txt", "".join(f"{line}\n" for line in lines))
    Path("mme/count").mkdir()
    shutil.copy("a.png", "mme/count/a.png")
    shutil.copy("a.png", "mme/count/b.png")
    mme.read_questions(Path("mme"))


def read_pairs(**changes: Any) -> None:
    rewardbench.read_pairs(write("test.jsonl", json.dumps({**ROW, **changes})))


def override(assignment: str) -> None:
    grid.recipe("icons", 28, "tiny").override([assignment])


def load_model(change: Callable[[Path], object]) -> None:
    """Load a copy of a miniature after a change in its folder."""
    shutil.copytree(tiny.folder("t5"), "model")
    change(Path("model"))
    loading.load(ModelConfig(name="./model"))


def set_config(path: str, value: Any) -> Callable[[Path], object]:
    def change(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        *sections, key = path.split(".")
        section = config
        for name in sections:
            section = section[name]
        section[key] = value
        (model / "config.json").write_text(json.dumps(config))

    return change


def spoil(file: str, name: str) -> None:
    """Set a value of a tensor to NaN."""
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    tensors = load_file(file)
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, file, header)


def load_adapter(
    model: inference.Model, change: Callable[[Path], object] = lambda folder: None, base: str | None = None
) -> None:
    """Read an adapter of tiny-t5 after a change in its folder, for the model `base`."""
    adapter = AdapterConfig(qformer=("ffn",), rank=2)
    bank = Bank(model.backbone, [adapter], [0])
    state = {name: tensor + 0.01 for name, tensor in bank.state(0).items()}
    bank.remove()
    peft_format.save(Path("adapter"), adapter, state, peft_format.BaseModel.of(model.backbone))
    change(Path("adapter"))
    open_model.locate_adapter(Path("adapter"), None if base is None else ModelConfig(name=base))


def read_unfinished_run() -> None:
    write("run/recipe.yaml", VALID_RECIPE)
    open_model.locate_model("run")


FTYP = b"\0\0\0\x18ftyp"
CASES: dict[str, Callable[[], object]] = {
    "HEIC photograph": partial(open_image, "photo.jpg", FTYP + b"heic"),
    "video": partial(open_image, "clip.mp4", FTYP + b"isom"),
    "SVG": partial(open_image, "logo.svg", "<svg xmlns='http://www.w3.org/2000/svg'/>"),
    "PDF": partial(open_image, "scan.pdf", "%PDF-1.7\n"),
    "Git LFS pointer": partial(open_image, "photo.jpg", "version https://git-lfs.github.com/spec/v1\n"),
    "web page": partial(open_image, "photo.jpg", "<!DOCTYPE html><html></html>"),
    "empty file, file of /proc": partial(open_image, "photo.jpg", b""),
    "anything else": partial(open_image, "photo.jpg", b"hello"),
    "too many pixels": open_huge,
    "32-bit pixels": partial(open_pixels, "depth.tiff", "I"),
    "no file": lambda: images.open_image(Path("photo.jpg")),
    "device": lambda: images.open_image(Path("/dev/zero")),
    "UTF-16": partial(read_own, json.dumps(LINE).encode("utf-16")),
    "Latin-1": partial(read_own, LINE, '{"question": "Größe?"}'.encode("latin-1")),
    "JSON list": partial(read_own, [LINE, LINE]),
    "half a character": partial(read_own, {**LINE, "question": "\ud83d"}),
    "deep nesting": partial(read_own, b'{"id": ' + b"[" * 100_000),
    "unknown key": partial(read_own, {**LINE, "contxt": ""}),
    "own: index out of range": partial(read_own, {**LINE, "answer": 2}),
    "own: more than 26 choices": partial(read_own, {**LINE, "choices": list(map(str, range(27)))}),
    "own: fewer than 3 images": prepare_three_lines_of_one_image,
    "own: two columns fit": partial(prepare_csv, "image,question,prompt,answer\na.png,?,?,x\n"),
    "own: no column fits": partial(prepare_csv, "image,question,reply\na.png,?,x\n"),
    "own: long row of a CSV file": partial(prepare_csv, "image,question,answer\na.png,?,x,y\n"),
    "own: no revision": lambda: own.prepare("hf://owner/name", Path("out")),
    "ScienceQA: a problem twice": partial(prepare_scienceqa, {"train": ["1"], "val": ["1"], "test": []}),
    "IconQA: an id twice": partial(load_iconqa, "7", "7"),
    "MME: pairs": partial(read_mme, "a.png\tQ?\tYes", "b.png\tQ?\tNo"),
    "VL-RewardBench: ranking": partial(read_pairs, human_ranking=[1, 2]),
    "image outside the source": partial(prepare_own, "../a.png"),
    "link to the outside": prepare_link,
    "web address": partial(read_own, {**LINE, "image": "https://example.org/a.jpg"}),
    "missing image": partial(read_own, {**LINE, "image": "photos\\a.png"}),
    "unknown key of a recipe": lambda: recipes.load(write("my.yaml", VALID_RECIPE + "trainng: {}\n")),
    "--set: unknown key": partial(override, "training.max_epoch=3"),
    "--set: wrong type": partial(override, "training.max_epochs=many"),
    "experiment": partial(override, "experiment=../x"),
    "name of no model": lambda: loading.locate_checkpoint(ModelConfig(name="instructblip")),
    "pickle": partial(load_model, lambda model: (model / "model.safetensors").rename(model / "pytorch_model.bin")),
    "model: Git LFS pointer": partial(
        load_model, lambda model: (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    ),
    "another kind of model": partial(load_model, set_config("model_type", "blip-2")),
    "kernel of the hub": partial(load_model, set_config("_attn_implementation", "owner/kernel")),
    "weights of other shapes": partial(load_model, set_config("num_query_tokens", 5)),
    "NaN in a weight": partial(
        load_model, lambda model: spoil("model/model.safetensors", "language_projection.weight")
    ),
    "float array, channels first": lambda: inference.open_source(np.zeros((3, 8, 8))),
    "another type as image": lambda: inference.open_source(["a.png", "b.png"]),  # type: ignore[arg-type]
    "unfinished run": read_unfinished_run,
    "unknown device": lambda: distributed.select_device("gpu"),
    "unknown precision": lambda: loading.low_precision_dtype("half", torch.device("cpu")),
}
MODEL_CASES: dict[str, Callable[[inference.Model], object]] = {
    "question that is no text": lambda model: model.ask("a.png", None),  # type: ignore[arg-type]
    "choices as one text": lambda model: model.rank("a.png", "Which?", "red"),
    "very long text": lambda model: model.ask("a.png", "word " * 20_000),
    "not an adapter": lambda model: open_model.locate_adapter(Path("empty")),
    "NaN in an adapter": lambda model: load_adapter(
        model, lambda folder: spoil("adapter/trained.safetensors", "query_tokens")
    ),
    "damaged adapter": lambda model: load_adapter(
        model, lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\0" * 9)
    ),
    "adapter of another family": lambda model: load_adapter(model, base="tiny-vicuna"),
}


def test_every_message_on_the_page_has_a_case():
    names = [case for case, _ in refused_messages()]
    assert sorted(names) == sorted([*CASES, *MODEL_CASES])


@pytest.mark.parametrize(("case", "message"), [*refused_messages()])
def test_the_message_is_the_one_on_the_page(folder: Path, model: inference.Model, case: str, message: str):
    with pytest.raises(UserError) as error:
        CASES[case]() if case in CASES else MODEL_CASES[case](model)
    assert re.fullmatch(".+".join(map(re.escape, message.split("…"))), str(error.value)), str(error.value)
    assert case != "float array, channels first" or _is_refused_too(np.zeros((3, 8, 8), np.uint8), message)


def _is_refused_too(array: np.ndarray, message: str) -> bool:
    with pytest.raises(UserError, match=re.escape(message.rstrip("…"))):
        inference.open_source(array)
    return True


def format_rows() -> dict[str, list[str]]:
    """The page's table of image formats: name → cells."""
    table = PAGE.partition("| format |")[2].partition("\n\n")[0].split("\n")[2:]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]
    return {cells[0].split(",")[0]: cells[1:] for cells in rows}


def encode(image: Image.Image, image_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def test_the_formats_are_those_of_the_code():
    assert tuple(format_rows()) == images.FORMATS


@pytest.mark.parametrize(("image_format", "cells"), format_rows().items())
def test_the_table_of_formats_is_true(image_format: str, cells: list[str]):
    several, turned = cells
    red, blue = Image.new("RGB", (8, 4), "red"), Image.new("RGB", (8, 4), "blue")
    if several != "–" and image_format != "PPM":  # Pillow writes no PPM file with several images
        data = encode(red, "MPO" if image_format == "JPEG" else image_format, save_all=True, append_images=[blue])
        assert max(np.abs(np.subtract(images.decode_image(data, "x").getpixel((0, 0)), (255, 0, 0)))) < 9
    if turned != "–":
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 6
        assert (
            images.decode_image(encode(red, image_format, exif=exif), "x").size == {"yes": (4, 8), "no": (8, 4)}[turned]
        )


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB", "I;16"])
def test_these_colors_are_accepted(mode: str):
    assert images.decode_image(encode(Image.new(mode, (8, 8)), "TIFF"), "x").mode == "RGB"


def test_the_limits_are_those_of_the_code():
    for limit in (
        f"to {images.MAX_PIXELS:,} pixels",
        f"at most {images.MAX_FILE_BYTES // 2**30} GiB per file",
        f"numbers of at most {sys.get_int_max_str_digits()} digits",
        f"at most {len(prompts.LETTERS)} choices",
        f"the last {TrainingConfig().max_text_tokens} tokens of a prompt",
        f"the first {TrainingConfig().max_target_tokens} of an answer",
        f"{batches.MAX_TOKENS} tokens",
        f"at most {recipe_parsing.MAX_BYTES:,} characters",
    ):
        assert limit in " ".join(PAGE.split()), limit


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_a_byte_order_mark_and_windows_line_ends_change_nothing(folder: Path, start: bytes, end: bytes):
    (question,) = own.read_questions(write("data.jsonl", start + end + json.dumps(LINE).encode() + end))
    assert (question.question, question.answer) == ("Which?", "red")
    load_iconqa("7")
    entries = write("out/annotations/train.json", start + Path("out/annotations/train.json").read_bytes() + end)
    assert len(iconqa.load(Path("out"), "train")) == 1, entries
    write("mme/count.txt", start + end.join([b"a.png\tQ?\tYes", b"a.png\tR?\tNo", b""]))
    Path("mme/count").mkdir()
    shutil.copy("a.png", "mme/count/a.png")
    assert [(q.question, q.answer) for q in mme.read_questions(Path("mme"))] == [("Q?", "Yes"), ("R?", "No")]


def test_links_inside_the_source_and_allowed_images_from_outside_are_taken(folder: Path):
    for color in ("red", "green", "blue", "white"):
        Path("set").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), color).save(f"set/{color}.png")
    Path("set/link.png").symlink_to("red.png")
    lines = [{**LINE, "image": name} for name in ("link.png", "../set/green.png", str(folder / "set/blue.png"))]
    file = write("set/data.jsonl", "\n".join(map(json.dumps, lines)))
    own.prepare(file, Path("out"))
    assert len([*Path("out").rglob("*.png")]) == 3
    write("set/data.jsonl", "\n".join(map(json.dumps, [*lines, {**LINE, "image": "../a.png"}])))
    report = own.prepare(file, Path("all"), allow_outside=True)
    assert report.images["copied from outside the data folder"] == 1
    (copy,) = Path("all/images").iterdir()
    assert copy.stat().st_nlink == 1


def test_iterables_are_taken_for_images_and_choices(folder: Path, model: inference.Model):
    assert len(model.captions(iter(["a.png", Path("a.png"), Path("a.png").read_bytes()]))) == 3
    choices = ["star", "circle"]
    assert model.rank("a.png", "Which?", iter(choices)) == model.rank("a.png", "Which?", choices)


def test_the_page_is_linked():
    assert all("(inputs.md)" in (DOCS / name).read_text(encoding="utf-8") for name in ("data.md", "use.md"))
