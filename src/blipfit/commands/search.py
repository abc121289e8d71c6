"""`blipfit search`: the images of a folder that a text describes best."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blipfit import inference
from blipfit.adapters.open_model import warning_fields
from blipfit.data.images import open_image
from blipfit.errors import UserError
from blipfit.report import image_sheet, terminal
from blipfit.run_folder import replacing


def run(model: inference.Model, folder: Path, text: str, top: int, sheet: Path) -> dict[str, Any]:
    """The `top` best images, best first, and a contact sheet of them in the file `sheet`.

    An image that cannot be read is left out and named on stderr and in the record. Raises UserError if the folder has
    no images that can be read.
    """
    left_out: list[dict[str, str]] = []
    matches = model.search(folder, text, top, skip=lambda file, error: leave_out(left_out, file, error))
    images = [image_sheet.shrink(open_image(match.image)) for match in matches]
    names = terminal.distinct_names([match.image for match in matches])
    scores = [match.score for match in matches]
    captions = [f"{n}. {name}\n{score:+.1f}" for n, (name, score) in enumerate(zip(names, scores, strict=True), 1)]
    with replacing(sheet) as temporary:
        image_sheet.contact_sheet(images, captions).save(temporary, format="PNG")
    listed = [{"image": str(match.image), "score": match.score} for match in matches]
    record = {"text": text, "folder": str(folder), "found": listed, "left_out": left_out, "sheet": str(sheet)}
    return record | warning_fields(model.warnings)


def leave_out(left_out: list[dict[str, str]], file: Path, error: UserError) -> None:
    """Name an image that is left out on stderr, and append it to the record's list."""
    terminal.console(stderr=True).print(f"left out: {error}", soft_wrap=True)
    left_out.append({"image": str(file), "reason": str(error)})


def render(record: Mapping[str, Any]) -> list[str]:
    """One line per image, then where the contact sheet is."""
    lines = [f"{n:>3}  {match['score']:+8.2f}  {match['image']}" for n, match in enumerate(record["found"], 1)]
    return [*lines, f"contact sheet: {record['sheet']}   (score: log-likelihood above that of a plain gray image)"]
