"""Measures everything that needs a GPU, within a given time: `python -m benchmarks.gpu --minutes 6`.

Needs torch, transformers, peft and accelerate; nothing is downloaded, and models have random weights. The parts, in
this order: `tests` (the tests marked gpu); then for Flan-T5-XL and Vicuna-7B `peers` (Trainer + peft, the original
protocol), `banks` (1 to 16 experiments in one pass, with memory predicted and measured), `settings` (each speed-up on
and off), `ranking`, and `profile` (which kernels the time of a step goes to). Measurements that do not fit into the
time are skipped and listed. The record is written after every measurement, so a stopped run leaves its results.

Questions have the sizes of ScienceQA's: 16 per step, 106 tokens of text, answers of 5 tokens, four candidates.
Names: K is the number of experiments in a bank.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks import full_size, measure
from benchmarks.gpu_record import Record, free_memory
from benchmarks.gpu_sides import STEPS, WARM_UP, Sides, allocated_bytes
from blipfit import grid
from blipfit.model.backbone import Backbone
from blipfit.model.image_features import ImageFeatures
from blipfit.recipe import Family, Recipe

PARTS = ("tests", "peers", "banks", "settings", "ranking", "profile")
BANKS = (1, 2, 4, 8, 16)
RANKING_BANKS = (8, 16)
PROFILE_BANK = 8
DEFAULT_SETTINGS = "1:cuda_graphs,8:plain,8:padding,8:compile,8:checkpointing,16:checkpointing,1:compile + cuda_graphs"
_PAD = "performance.pad_to_multiple_of=16"
SETTINGS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "padding": (_PAD,),
    "compile": ("performance.compile=true", _PAD),
    "cuda_graphs": ("performance.cuda_graphs=true",),
    "compile + cuda_graphs": ("performance.compile=true", "performance.cuda_graphs=true", _PAD),
    "checkpointing": ("performance.checkpointing=[query,answer]",),
    "compile + checkpointing": ("performance.compile=true", "performance.checkpointing=[query,answer]", _PAD),
}
"""The assignments to a recipe, by the name of the setting."""
FIRST_FULL: dict[Family, int] = {"t5": 1, "vicuna": 33}
"""The first of a family's 12 experiments that train the whole Q-Former; setting "full Q-Former"."""
SETTINGS |= {"full Q-Former": (), "full Q-Former, compile": SETTINGS["compile"]}
TESTS = (
    "tests/training/test_gpu.py",
    "-m",
    "gpu and not slow",
    "-v",
    "--tb=short",
    "--durations=8",
    "-p",
    "no:cacheprovider",
    "-o",
    "filterwarnings=default",
)


def run(
    scale: str,
    minutes: float,
    families: Sequence[Family],
    parts: Sequence[str],
    banks: Sequence[int],
    settings: Sequence[tuple[int, str]],
    to: Path,
) -> Record:
    """Measure the named parts and return the record, which is written to the file `to`.

    `banks` are sizes of banks; `settings` are pairs of a size and the name of a setting.
    """
    record = Record(to, minutes, scale)
    print(json.dumps(record.entries["machine"]), flush=True)
    if "tests" in parts:
        record.add("tests", 20, lambda: _run_tests(record.seconds_left()))
    device = torch.device(measure.DEVICE)
    matrix_rate = record.add("matrix_rate", 5, lambda: full_size.matrix_rate(device))
    for family, first in measure.FIRST_LORA:
        if family in families and set(parts) - {"tests"}:
            backbone = _build_backbone(record, family, scale)
            if backbone is None:
                continue
            with tempfile.TemporaryDirectory() as folder:
                recipes = [grid.recipe("scienceqa", first + i, f"tiny-{family}") for i in range(16)]
                sides = _prepare_sides(backbone, recipes[0], Path(folder), matrix_rate or float("nan"))
                FamilyMeasurements(record, family, recipes, sides).run(parts, banks, settings)
            del backbone, sides
            free_memory()
    return record


