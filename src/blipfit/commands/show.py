"""`blipfit show`: an experiment before it runs."""

from collections.abc import Mapping
from typing import Any

import yaml

from blipfit import grid, methods
from blipfit import recipe as recipes
from blipfit.adapters import memory_estimate, parameter_counts, placement
from blipfit.disk_space import format_bytes
from blipfit.errors import UserError
from blipfit.model import shapes
from blipfit.recipe import DistillationConfig, Family, PerformanceConfig, Recipe
from blipfit.report import terminal


def run(recipe: Recipe) -> dict[str, Any]:
    """The recipe, adapted modules, parameters by component, and estimated memory. Needs no weights.

    `total_parameters` and `trained_share` count the model with its adapter, as the result of a run does.

    Raises UserError if the model's language model is of another family than the experiment's.
    """
    model = shapes.on_meta(recipe.model.name)
    family = shapes.family(recipe.model.name)
    _refuse_other_family(recipe, family)
    placed = placement.resolve(model, family, recipe.adapter)
    trained = parameter_counts.trained_parameters(model, family, recipe.adapter)
    total = parameter_counts.all_parameters(model)
    training = recipe.training
    memory = memory_estimate.estimate_memory(
        model,
        trained,
        1,
        training.max_text_tokens,
        training.batch_size,
        recipe.performance.checkpointing,
        recipe.model.quantization,
    )
    trained_count = sum(trained.values())
    total_count = sum(total.values()) + parameter_counts.added_parameters(model, family, recipe.adapter)
    unread = placement.no_gradient_pattern(model)
    return {
        "recipe": recipe.model_dump(mode="json"),
        "modules": {"lora": list(placed.lora), "full": [placement.QUERY_TOKENS, *placed.full]},
        "without_gradient": [name for name in placed.lora if unread.match(name)],
        "trained": trained,
        "total": total,
        "trained_parameters": trained_count,
        "total_parameters": total_count,
        "trained_share": trained_count / total_count,
        "estimated_bytes": memory,
    }


def _refuse_other_family(recipe: Recipe, family: Family) -> None:
    """Raise UserError if an experiment of the grid is shown with a model of the other family."""
    expected = grid.family(recipe.experiment)
    if expected is not None and family != expected:
        raise UserError(
            f"experiment {recipe.experiment} of {recipe.data.name} is for {grid.MODELS[expected]} ({expected}), and "
            f"{recipe.model.name} has a language model of another family ({family}); choose another experiment or "
            "--model"
        )


def render(record: Mapping[str, Any]) -> list[Any]:
    """The fields of the recipe that matter here, then parameters and memory."""
    recipe = recipes.from_mapping(record["recipe"])
    lora, full = record["modules"]["lora"], record["modules"]["full"]
    memory = record["estimated_bytes"]
    parts = ", ".join(f"{name} {format_bytes(round(value))}" for name, value in memory.items())
    added = record["total_parameters"] - sum(record["total"].values())
    lines = [
        yaml.safe_dump(relevant_fields(recipe), sort_keys=False, allow_unicode=True),
        terminal.components_table(record["trained"], record["total"], added),
        f"{record['trained_parameters']:,} parameters are trained, {100 * record['trained_share']:.2f} % of the "
        f"{record['total_parameters']:,} of the model with its adapter",
    ]
    if lora:
        lines.append(f"{methods.title(recipe.adapter.method)} in {len(lora)} layers, {lora[0]} … {lora[-1]}")
    always = [name for name in full if not name.startswith("qformer.")]
    lines.append(f"always trained: {', '.join(always)}")
    if len(full) > len(always):
        lines.append(f"all weights trained: {len(full) - len(always)} modules of the Q-Former")
    lines.append(f"memory on a GPU, estimated: {format_bytes(round(sum(memory.values())))} ({parts})")
    if unused := len(record["without_gradient"]):
        lines.append(
            f"{unused} adapted layers have no effect, because their output is not used; they are counted, as in the "
            "paper"
        )
    return lines


def relevant_fields(recipe: Recipe) -> dict[str, Any]:
    """The recipe without sections and fields that this experiment does not read."""
    values = recipe.model_dump(mode="json")
    adapter, evaluation = values["adapter"], values["evaluation"]
    if recipe.adapter.method != "adalora":
        del adapter["adalora"]
    if not recipe.adapter.has_lora:
        for name in ("method", "rank", "alpha"):
            del adapter[name]
    elif not methods.has_rank(recipe.adapter.method):
        del adapter["rank"], adapter["alpha"]
    if recipe.adapter.llm_layers is None:
        del adapter["llm_layers"]
    if recipe.evaluation.method == "ranking":
        del evaluation["decoding"]
    if recipe.distillation == DistillationConfig():
        del values["distillation"]
    if recipe.performance == PerformanceConfig():
        del values["performance"]
    for section, name in (("model", "revision"), ("data", "limit")):
        if values[section][name] is None:
            del values[section][name]
    return values
