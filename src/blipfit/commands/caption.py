"""`blipfit caption`: one sentence per image."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from blipfit import inference
from blipfit.adapters.open_model import warning_fields
from blipfit.commands.search import leave_out
from blipfit.data.images import open_image, resize
from blipfit.errors import UserError


def run(model: inference.Model, images: Sequence[Path], decoding: str) -> list[dict[str, Any]]:
    """Describe every image; a folder stands for the images in it.

    An image that cannot be read is left out: it is named on stderr, and its record has `reason` and no caption. Raises
    UserError if no image can be read or the decoding is unknown.
    """
    files = [file for image in images for file in (inference.find_images(image) if image.is_dir() else [image])]
    opened: dict[Path, Image.Image] = {}
    left_out: list[dict[str, str]] = []
    errors: list[UserError | None] = []
    for file in files:
        try:
            opened[file] = resize(open_image(file), model.backbone.image_size)
            errors.append(None)
        except UserError as error:
            errors.append(error)
    usable = inference.select_usable(files, errors, lambda file, error: leave_out(left_out, file, error))
    texts = dict(zip(usable, model.captions([opened[file] for file in usable], decoding), strict=True))
    reasons = {Path(entry["image"]): entry["reason"] for entry in left_out}
    records = []
    for file in files:
        reason = {"reason": reasons[file]} if file in reasons else {}
        records.append({"image": str(file), "caption": texts.get(file), **reason, **warning_fields(model.warnings)})
    return records


def render(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line per image."""
    return [f"{record['image']}: {record['caption']}" for record in records if record["caption"] is not None]
