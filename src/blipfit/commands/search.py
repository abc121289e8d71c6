"""`blipfit search`: the images of a folder that a text describes best."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blipfit import inference
from blipfit.data.images import open_image
from blipfit.report import pictures
from blipfit.run import replacing


def run(model: inference.Model, folder: Path, text: str, top: int, sheet: Path) -> dict[str, Any]:
    """The `top` best images, best first, and a contact sheet of them in the file `sheet`.

    Raises UserError if the folder has no images or one of them cannot be read.
    """
    matches = model.search(folder, text, top)
    images = [open_image(match.image) for match in matches]
    captions = [f"{number}. {match.image.name}\n{match.score:+.1f}" for number, match in enumerate(matches, start=1)]
    with replacing(sheet) as temporary:
        pictures.contact_sheet(images, captions).save(temporary, format="PNG")
    listed = [{"image": str(match.image), "score": match.score} for match in matches]
    return {"text": text, "folder": str(folder), "found": listed, "sheet": str(sheet)}


def render(record: Mapping[str, Any]) -> list[str]:
    """One line per image, then where the contact sheet is."""
    lines = [f"{n:>3}  {match['score']:+8.2f}  {match['image']}" for n, match in enumerate(record["found"], 1)]
    return [*lines, f"contact sheet: {record['sheet']}   (score: log-likelihood above that of a plain gray image)"]
