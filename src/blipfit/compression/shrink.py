"""Make a smaller Q-Former that inherits the weights of the original, and write it as an ordinary checkpoint folder."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from blipfit.compression.calibration import Calibration
from blipfit.compression.checkpoint_writer import CONFIG_FILE, rewrite_checkpoint
from blipfit.compression.importance import Method, Scores, measure
from blipfit.compression.qformer_size import Size
from blipfit.compression.repair import repair
from blipfit.compression.selection import cut_model, select_parts
from blipfit.errors import UserError
from blipfit.grid import SHRINK_RECORD
from blipfit.model.backbone import Backbone

_REPLACED_TENSORS = ("query_tokens", "qformer.", "language_projection.")
"""Prefixes of the names of the tensors that shrinking replaces in a checkpoint."""


def shrink(
    backbone: Backbone, size: Size, method: Method, questions: Calibration | None, with_repair: bool = True
) -> tuple[Any, dict[str, Any]]:
    """Return a model with a Q-Former of this size, and a record of how it was made.

    `method`: how importance is measured. Without `questions` only `magnitude` works, and nothing is repaired. The model
    shares its other modules with the backbone's model. Raises UserError if the method needs questions.
    """
    if questions is None and method != "magnitude":
        raise UserError(f"importance by {method} is measured on questions; name their data set, for example --on icons")
    scores = measure(backbone, method, questions)
    return shrink_by_scores(backbone, size, scores, questions if with_repair else None, method)


def shrink_by_scores(
    backbone: Backbone, size: Size, scores: Scores, questions: Calibration | None, scores_name: str
) -> tuple[Any, dict[str, Any]]:
    """Like `shrink`, with scores of any origin; the repair is fitted to `questions`, None means no repair.

    `scores_name`: how the record names the origin of the scores.
    """
    selection = select_parts(backbone.hf, size, scores)
    small = cut_model(backbone.hf, selection)
    lost_variance = repair(backbone, small, selection, questions) if questions is not None else None
    queries = small.query_tokens[0]
    if len(queries) > 1 and bool((queries == queries[0]).all()):
        raise AssertionError("all query tokens are identical")
    record = {
        "from": _resolve_folder(backbone.name),
        "before": asdict(Size.from_config(backbone.hf.config)),
        "after": asdict(size),
        "importance": scores_name,
        "questions": len(questions) if questions is not None else 0,
        "lost": lost_variance,
        "kept": selection.record,
    }
    return small, record


def _resolve_folder(name: str) -> str:
    """Return a folder's absolute path, so that the record holds in any working directory; else the name itself."""
    folder = Path(name).expanduser()
    return str(folder.resolve()) if (folder / CONFIG_FILE).is_file() else name


def make_backbone(original: Backbone, small: Any) -> Backbone:
    """Return a backbone of the smaller model with the original's tokenizers and settings."""
    return Backbone(small, original.text, original.family, original.name, original.autocast_dtype)


def write_checkpoint(source: Path, target: Path, small: Any, record: dict[str, Any]) -> None:
    """Write a folder in Hugging Face format: a copy of `source` with the smaller Q-Former in it.

    Raises UserError if `target` exists already or if `source` lacks weight files.
    """
    size = Size.from_config(small.config)

    def edit_model_config(config: dict[str, Any]) -> None:
        config["num_query_tokens"] = size.queries
        config.setdefault("qformer_config", {}).update(size.qformer_fields)

    def edit_processor_config(config: dict[str, Any]) -> None:
        if "num_query_tokens" in config:
            config["num_query_tokens"] = size.queries

    edits = {
        CONFIG_FILE: edit_model_config,
        "processor_config.json": edit_processor_config,
        "preprocessor_config.json": edit_processor_config,
    }
    rewrite_checkpoint(
        source,
        target,
        replaced=lambda name: name.startswith(_REPLACED_TENSORS),
        tensors=qformer_tensors(small),
        edits=edits,
        new_files={SHRINK_RECORD: record},
    )


def qformer_tensors(small: Any) -> dict[str, Tensor]:
    """Return the tensors that differ from the original's checkpoint, by their names in the checkpoint."""
    return {name: tensor for name, tensor in small.state_dict().items() if name.startswith(_REPLACED_TENSORS)}
