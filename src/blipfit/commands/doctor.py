"""`blipfit doctor`: checks of the machine, the installation, a model and a data folder, each with its fix."""

import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from rich.table import Table

from blipfit.errors import UserError
from blipfit.report import terminal

Check = dict[str, str]
_MINIATURES = ("tiny-t5", "tiny-vicuna")


def run(model: str | None, data: Path | None) -> dict[str, list[Check]]:
    """Check the machine, the embedded miniatures and, if given, a model and a data folder."""
    checks = [_python(), *_packages(), _device(), _disk(), _hub()]
    checks += [_attempt(f"miniature {name}", lambda name=name: _load_model(name)) for name in _MINIATURES]  # type: ignore[misc]
    if model is not None:
        names = _MINIATURES if model == "tiny" else (model,)
        checks += [_attempt(f"model {name}", lambda name=name: _load_model(name)) for name in names]  # type: ignore[misc]
    if data is not None:
        checks.append(_attempt(f"data {data}", lambda: _read_data(data)))
    return {"checks": checks}


def count_failed(record: Mapping[str, Sequence[Check]]) -> int:
    """How many checks failed."""
    return sum(check["state"] == "wrong" for check in record["checks"])


def render(record: Mapping[str, Sequence[Check]]) -> list[Any]:
    """One row per check."""
    checks = record["checks"]
    table = Table("check", "state", "result")
    for check in checks:
        table.add_row(check["check"], check["state"], check["found"])
    failures, notes = count_failed(record), sum(check["state"] == "note" for check in checks)
    summary = f"{failures} of {len(checks)} checks failed" if failures else "all checks passed"
    return [table, summary + (f", {terminal.format_count(notes, 'note')}" if notes else "")]


def _check(name: str, passed: bool, result: str, otherwise: str = "wrong") -> Check:
    return {"check": name, "state": "ok" if passed else otherwise, "found": result}


def _attempt(name: str, action: Callable[[], str]) -> Check:
    try:
        return _check(name, True, action())
    except UserError as error:
        return _check(name, False, str(error))


def _python() -> Check:
    passed = sys.version_info >= (3, 11)
    return _check("python", passed, platform.python_version() + ("" if passed else "; blipfit needs 3.11 or newer"))


def _packages() -> list[Check]:
    """Every dependency is installed, in a version that blipfit supports."""
    from packaging.requirements import Requirement

    checks = []
    for line in requires("blipfit") or []:
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            checks.append(_check(requirement.name, False, f"missing: pip install '{requirement}'"))
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            checks.append(_check(requirement.name, False, f"{installed}; pip install '{requirement}'"))
    return checks or [_check("packages", True, "all in supported versions")]


def _device() -> Check:
    import torch

    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16: fp16 is used, with fp32 trained parameters"
        return _check("device", True, f"{torch.cuda.get_device_name(0)}, {memory:.0f} GiB, {bf16}")
    return _check("device", True, f"CPU with {torch.get_num_threads()} threads: enough for the miniatures")


def _disk() -> Check:
    free = shutil.disk_usage(tempfile.gettempdir() if not Path.cwd().exists() else Path.cwd()).free / 2**30
    return _check(
        "disk",
        free > 2,
        f"{free:.0f} GiB free in the current folder" + ("" if free > 2 else "; runs need some: make room"),
    )


def _hub() -> Check:
    from blipfit.model.loading import hub_reachable

    if hub_reachable():
        return _check("Hugging Face hub", True, "reachable")
    return _check(
        "Hugging Face hub", False, "not reachable: only local folders, the cache and the miniatures can be used", "note"
    )


def _load_model(name: str) -> str:
    from blipfit.model.loading import load
    from blipfit.recipe import ModelConfig

    backbone = load(ModelConfig(name=name))
    count = sum(p.numel() for p in backbone.hf.parameters())
    checked = "weights and tokenizers passed all checks, activation function as published"
    return f"{count:,} parameters, {backbone.family}; {checked}"


def _read_data(folder: Path) -> str:
    from blipfit import data
    from blipfit.data.images import open_image
    from blipfit.data.question import SPLITS

    name = data.detect(folder)
    splits = {split: data.load(name, folder, split) for split in (("test",) if name == "mme" else SPLITS)}
    for questions in splits.values():
        for question in questions:
            open_image(question.image, question.transparency)
    return f"{name}: " + " / ".join(f"{len(questions)} {split}" for split, questions in splits.items())
