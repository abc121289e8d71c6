"""What command-line arguments stand for: recipes, and folders of data.

Importing this imports no torch, so that a wrong name is reported at once.
"""

from collections.abc import Sequence
from pathlib import Path

from blipfit import data, grid
from blipfit import recipe as recipes
from blipfit.errors import UserError
from blipfit.recipe import Recipe
from blipfit.run_folder import Run


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
            from blipfit.model import shapes

            name = grid.model_name(shapes.family(recipe.model.name), model)
            recipe = recipe.override([f"model.name={name}", "model.revision=null"])
        return [recipe.override(assignments)]
    if not experiments:
        raise UserError(f"say which experiments, for example `{dataset} 15`; `blipfit grid` lists them")
    return [grid.recipe(dataset, experiment, model).override(assignments) for experiment in experiments]


def load_sweep(
    datasets: str, ids: Sequence[str], model: str | None, assignments: Sequence[str], data_option: Path | None
) -> tuple[list[Recipe], dict[str, Path]]:
    """The recipes that the arguments of a sweep name, and the folder of every data set among them.

    Raises UserError if an experiment, recipe file or data set does not exist, or if `--data` cannot serve all of them.
    """
    recipes: list[Recipe] = []
    for text in ids:
        if text.endswith((".yaml", ".yml")):
            recipes += load_recipes(text, [], model, assignments)
            continue
        names = grid.parse_experiments(text)
        for dataset in datasets.split(","):
            recipes += load_recipes(dataset, names, model, assignments)
    names = list(dict.fromkeys(recipe.data.name for recipe in recipes))
    if data_option is not None and len(names) > 1:
        raise UserError(f"--data names one folder, the sweep reads {', '.join(names)}; leave it out to use data/NAME")
    return recipes, {name: data_folder(name, data_option) for name in names}


def check_experiment(dataset: str, experiment: str | None, model: str | None) -> None:
    """Raise UserError if an experiment, if given, is not in the grid of a data set."""
    if experiment is not None:
        grid.recipe(dataset, experiment, model)


def check_evaluation(subject: str, on: str | None) -> None:
    """Raise UserError if `--on` names no data sets or, without it, if the subject is no run folder."""
    if on is None:
        Run(Path(subject)).recipe()
    else:
        parse_on(on)


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
    entries = parse_on(on)
    if data_option is not None and len(entries) > 1:
        raise UserError("--data names one folder and --on several data sets; write --on icons=DIR,mme=DIR")
    return [(name, data_folder(name, Path(folder) if folder else data_option)) for name, folder in entries]


def parse_on(on: str) -> list[tuple[str, str]]:
    """`icons,mme=DIR` as data set names with the folders that are given, else an empty text.

    Raises UserError if a name is unknown or given twice.
    """
    entries = [entry.strip().partition("=") for entry in on.split(",") if entry.strip()]
    names = [name for name, _, _ in entries]
    if not entries:
        raise UserError("say on what: --on icons, or --on icons,mme=DIR")
    if len(set(names)) < len(names):
        raise UserError(f"--on {on} names a data set twice")
    for name in names:
        data.get_data_set(name)
    return [(name, folder) for name, _, folder in entries]
