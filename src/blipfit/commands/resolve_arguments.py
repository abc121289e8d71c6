"""What command-line arguments stand for: recipes, and folders of data."""

from collections.abc import Sequence
from pathlib import Path

from blipfit import data, grid
from blipfit import recipe as recipes
from blipfit.errors import UserError
from blipfit.model import shapes
from blipfit.recipe import Recipe


def load_recipes(
    dataset: str, experiments: Sequence[str], model: str | None, assignments: Sequence[str]
) -> list[Recipe]:
    """The recipes of experiments in the grid, or the one in a recipe file, with `section.field=value` applied.

    Raises UserError if an experiment, the file or a field does not exist.
    """
    if dataset.endswith((".yaml", ".yml")):
        if experiments:
            raise UserError(f"{dataset} is a recipe file and names one experiment; leave the ids out")
        recipe = recipes.load(Path(dataset))
        if model is not None:
            name = grid.model_name(shapes.family(recipe.model.name), model)
            recipe = recipe.override([f"model.name={name}", "model.revision=null"])
        return [recipe.override(assignments)]
    if not experiments:
        raise UserError(f"say which experiments: `blipfit train {dataset} 15`; `blipfit grid` lists them")
    return [grid.recipe(dataset, experiment, model).override(assignments) for experiment in experiments]


def data_folder(dataset: str, folder: Path | None) -> Path:
    """The given folder, or `data/DATASET`; the icons are drawn there if that does not exist yet."""
    target = folder or Path("data") / dataset
    if dataset == "icons" and folder is None and not target.exists():
        data.prepare("icons", target)
    return target


def data_folders(on: str, data_option: Path | None) -> list[tuple[str, Path]]:
    """`icons,mme=DIR` as data set names with their folders.

    Raises UserError if a name is unknown or given twice, or if `--data` gives one folder for several data sets.
    """
    entries = [entry.strip().partition("=") for entry in on.split(",") if entry.strip()]
    names = [name for name, _, _ in entries]
    if not entries:
        raise UserError("say on what: --on icons, or --on icons,mme=DIR")
    if len(set(names)) < len(names):
        raise UserError(f"--on {on} names a data set twice")
    if data_option is not None and len(entries) > 1:
        raise UserError("--data names one folder and --on several data sets; write --on icons=DIR,mme=DIR")
    for name in names:
        data.get_data_set(name)
    return [(name, data_folder(name, Path(folder) if folder else data_option)) for name, _, folder in entries]
