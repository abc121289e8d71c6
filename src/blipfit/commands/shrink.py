"""`blipfit shrink`: a smaller Q-Former from a larger one, and what it saves."""

import shlex
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
from blipfit.compression.checkpoint_writer import checkpoint_folder, refuse_existing, require_space
from blipfit.compression.qformer_size import COMMAND_OPTIONS, Size, reduce_size, resize_config
from blipfit.compression.shrink import shrink, write_checkpoint
from blipfit.errors import UserError
from blipfit.file_writes import remove_leftovers
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
    to: Path | None,
    device: torch.device,
) -> dict[str, Any]:
    """Make the smaller checkpoint and write it to the folder `to`.

    Raises UserError if `to` is missing or exists, or if the model, sizes, method or data set cannot be used.
    """
    if to is None:
        raise UserError("say where to write the smaller checkpoint: --to DIR; or only plan it with --dry-run")
    if method not in importance.METHODS:
        raise UserError(f"unknown importance {method!r}; known: {', '.join(importance.METHODS)}")
    refuse_existing(to)
    original = shapes.on_meta(model)
    size = reduce_size(original.config, **sizes)
    part = ModelConfig(name=model)
    _require_space(part, to, compare(original, shapes.from_config(resize_config(original.config, size))))
    backbone = loading.load(part, device=device)
    questions = _questions(backbone, dataset, folder, count, seed) if dataset else None
    small, record = shrink(backbone, size, method, questions)  # type: ignore[arg-type]
    record |= {"dataset": dataset, "seed": seed}
    write_checkpoint(checkpoint_folder(part), to, small, record)
    details = {name: value for name, value in record.items() if name not in ("kept", "before", "after")}
    data_folder = None if folder is None else str(folder)
    return {"model": model, "to": str(to), "data": data_folder, **compare(backbone.hf, small), **details}


def _require_space(model: ModelConfig, to: Path, comparison: Mapping[str, Any]) -> None:
    """Raise UserError if the disk has too little room; a model that is not downloaded yet is not measured."""
    remove_leftovers(to.parent, to.name)
    source = Path(loading.locate_checkpoint(model)[0])
    if source.is_dir():
        before, after = comparison["before"]["parameters"], comparison["after"]["parameters"]
        replaced = ("query_tokens", "qformer", "projection")
        share = 1 - sum(before[name] for name in replaced) / sum(before.values())
        require_space(source, to, share, 4 * sum(after[name] for name in replaced))  # fp32


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
    training = f"blipfit train {record['dataset'] or 'icons'} recover --model {shlex.quote(record['to'])}"
    if record["data"] is not None:
        training += f" --data {shlex.quote(record['data'])}"
    lines.append(f"written: {record['to']}; recover its performance: `{training}`")
    return lines
