"""`blipfit shrink`: a smaller Q-Former from a larger one, and what it saves."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from blipfit import data
from blipfit.commands import resolve_arguments
from blipfit.commands.cost import format_gigaflops
from blipfit.compression import importance
from blipfit.compression.calibration import Calibration, sample_questions
from blipfit.compression.checkpoint_writer import checkpoint_folder, refuse_existing
from blipfit.compression.qformer_size import COMMAND_OPTIONS, Size, reduce_size, resize_config
from blipfit.compression.shrink import shrink, write_checkpoint
from blipfit.errors import UserError
from blipfit.model import cost, loading, shapes
from blipfit.model.backbone import Backbone
from blipfit.model.cost import Lengths
from blipfit.model.image_features import ImageFeatures
from blipfit.recipe import ModelConfig

LENGTHS = Lengths()


def run_dry(model: str, sizes: Mapping[str, int | None]) -> dict[str, Any]:
    """Sizes, parameters and FLOPs before and after, from the shapes alone; nothing is loaded or written.

    Raises UserError if the sizes cannot be reached from the model's.
    """
    before = shapes.on_meta(model)
    size = reduce_size(before.config, **sizes)
    after = shapes.from_config(resize_config(before.config, size))
    return {"model": model, "to": None, **compare(before, after)}


def compare(before: Any, after: Any) -> dict[str, Any]:
    """Sizes, parameters and FLOPs of two models."""
    models = {
        name: {
            "size": asdict(Size.from_config(model.config)),
            "parameters": cost.parameters(model),
            "flops": cost.flops(model.config, LENGTHS),
        }
        for name, model in (("before", before), ("after", after))
    }
    small, big = cost.qformer_parameters(after), cost.qformer_parameters(before)
    shares = {
        "qformer_parameters": small / big,
        "query_flops": models["after"]["flops"]["query"] / models["before"]["flops"]["query"],
        "all_parameters": sum(models["after"]["parameters"].values()) / sum(models["before"]["parameters"].values()),
    }
    return {"lengths": asdict(LENGTHS), **models, "shares": shares}


def run(
    model: str,
    sizes: Mapping[str, int | None],
    method: str,
    dataset: str | None,
    folder: Path | None,
    count: int,
    seed: int,
    to: Path,
    device: torch.device,
) -> dict[str, Any]:
    """Make the smaller checkpoint and write it to the folder `to`.

    Raises UserError if the folder exists, or if the model, the sizes, the method or the data set cannot be used.
    """
    if method not in importance.METHODS:
        raise UserError(f"unknown importance {method!r}; known: {', '.join(importance.METHODS)}")
    refuse_existing(to)
    size = reduce_size(shapes.on_meta(model).config, **sizes)
    part = ModelConfig(name=model)
    backbone = loading.load(part, device=device)
    questions = _questions(backbone, dataset, folder, count, seed) if dataset else None
    small, record = shrink(backbone, size, method, questions)  # type: ignore[arg-type]
    record |= {"dataset": dataset, "seed": seed}
    write_checkpoint(checkpoint_folder(part), to, small, record)
    details = {name: value for name, value in record.items() if name not in ("kept", "before", "after")}
    return {"model": model, "to": str(to), **compare(backbone.hf, small), **details}


def _questions(backbone: Backbone, dataset: str, folder: Path | None, count: int, seed: int) -> Calibration:
    source = resolve_arguments.data_folder(dataset, folder)
    sample = sample_questions(data.load(dataset, source, "train"), count, seed)
    return Calibration.from_questions(
        backbone, sample, data.get_data_set(dataset).prompt, ImageFeatures.from_backbone(backbone, "off")
    )


def render(record: Mapping[str, Any]) -> list[Any]:
    """The table of sizes, parameters and FLOPs, then what was written and what to do next."""
    before, after, shares = record["before"], record["after"], record["shares"]
    table = Table(title=f"{record['model']}, its Q-Former", title_justify="left")
    table.add_column("")
    for name in ("before", "after", "share"):
        table.add_column(name, justify="right")
    for name, value in before["size"].items():
        table.add_row(COMMAND_OPTIONS[name].removeprefix("--"), str(value), str(after["size"][name]), "")
    table.add_section()
    for name in ("query_tokens", "qformer", "projection"):
        _add_row(table, f"parameters, {name.replace('_', ' ')}", before["parameters"][name], after["parameters"][name])
    whole = [sum(side["parameters"].values()) for side in (before, after)]
    _add_row(table, "parameters, whole model", *whole)
    table.add_section()
    for stage in ("see", "query", "answer", "rank"):
        small, big = after["flops"][stage], before["flops"][stage]
        table.add_row(f"GFLOP, {stage}", format_gigaflops(big), format_gigaflops(small), f"{100 * small / big:.1f} %")
    lengths = record["lengths"]
    lines: list[Any] = [
        table,
        f"query tokens, Q-Former and projection keep {100 * shares['qformer_parameters']:.1f} % of their parameters "
        f"and {100 * shares['query_flops']:.1f} % of their FLOPs ({lengths['text']} text tokens, "
        f"{lengths['answer']} of the answer, {lengths['candidates']} candidates)",
    ]
    return lines + _notes(record)


def _add_row(table: Table, name: str, before: int, after: int) -> None:
    table.add_row(name, f"{before:,}", f"{after:,}", f"{100 * after / before:.1f} %")


def _notes(record: Mapping[str, Any]) -> list[str]:
    if record["to"] is None:
        return ["only planned: nothing was loaded or written"]
    lines = [f"importance by {record['importance']}"]
    if record["lost"] is None:
        lines.append("nothing was repaired, which needs questions (--on icons); train the model before use")
    else:
        lines[0] += f", measured and repaired on {record['questions']} questions of {record['dataset']}"
        lines.append(
            f"variance of the visual tokens that is lost, before training: {100 * record['lost']['after']:.1f} %"
        )
    lines.append(
        f"written: {record['to']}; recover its performance: `blipfit train icons recover --model {record['to']}`"
    )
    return lines
