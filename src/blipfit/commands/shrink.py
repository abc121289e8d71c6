"""`blipfit shrink`: a smaller Q-Former from a bigger one, planned or made, and what it saves."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from blipfit import data
from blipfit.commands import arguments as experiments
from blipfit.commands import cost as costs
from blipfit.compression import calibration, importance, rewrite, shrink
from blipfit.compression import size as shrink_size
from blipfit.compression.calibration import Calibration
from blipfit.errors import UserError
from blipfit.model import cost, loading, shapes
from blipfit.model.backbone import Backbone
from blipfit.model.cost import Lengths
from blipfit.model.image_features import ImageFeatures
from blipfit.recipe import ModelConfig

LENGTHS = Lengths()


def plan(model: str, sizes: Mapping[str, int | None]) -> dict[str, Any]:
    """Before and after by shapes alone: nothing is loaded."""
    before = shapes.on_meta(model)
    size = shrink_size.wanted(before.config, **sizes)
    after = shapes.of_config(shrink_size.configured(before.config, size))
    return {"model": model, "to": None, **compared(before, after)}


def compared(before: Any, after: Any) -> dict[str, Any]:
    """Sizes, parameters and FLOPs of two models."""
    found = {
        name: {
            "size": asdict(shrink_size.of(model.config)),
            "parameters": cost.parameters(model),
            "flops": cost.flops(model.config, LENGTHS),
        }
        for name, model in (("before", before), ("after", after))
    }
    small, big = cost.qformer_parameters(after), cost.qformer_parameters(before)
    shares = {
        "qformer_parameters": small / big,
        "query_flops": found["after"]["flops"]["query"] / found["before"]["flops"]["query"],
        "all_parameters": sum(found["after"]["parameters"].values()) / sum(found["before"]["parameters"].values()),
    }
    return {"lengths": asdict(LENGTHS), **found, "shares": shares}


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
    """Make the smaller checkpoint and write it to a folder."""
    if method not in importance.METHODS:
        raise UserError(f"unknown importance {method!r}; known: {', '.join(importance.METHODS)}")
    rewrite.refuse_existing(to)
    size = shrink_size.wanted(shapes.on_meta(model).config, **sizes)
    part = ModelConfig(name=model)
    backbone = loading.load(part, device=device)
    questions = _questions(backbone, dataset, folder, count, seed) if dataset else None
    small, record = shrink.shrink(backbone, size, method, questions)  # type: ignore[arg-type]
    record |= {"dataset": dataset, "seed": seed}
    shrink.write(rewrite.source_folder(part), to, small, record)
    made = {name: value for name, value in record.items() if name not in ("kept", "before", "after")}
    return {"model": model, "to": str(to), **compared(backbone.hf, small), **made}


def _questions(backbone: Backbone, dataset: str, folder: Path | None, count: int, seed: int) -> Calibration:
    source = experiments.data_folder(dataset, folder)
    drawn = calibration.draw(data.load(dataset, source, "train"), count, seed)
    return calibration.prepare(
        backbone, drawn, data.dataset(dataset).prompt, ImageFeatures.from_backbone(backbone, "off")
    )


def shown(record: Mapping[str, Any]) -> list[Any]:
    """What `shrink` prints."""
    before, after, shares = record["before"], record["after"], record["shares"]
    table = Table(title=f"{record['model']}, its Q-Former", title_justify="left")
    table.add_column("")
    for name in ("before", "after", "share"):
        table.add_column(name, justify="right")
    for name, value in before["size"].items():
        table.add_row(shrink_size.OPTIONS[name].removeprefix("--"), str(value), str(after["size"][name]), "")
    table.add_section()
    for name in ("query_tokens", "qformer", "projection"):
        _row(table, f"parameters, {name.replace('_', ' ')}", before["parameters"][name], after["parameters"][name])
    whole = [sum(side["parameters"].values()) for side in (before, after)]
    _row(table, "parameters, whole model", *whole)
    table.add_section()
    for stage in ("see", "query", "answer", "rank"):
        small, big = after["flops"][stage], before["flops"][stage]
        table.add_row(f"GFLOP, {stage}", costs.gigaflops(big), costs.gigaflops(small), f"{100 * small / big:.1f} %")
    lengths = record["lengths"]
    lines: list[Any] = [
        table,
        f"query tokens, Q-Former and projection keep {100 * shares['qformer_parameters']:.1f} % of their parameters "
        f"and {100 * shares['query_flops']:.1f} % of their FLOPs ({lengths['text']} text tokens, "
        f"{lengths['answer']} of the answer, {lengths['candidates']} candidates)",
    ]
    return lines + _ending(record)


def _row(table: Table, name: str, before: int, after: int) -> None:
    table.add_row(name, f"{before:,}", f"{after:,}", f"{100 * after / before:.1f} %")


def _ending(record: Mapping[str, Any]) -> list[str]:
    if record["to"] is None:
        return ["only planned: nothing was loaded or written"]
    lines = [f"importance by {record['importance']}"]
    if record["lost"] is None:
        lines.append("nothing was repaired: that needs questions (--on icons); train it before use")
    else:
        lines[0] += f", measured and repaired on {record['questions']} questions of {record['dataset']}"
        lines.append(
            f"variance of the visual tokens that is lost, before training: {100 * record['lost']['after']:.1f} %"
        )
    lines.append(f"written: {record['to']}; let it recover: `blipfit train icons recover --model {record['to']}`")
    return lines