def _run_tests(seconds: float) -> dict[str, Any]:
    """Run the tests marked gpu in processes of their own; after a timeout, the output so far is counted."""
    command = [sys.executable, "-m", "pytest", *TESTS, "-n", str(min(8, (os.cpu_count() or 2) // 2))]
    environment = os.environ | {"OMP_NUM_THREADS": "2"}  # slower with as many threads per process as there are cores
    with tempfile.TemporaryFile("w+") as output:
        try:
            code = subprocess.run(
                command, stdout=output, stderr=output, timeout=seconds, env=environment, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            code = -1
        output.seek(0)
        lines = output.read().splitlines()
    print("\n".join(lines)[-9000:], flush=True)
    return {"exit_code": code, "passed": sum(" PASSED " in line for line in lines), "last": lines[-1:]}


def _build_backbone(record: Record, family: Family, scale: str) -> Backbone | None:
    """Build a family's model and record its size; None if there was no time or no memory for it."""
    backbone: Backbone | None = None

    def build() -> dict[str, Any]:
        nonlocal backbone
        backbone = full_size.build_model(full_size.model_config(family, scale), family, torch.device(measure.DEVICE))
        return {"count": sum(p.numel() for p in backbone.hf.parameters()), "bytes": allocated_bytes()}

    record.add(f"{family}/parameters", 10, build)
    return backbone


def _prepare_sides(backbone: Backbone, recipe: Recipe, folder: Path, matrix_rate: float) -> Sides:
    picture = folder / "picture.png"
    Image.effect_noise((224, 224), 64).convert("RGB").save(picture)
    batch_size = recipe.training.batch_size * recipe.training.accumulation
    questions = full_size.random_questions(backbone, picture, batch_size * (WARM_UP + STEPS))
    image_features = ImageFeatures.from_backbone(backbone, "stored", folder / "store")
    image_features.prepare(questions.questions)
    flops = full_size.training_flops(backbone.hf.config) * batch_size
    return Sides(backbone, questions, image_features, flops, matrix_rate)


class FamilyMeasurements:
    """The measurements of one family; `recipes` are its sixteen experiments with LoRA."""

    def __init__(self, record: Record, family: Family, recipes: Sequence[Recipe], sides: Sides):
        self.record, self.family, self.recipes, self.sides = record, family, recipes, sides

    def run(self, parts: Sequence[str], banks: Sequence[int], settings: Sequence[tuple[int, str]]) -> None:
        """Measure the named parts in the given order."""
        actions = {
            "banks": lambda: self.measure_banks(banks),
            "peers": self.measure_peers,
            "settings": lambda: self.measure_settings(settings),
            "ranking": self.measure_ranking,
            "profile": lambda: self.measure_profiles(settings, compiled="settings" in parts),
        }
        for part in parts:
            if part in actions:
                actions[part]()

    def select_recipes(self, K: int, setting: str = "plain") -> list[Recipe]:
        """Select K experiments, evenly spaced, with the assignments of a setting."""
        assignments = SETTINGS[setting]
        if setting.startswith("full Q-Former"):
            first = FIRST_FULL[self.family]
            model = f"tiny-{self.family}"
            return [grid.recipe("scienceqa", first + k, model).override(assignments) for k in range(K)]
        return [self.recipes[i * len(self.recipes) // K].override(assignments) for i in range(K)]

    def measure_banks(self, banks: Sequence[int]) -> None:
        """Measure a step of banks of several sizes."""
        for K in banks:
            self.record.add(
                f"{self.family}/banks/{K}",
                5 + 1.5 * K,
                lambda K=K: self.sides.bank_step(self.select_recipes(K)),  # type: ignore[misc]
            )

    def measure_settings(self, settings: Sequence[tuple[int, str]]) -> None:
        """Measure a step of banks with several settings."""
        for K, setting in settings:
            self.record.add(
                f"{self.family}/settings/{K}/{setting}",
                (50 if "compile" in setting else 10) + 1.5 * K,
                lambda K=K, setting=setting: self.sides.bank_step(self.select_recipes(K, setting)),  # type: ignore[misc]
            )

    def measure_peers(self) -> None:
        """Measure a step of Trainer + peft and of the original protocol."""
        recipe = self._single_recipe()
        self.record.add(f"{self.family}/peers/trainer_peft", 20, lambda: self.sides.trainer_step(recipe))
        self.record.add(f"{self.family}/peers/original_training", 15, lambda: self.sides.original_step(recipe))

    def measure_ranking(self) -> None:
        """Measure ranking by the original protocol and in banks."""
        recipe = self._single_recipe()
        self.record.add(f"{self.family}/ranking/original", 15, lambda: self.sides.original_ranking(recipe))
        for K in RANKING_BANKS:
            self.record.add(
                f"{self.family}/ranking/bank of {K}",
                10,
                lambda K=K: self.sides.bank_ranking(self.select_recipes(K)),  # type: ignore[misc]
            )

    def measure_profiles(self, settings: Sequence[tuple[int, str]], compiled: bool) -> None:
        """Profile a step of a bank of 8, for all settings of that size; less time is planned if they are compiled."""
        for setting in [setting for K, setting in settings if K == PROFILE_BANK]:
            self.record.add(
                f"{self.family}/profile/{setting}",
                100 if "compile" in setting and not compiled else 15,
                lambda setting=setting: self.sides.profile(self.select_recipes(PROFILE_BANK, setting)),  # type: ignore[misc]
            )

    def _single_recipe(self) -> Recipe:
        return self.recipes[len(self.recipes) // 2]  # all experiments take about the same time by themselves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--scale", choices=list(full_size.SCALES), default="full")
    parser.add_argument("--families", default="t5,vicuna")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--banks", default=",".join(map(str, BANKS)))
    parser.add_argument("--settings", default=DEFAULT_SETTINGS, help="K:SETTING, comma-separated")
    parser.add_argument("--to", type=Path, default=None, help="file of the record")
    options = parser.parse_args()
    if options.scale == "full" and not torch.cuda.is_available():
        sys.exit("--scale full needs a GPU, and there is none; --scale tiny measures the miniatures instead")
    run(
        options.scale,
        options.minutes,
        options.families.split(","),
        options.parts.split(","),
        [int(K) for K in options.banks.split(",")],
        [(int(entry.partition(":")[0]), entry.partition(":")[2]) for entry in options.settings.split(",")],
        options.to or measure.RESULTS / f"{time.strftime('%Y-%m-%d')}-gpu.json",
    )


if __name__ == "__main__":
    main()
