"""`blipfit ask`, `caption` and `search`: one model, a few pictures, answers as records."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from blipfit import inference as use
from blipfit import run
from blipfit.data.images import open_image
from blipfit.report import pictures, terminal


def loaded(model: str | None, adapter: Path | None, device: str | None) -> use.Model:
    """The model that a command line means; what a search stores is announced on stderr."""
    screen = terminal.console(stderr=True)
    return use.load(model, adapter, device=device, announce=lambda text: screen.print(text, soft_wrap=True))


def ask(
    model: use.Model, image: Path, question: str, choices: Sequence[str], prompt: str | None, decoding: str
) -> dict[str, Any]:
    """Answer in words, or by the likeliest of the choices."""
    record: dict[str, Any] = {"image": str(image), "question": question}
    if choices:
        ranked = model.rank(image, question, choices, prompt=prompt)
        listed = [
            {"choice": one.choice, "log_likelihood": one.log_likelihood, "probability": one.probability}
            for one in ranked
        ]
        return record | {"answer": ranked[0].choice, "choices": listed}
    return record | {"answer": model.ask(image, question, prompt=prompt, decoding=decoding), "decoding": decoding}


def answered(record: Mapping[str, Any]) -> list[str]:
    """The answer; with choices, all of them with their shares."""
    if "choices" not in record:
        return [record["answer"]]
    return [f"{100 * one['probability']:5.1f} %  {one['choice']}" for one in record["choices"]]


def caption(model: use.Model, images: Sequence[Path], decoding: str) -> list[dict[str, str]]:
    """A sentence for every picture."""
    texts = model.captions(images, decoding)
    return [{"image": str(image), "caption": text} for image, text in zip(images, texts, strict=True)]


def search(model: use.Model, folder: Path, text: str, top: int, sheet: Path) -> dict[str, Any]:
    """The likeliest pictures, best first, and a contact sheet of them at `sheet`."""
    found = model.search(folder, text, top)
    sides = [open_image(one.image) for one in found]
    captions = [f"{number}. {one.image.name}\n{one.score:+.1f}" for number, one in enumerate(found, start=1)]
    with run.replacing(sheet) as temporary:
        pictures.contact_sheet(sides, captions).save(temporary, format="PNG")
    listed = [{"image": str(one.image), "score": one.score} for one in found]
    return {"text": text, "folder": str(folder), "found": listed, "sheet": str(sheet)}


def results(record: Mapping[str, Any]) -> list[str]:
    """A line a picture, then where the sheet is."""
    lines = [f"{number:>3}  {one['score']:+8.2f}  {one['image']}" for number, one in enumerate(record["found"], 1)]
    return [*lines, f"contact sheet: {record['sheet']}   (score: log-likelihood above that of an even gray picture)"]
