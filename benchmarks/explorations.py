"""Measures what the miniatures learn in the explorations, and what they forget: `python -m benchmarks.explorations`.

The five explorations of a family are trained in one bank on preferred descriptions of generated pictures. The base
model and the trained ones are then evaluated on new pairs (likelihood of the preferred response, ROUGE-L, CLIP score),
on MME's questions, and on the skills of pre-training. In addition, it measures how well each miniature finds generated
pictures by a text.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import blipfit
from benchmarks import measure
from blipfit import data as blipfit_data
from blipfit import grid
from blipfit.commands.evaluate import render_on, run_on
from blipfit.data import icons
from blipfit.model import tiny
from blipfit.recipe import Family
from blipfit.report import terminal
from blipfit.report.progress import TrainingDisplay
from blipfit.training.loop import train

OVERRIDES = ("training.learning_rate=2e-3", "training.max_epochs=3")
PAIRS, MME_PICTURES, QUESTIONS = 3000, 200, 1400
SEARCHED_PICTURES, TOP, MIN_MATCHES = 200, 5, 5
"""Pictures per search, results that count, and pictures that must show an icon for it to be searched."""
SEEDS = (11, 12, 13)


def run(families: list[Family], root: Path) -> dict[str, Any]:
    """Train, evaluate and search; writes and returns all results."""
    folders = _prepare_data(root / "data")
    record: dict[str, Any] = {"overrides": list(OVERRIDES), "pairs": PAIRS, "search": {}, "explorations": {}}
    for family in families:
        record["search"][family] = search = _measure_search(family, root / "search")
        print(f"{family}: precision at {TOP} {search['precision']:.3f} over {search['queries']} searches", flush=True)
        names = [name for name, (other, _) in grid.EXPLORATIONS.items() if other == family]
        recipes = [grid.exploration_recipe(name, model="tiny").override(OVERRIDES) for name in names]
        runs = train(recipes, folders["rewardbench"], root / "results", listener=TrainingDisplay())
        on = ",".join(f"{name}={folder}" for name, folder in folders.items())
        for name, run in zip(names, runs, strict=True):
            evaluations = run_on(str(run.folder), on, torch.device(measure.DEVICE))
            terminal.print_record(evaluations, False, render_on)
            result = run.result()
            record["explorations"][name] = {
                "trained_parameters": result["trained_parameters"],
                "trained_share": result["trained_share"],
                "seconds": result["seconds"],
                "judged": {
                    entry["on"]: {k: entry[k] for k in ("base", "tuned", "difference")} for entry in evaluations
                },
            }
            measure.write_results("explorations", record)
    return record


def _prepare_data(folder: Path) -> dict[str, Path]:
    folders = {name: folder / name for name in ("rewardbench", "mme", "icons")}
    if not folders["rewardbench"].exists():
        blipfit_data.prepare_drawn("rewardbench", folders["rewardbench"], PAIRS, seed=1042)
    if not folders["mme"].exists():
        blipfit_data.prepare_drawn("mme", folders["mme"], MME_PICTURES, seed=1043)
    icons.prepare(folders["icons"], train=2, val=2, test=QUESTIONS, seed=1044, skills=icons.PRETRAINED)
    return folders


def _measure_search(family: Family, folder: Path) -> dict[str, Any]:
    """Return the precision of the first results over all kinds of icons that enough pictures show, for three sets."""
    model = blipfit.load(f"tiny-{family}")
    kinds = [f"{color} {shape}" for color in icons.COLORS for shape in icons.SHAPES]
    precisions: dict[str, float] = {}
    for seed in SEEDS:
        scenes = [icons.make_scene(2000 + seed, index) for index in range(SEARCHED_PICTURES)]
        pictures = folder / str(seed)
        pictures.mkdir(parents=True, exist_ok=True)
        for number, scene in enumerate(scenes):
            icons.draw(scene).save(pictures / f"{number:03d}.png")
        kinds_by_picture = [{f"{icon.color} {icon.shape}" for icon in scene.icons} for scene in scenes]
        for text in kinds:
            if sum(text in kinds_in_picture for kinds_in_picture in kinds_by_picture) >= MIN_MATCHES:
                matches = model.search(pictures, text, top=TOP)
                right = sum(text in kinds_by_picture[int(match.image.stem)] for match in matches)
                precisions[f"{seed}/{text}"] = right / TOP
    red_stars = {search: value for search, value in precisions.items() if search.endswith("red star")}
    mean = sum(precisions.values()) / len(precisions)
    return {
        "miniature": json.loads((tiny.folder(family) / "config.json").read_text())["blipfit"],
        "pictures": SEARCHED_PICTURES,
        "queries": len(precisions),
        "precision": mean,
        "red star": red_stars,
        "worst": min(precisions.items(), key=lambda item: item[1]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=("t5", "vicuna"), action="append", help="both if absent")
    parser.add_argument("--root", type=Path, default=Path("results/explorations"), help="data, pictures, runs")
    options = parser.parse_args()
    run(options.family or ["t5", "vicuna"], options.root)


if __name__ == "__main__":
    main()
