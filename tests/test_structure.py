"""Imports point downwards only: a room never imports one above it."""

import ast
import graphlib
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import blipfit
from blipfit import cli

SOURCE = Path(blipfit.__file__).parent
# docs/design.md: from the top to the ground. A room is a file or a folder of blipfit.
ROOMS = (
    "__main__",
    "cli",
    "cli_sweep",
    "server",
    "commands",
    "cluster",
    "report",
    "sweep",
    "training",
    "pretraining",
    "compression",
    "inference",
    "evaluation",
    "adapters",
    "model",
    "data",
    "runtime",
    "run_folder",
    "file_writes",
    "folder_lock",
    "disk_space",
    "grid",
    "recipe",
    "recipe_parsing",
    "methods",
    "sublayers",
    "data_sets",
    "errors",
)
FILES = sorted(SOURCE.rglob("*.py"))


def imported(text: str, package: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Every module of blipfit that a file's text imports, anywhere in it, as a path below blipfit."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = ["blipfit", *package][: 1 + len(package) - node.level + 1] if node.level else []
            base = above + (node.module.split(".") if node.module else [])
            names = [[*base, alias.name] for alias in node.names]
        else:
            continue
        yield from (tuple(name[1:]) for name in names if name[0] == "blipfit" and len(name) > 1)


def upward(text: str, path: tuple[str, ...]) -> list[str]:
    """The imports of a file at `path` (below blipfit, without suffix) that do not point downwards."""
    here = ROOMS.index(path[0])
    rooms = [name for name in imported(text, path[:-1]) if name[0] in ROOMS]
    return [".".join(name) for name in rooms if name[0] != path[0] and ROOMS.index(name[0]) < here]


def _path(file: Path) -> tuple[str, ...]:
    return file.relative_to(SOURCE).with_suffix("").parts


def test_every_file_is_in_a_room():
    assert {_path(file)[0] for file in FILES} <= {*ROOMS, "__init__"}


@pytest.mark.parametrize("file", [f for f in FILES if _path(f) != ("__init__",)], ids=lambda f: "/".join(_path(f)))
def test_imports_point_downwards(file: Path):
    assert upward(file.read_text(encoding="utf-8"), _path(file)) == []


def test_no_two_files_import_each_other():
    """Neither directly nor through others, imports inside functions included."""
    modules = {".".join(_path(file)).removesuffix(".__init__"): file for file in FILES}
    imports: dict[str, set[str]] = {}
    for name, file in modules.items():
        paths = [".".join(path) for path in imported(file.read_text(encoding="utf-8"), _path(file)[:-1])]
        names = {path if path in modules else path.rpartition(".")[0] for path in paths}
        imports[name] = {other for other in names if other in modules and other != name}
    graphlib.TopologicalSorter(imports).prepare()  # raises CycleError, which names the cycle


def test_every_command_has_a_module_that_runs_and_renders():
    commands = {command.name or command.callback.__name__ for command in cli.app.registered_commands}
    for command in commands:
        module = importlib.import_module(f"blipfit.commands.{command.replace('-', '_')}")
        assert callable(module.run), command
        assert callable(module.render), command


def test_importing_the_package_imports_no_room():
    """What it does import stands inside a function, so `import blipfit` costs nothing."""
    tree = ast.parse((SOURCE / "__init__.py").read_text(encoding="utf-8"))
    at_once = [node for node in tree.body if not isinstance(node, ast.FunctionDef)]
    assert not list(imported(ast.unparse(ast.Module(at_once, [])), ()))


@pytest.mark.parametrize(
    ("text", "path", "found"),
    [
        ("from blipfit.training import loop", ("model", "loading"), ["training.loop"]),
        ("from blipfit import training", ("model", "loading"), ["training"]),
        ("def f():\n    import blipfit.cli", ("report", "page"), ["cli"]),
        ("from .. import training", ("model", "loading"), ["training"]),
        ("from ..training.loop import train", ("model", "loading"), ["training.loop.train"]),
        ("from . import tiny", ("model", "loading"), []),
        ("from blipfit.errors import UserError\nimport torch", ("recipe",), []),
        ("from blipfit.recipe import Recipe", ("errors",), ["recipe.Recipe"]),
    ],
)
def test_the_check_finds_what_points_upwards(text, path, found):
    assert upward(text, path) == found


def test_no_room_for_odds_and_ends():
    assert not {f.stem for f in FILES} & {"utils", "helpers", "common", "misc"}


def test_models_are_loaded_in_their_room_only():
    """`from_pretrained` of a model, with the guards it needs; tokenizers, processors and configurations are free.

    adapters/load_adapter.py is copied into adapter folders and runs without blipfit.
    """
    loaders = {
        "/".join(_path(file))
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr == "from_pretrained" and isinstance(node.value, ast.Name)
        if not node.value.id.endswith(("Config", "Processor", "Tokenizer"))
    }
    assert "model/loading" in loaders
    assert {name.split("/")[0] for name in loaders - {"adapters/load_adapter"}} == {"model"}


def test_one_file_knows_the_names_in_a_run_folder():
    names = ('"recipe.yaml"', '"result.json"', '"predictions.jsonl"')
    knows = {"/".join(_path(f)) for f in FILES for name in names if name in f.read_text(encoding="utf-8")}
    assert knows == {"run_folder"}


def test_adapters_are_put_into_a_model_in_one_place():
    installs = {"/".join(_path(f)) for f in FILES if "peft_format.install(" in f.read_text(encoding="utf-8")}
    assert installs == {"adapters/open_model"}
