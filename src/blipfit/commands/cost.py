"""`blipfit cost`: parameters, FLOPs and bytes of a model, a recipe or a finished run."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from blipfit import grid
from blipfit import recipe as recipes
from blipfit.adapters import open_model, parameter_counts, placement
from blipfit.data.feature_store import format_bytes
from blipfit.errors import UserError
from blipfit.model import cost, latency, shapes
from blipfit.model.cost import Lengths
from blipfit.recipe import ModelConfig, Recipe
from blipfit.run_folder import Run


def run(
    subject: str, experiment: str | None, model: str | None, lengths: Lengths, device: torch.device | None = None
) -> dict[str, Any]:
    """Cost of a model's name or folder, a run folder, a recipe file, or an experiment of a data set's grid.

    `model`: for a data set or a run folder, the model instead of the recipe's. With a `device` the weights are loaded
    and one answer is measured there; without, shapes are enough. Raises UserError if the subject does not exist or, for
    a run folder, is not finished or does not belong to the model.
    """
    recipe, run = _resolve(subject, experiment, model)
    source = None
    if run and recipe and (device or model or recipe.model.name not in shapes.PUBLISHED):
        source = open_model.locate_adapter(run.folder, None if model is None else ModelConfig(name=model))
    name = source.model.name if source else recipe.model.name if recipe else grid.model_name("t5", model or subject)
    hf = shapes.on_meta(name)
    trained = parameter_counts.trained_parameters(hf, shapes.family(name), recipe.adapter) if recipe else {}
    stored = _stored_parameters(run) if run else trained if recipe else parameter_counts.all_parameters(hf)
    record: dict[str, Any] = {
        "what": str(run.folder) if run else recipe.title if recipe else subject,
        "model": name,
        "parameters": {
            part: {"total": total, "trained": trained.get(part, 0), "stored": stored.get(part, 0)}
            for part, total in parameter_counts.all_parameters(hf).items()
        },
        "trained_parameters": sum(trained.values()),
        "total_parameters": sum(parameter_counts.all_parameters(hf).values()),
        "stored_parameters": sum(stored.values()),
        "lengths": asdict(lengths),
        "flops": cost.flops(hf.config, lengths),
        "weight_bytes": cost.loaded_bytes(hf),
        "adapter_bytes": _folder_bytes(run.adapter) if run else None,
        "measured": None,
    }
    if source:
        record |= open_model.warning_fields(source.warnings)
    if device is not None:
        source = source or open_model.locate_model(recipe.model if recipe else name)
        model_with_adapter = open_model.load(source, device, recipe.training.precision if recipe else None)
        weights = cost.weight_bytes(model_with_adapter.backbone.hf)
        with model_with_adapter.adapter() as backbone:
            record["measured"] = {"weight_bytes": weights, **latency.measure(backbone, lengths)}
    return record


def _resolve(subject: str, experiment: str | None, model: str | None) -> tuple[Recipe | None, Run | None]:
    """The recipe and the run that the arguments stand for; neither for a model."""
    run = Run(Path(subject))
    if experiment is not None:
        return grid.recipe(subject, experiment, model), None
    if subject.endswith((".yaml", ".yml")):
        return recipes.load(Path(subject)), None
    if run.recipe_file.exists():
        if run.state() != "finished":
            raise UserError(f"{subject} is not finished; run the same `blipfit train` again to continue it")
        return run.recipe(), run
    if subject in grid.trainable():
        raise UserError(f"say which experiment: `blipfit cost {subject} 15`; `blipfit grid` lists them")
    return None, None


def _stored_parameters(run: Run) -> dict[str, int]:
    """Values in a run's adapter folder, by component."""
    counts: dict[str, int] = {}
    for name, tensor in open_model.read_adapter(run).state.items():
        part = placement.component_of(name)
        counts[part] = counts.get(part, 0) + tensor.numel()
    return counts


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


_STAGES = {
    "see": "see: one image",
    "query": "query: one question",
    "answer": "answer: a known answer, as in training",
    "rank": "rank: all candidates",
    "generate": "generate: as many tokens",
}


def render(record: Mapping[str, Any]) -> list[Any]:
    """Tables of parameters and FLOPs, then bytes and times."""
    lines = [f"{record['what']}" + (f" on {record['model']}" if record["model"] != record["what"] else "")]
    lines += [f"warning: {warning}" for warning in record.get("warnings", ())]
    return [*lines, parameter_table(record), flop_table(record), *_notes(record)]


def parameter_table(record: Mapping[str, Any]) -> Table:
    """Total, trained and stored parameters by component."""
    table = Table(title="parameters", title_justify="left")
    table.add_column("component")
    for name in ("total", "trained", "stored"):
        table.add_column(name, justify="right")
    for part, counts in record["parameters"].items():
        table.add_row(part, *(f"{counts[name]:,}" for name in ("total", "trained", "stored")))
    sums = [f"{record[f'{name}_parameters']:,}" for name in ("total", "trained", "stored")]
    table.add_row("sum", *sums, style="bold")
    return table


def flop_table(record: Mapping[str, Any]) -> Table:
    """GFLOP of every stage's forward pass."""
    lengths = record["lengths"]
    table = Table(
        title=f"forward, {lengths['text']} text tokens, {lengths['answer']} of the answer, "
        f"{lengths['candidates']} candidates",
        title_justify="left",
    )
    table.add_column("stage")
    table.add_column("GFLOP", justify="right")
    for stage, number in record["flops"].items():
        table.add_row(_STAGES[stage], format_gigaflops(number))
    return table


def format_gigaflops(number: float) -> str:
    """FLOP as GFLOP with three significant digits: `20.1`."""
    return f"{number / 1e9:,.0f}" if number >= 1e11 else f"{number / 1e9:.3g}"


def _notes(record: Mapping[str, Any]) -> list[str]:
    weights = record["weight_bytes"]
    lines = [
        f"weights: {format_bytes(weights['fp32'])} in fp32, "
        f"{format_bytes(weights['16-bit'])} with frozen parts in 16 bit",
    ]
    if record["adapter_bytes"] is not None:
        lines.append(f"adapter on disk: {format_bytes(record['adapter_bytes'])}")
    measured = record["measured"]
    if measured is not None:
        answer = measured["answer_s"]
        stages = ", ".join(f"{name} {1000 * times['median']:.1f}" for name, times in measured["stages_s"].items())
        lines.append(
            f"one answer on {measured['device']}: median {1000 * answer['median']:.1f} ms, 95 % within "
            f"{1000 * answer['p95']:.1f} ms ({stages})"
        )
        types = ", ".join(f"{name} {format_bytes(number)}" for name, number in measured["weight_bytes"].items())
        lines.append(f"weights as loaded: {types}")
        if measured["peak_bytes"] is not None:
            kind = "allocated by torch" if measured["device"].startswith("cuda") else "resident, the whole process"
            lines.append(f"peak memory: {format_bytes(measured['peak_bytes'])} ({kind})")
    return lines
