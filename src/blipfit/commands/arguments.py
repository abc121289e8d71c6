"""Experiments before and after they run: which are meant, what they are, how they ended."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from blipfit import data, grid, methods
from blipfit import recipe as recipes
from blipfit.adapters import count, placement
from blipfit.errors import UserError
from blipfit.evaluation.evaluate import evaluate
from blipfit.model import shapes
from blipfit.recipe import Recipe
from blipfit.report import terminal
from blipfit.run import Run


def chosen(dataset: str, ids: Sequence[str], model: str | None, assignments: Sequence[str]) -> list[Recipe]:
    """The recipes that a command line means: experiments of the grid, or a recipe file."""
    if dataset.endswith((".yaml", ".yml")):
        if ids:
            raise UserError(f"{dataset} is a recipe file and names one experiment; leave the ids out")
        recipe = recipes.load(Path(dataset))
        if model is not None:
            name = grid.model_name(shapes.family(recipe.model.name), model)
            recipe = recipe.override([f"model.name={name}", "model.revision=null"])
        return [recipe.override(assignments)]
    if not ids:
        raise UserError(f"say which experiments: `blipfit train {dataset} 15`; `blipfit grid` lists them")
    return [grid.recipe(dataset, experiment, model).override(assignments) for experiment in ids]


def data_folder(dataset: str, folder: Path | None) -> Path:
    """The data folder meant; the world of icons is drawn where its default folder is not there yet."""
    target = folder or Path("data") / dataset
    if dataset == "icons" and folder is None and not target.exists():
        data.prepare("icons", target)
    return target


def prepare(
    dataset: str,
    source: str | None,
    to: Path | None,
    questions: int | None = None,
    skills: str | None = None,
    seed: int | None = None,
) -> Any:
    """Write a prepared folder and return its report; `icons` is drawn, and `mme` and `rewardbench` can be.

    Only of what is drawn: `questions` to train on (MME: pictures a subtask; VL-RewardBench: pairs), and the seed. Only
    of `icons`: `skills`, `held-out`, `taught`, `every` or names.
    """
    target = to or Path("data") / dataset
    data.dataset(dataset)  # a mistaken name is told first
    is_drawn = dataset == "icons" or (source == "icons" and not Path(source).exists())
    if not is_drawn and (questions is not None or seed is not None):
        drawable = f", as {dataset} is with --from icons" if dataset in data.DRAWN else ""
        raise UserError(f"{dataset} is read as it is; --questions and --seed are for what is drawn{drawable}")
    if skills is not None and dataset != "icons":
        raise UserError(f"--skills are those of icons; {dataset} has none to choose")
    drawing = {} if seed is None else {"seed": seed}
    if dataset == "icons":
        if source is not None:
            raise UserError("icons are drawn, not read; leave --from out")
        wanted = {} if questions is None else {"train": questions}
        return data.prepare(dataset, target, **wanted, **drawing, **_skills(skills))
    if source is None:
        raise UserError(f"say where the official {dataset} folder is: --from DIR, or --from hub")
    if is_drawn:
        return data.prepare_drawn(dataset, target, questions, **drawing)
    return data.prepare(dataset, source, target)


def _skills(text: str | None) -> dict[str, Any]:
    from blipfit.data import icons

    if text is None:
        return {}
    groups = {"held-out": icons.HELD_OUT, "taught": icons.PRETRAINED, "every": tuple(icons.SKILLS)}
    named = [name.strip() for name in text.split(",")]
    names = list(dict.fromkeys(skill for name in named for skill in groups.get(name, (name,))))
    if unknown := [name for name in names if name not in icons.SKILLS]:
        raise UserError(
            f"icons have no skill {unknown[0]!r}; write {', '.join(groups)}, or of {', '.join(icons.SKILLS)}"
        )
    return {"skills": names}


def evaluate_run(folder: Path, source: Path | None, split: str, device: torch.device, base: bool) -> dict[str, Any]:
    """Judge a finished run again; see `blipfit.evaluation.evaluate`."""
    place = data_folder(Run(folder).recipe().data.name, source)
    return evaluate(folder, place, split, device, base)


def grid_records() -> list[dict[str, Any]]:
    """The 64 experiments with the parameters they train in the published models."""
    records = []
    for number in grid.IDS:
        family, row, rank = grid.locate(number)
        recipe = grid.recipe("scienceqa", number)
        trained = count.trained(shapes.on_meta(recipe.model.name), family, recipe.adapter)
        records.append(
            {
                "id": number,
                "llm": recipe.model.name,
                "llm_lora": list(row.llm),
                "qformer": row.qformer if row.qformer == "full" else list(row.qformer),
                "rank": rank,
                "trainable_parameters": sum(trained.values()),
            }
        )
    return records


def grid_table(records: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="the published grid, for scienceqa and iconqa", title_justify="left")
    for name in ("id", "language model", "placement", "rank", "trained parameters"):
        table.add_column(name, justify="left" if name in ("language model", "placement") else "right")
    for record in records:
        where = terminal.placement({"qformer": record["qformer"], "llm": record["llm_lora"]})
        name = record["llm"].removeprefix("Salesforce/instructblip-")
        end = record["id"] % len(grid.RANKS) == 0
        table.add_row(
            str(record["id"]), name, where, str(record["rank"]), f"{record['trainable_parameters']:,}", end_section=end
        )
    return table


def describe(recipe: Recipe) -> dict[str, Any]:
    """What an experiment is: recipe, module names, parameters by component, estimated memory."""
    model = shapes.on_meta(recipe.model.name)
    family = shapes.family(recipe.model.name)
    placed = placement.resolve(model, family, recipe.adapter)
    trained, total = count.trained(model, family, recipe.adapter), count.total(model)
    training = recipe.training
    memory = count.memory_estimate(
        model, trained, 1, training.max_text_tokens, training.batch_size, recipe.performance.checkpointing
    )
    dead = placement.without_gradient(model)
    return {
        "recipe": recipe.model_dump(mode="json"),
        "modules": {"lora": list(placed.lora), "full": [placement.QUERY_TOKENS, *placed.full]},
        "without_gradient": [name for name in placed.lora if dead.match(name)],
        "trained": trained,
        "total": total,
        "trained_parameters": sum(trained.values()),
        "total_parameters": sum(total.values()),
        "estimated_bytes": memory,
    }


def description(recipe: Recipe, record: Mapping[str, Any]) -> list[Any]:
    lora, full = record["modules"]["lora"], record["modules"]["full"]
    share = 100 * record["trained_parameters"] / record["total_parameters"]
    memory = record["estimated_bytes"]
    parts = ", ".join(f"{name} {value / 2**30:.1f}" for name, value in memory.items())
    lines = [
        recipe.to_yaml(),
        terminal.components(record["trained"], record["total"]),
        f"{record['trained_parameters']:,} of {record['total_parameters']:,} parameters are trained ({share:.2f} %)",
        f"{methods.title(recipe.adapter.method)} beside {len(lora)} layers"
        + (f", {lora[0]} … {lora[-1]}" if lora else ""),
        f"trained themselves: {len(full)} modules, {', '.join(full[:3])}" + (" …" if len(full) > 3 else ""),
        f"memory on a GPU, estimated: {sum(memory.values()) / 2**30:.1f} GiB ({parts})",
    ]
    if record["without_gradient"]:
        lines.append(
            f"{len(record['without_gradient'])} of the adapted layers never get a gradient: the text branch of the "
            "Q-Former's last feed-forward is not read. The published counts include them."
        )
    return lines


def outcome(records: Sequence[Mapping[str, Any]], folders: Sequence[Path]) -> list[Any]:
    """The table at the end of training, and where everything lies."""
    if not records:
        return ["no experiment was finished"]
    lines: list[Any] = [terminal.results(records)]
    if len(records) == 1 and records[0]["metrics"]["test"]["by"]:
        lines.append(terminal.breakdown(records[0]["metrics"]["test"], "test accuracy by group"))
    return [*lines, "run folders: " + ", ".join(map(str, folders))]


def judgement(record: Mapping[str, Any]) -> list[Any]:
    """What `evaluate` prints."""
    tuned, recorded = record["tuned"], record["recorded"]
    lines = [
        f"{record['experiment']} on {record['split']} ({tuned['questions']} questions), judged by {tuned['method']}"
    ]
    if "base" in record:
        lines.append(f"base model:  {terminal.score(record['base'])}")
    chance = f"   chance {tuned['chance']:.1f}" if "chance" in tuned else ""
    lines.append(f"with adapter: {terminal.score(tuned)}{chance}")
    if recorded is not None and chance:
        lines.append(f"recorded when trained: {recorded:.1f}")
    return [*lines, terminal.breakdown(tuned, "accuracy by group")] if tuned["by"] else lines
