"""A smaller Q-Former that inherits the bigger one's weights, as an ordinary checkpoint folder."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from blipfit.compression import importance, rewrite, selection
from blipfit.compression import size as shrink_size
from blipfit.compression.calibration import Calibration
from blipfit.compression.importance import Method, Scores
from blipfit.compression.repair import repair
from blipfit.compression.size import Size
from blipfit.errors import UserError
from blipfit.grid import SHRINK_RECORD
from blipfit.model.backbone import Backbone

_OURS = ("query_tokens", "qformer.", "language_projection.")


def shrink(
    backbone: Backbone, size: Size, method: Method, questions: Calibration | None, mend: bool = True
) -> tuple[Any, dict[str, Any]]:
    """A model with a Q-Former of this size, and the record of how it was made.

    The model shares its other parts with the backbone's. Without `questions` only `magnitude` can be measured and
    nothing is repaired.
    """
    if questions is None and method != "magnitude":
        raise UserError(f"importance by {method} is measured on questions; say of which data set: --on icons")
    return keep(backbone, size, importance.measure(backbone, method, questions), questions if mend else None, method)


def keep(
    backbone: Backbone, size: Size, scores: Scores, questions: Calibration | None, told: str
) -> tuple[Any, dict[str, Any]]:
    """As `shrink`, with scores of any origin; `questions`: what the repair is fitted to, None for no repair."""
    chosen = selection.choose(backbone.hf, size, scores)
    small = selection.cut(backbone.hf, chosen)
    lost = repair(backbone, small, chosen, questions) if questions is not None else None
    queries = small.query_tokens[0]
    if len(queries) > 1 and bool((queries == queries[0]).all()):
        raise AssertionError("all query tokens are identical")
    record = {
        "from": _origin(backbone.name),
        "before": asdict(shrink_size.of(backbone.hf.config)),
        "after": asdict(size),
        "importance": told,
        "questions": len(questions) if questions is not None else 0,
        "lost": lost,
        "kept": chosen.record,
    }
    return small, record


def _origin(name: str) -> str:
    """The original's name, a folder's with its whole path: the record is read from elsewhere too."""
    folder = Path(name).expanduser()
    return str(folder.resolve()) if (folder / rewrite.CONFIG).is_file() else name


def backbone_of(original: Backbone, small: Any) -> Backbone:
    """The smaller model with the original's tokenizers, ready for use."""
    return Backbone(small, original.text, original.family, original.name, original.autocast_dtype)


def write(source: Path, to: Path, small: Any, record: dict[str, Any]) -> None:
    """Write a folder in Hugging Face format: the source's, with the smaller Q-Former in it."""
    size = shrink_size.of(small.config)

    def configure(config: dict[str, Any]) -> None:
        config["num_query_tokens"] = size.queries
        config.setdefault("qformer_config", {}).update(shrink_size.qformer_fields(size))

    def process(config: dict[str, Any]) -> None:
        if "num_query_tokens" in config:
            config["num_query_tokens"] = size.queries

    edits = {rewrite.CONFIG: configure, "processor_config.json": process, "preprocessor_config.json": process}
    rewrite.rewrite(source, to, tensors(small), lambda name: name.startswith(_OURS), edits, {SHRINK_RECORD: record})


def tensors(small: Any) -> dict[str, Tensor]:
    """What differs from the original's checkpoint, by the checkpoint's names."""
    return {name: tensor for name, tensor in small.state_dict().items() if name.startswith(_OURS)}
