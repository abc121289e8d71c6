"""What the explorations teach the miniatures, and what it costs them: `python -m benchmarks.explorations`.

All five of a family learn preferred descriptions of drawn pictures in one bank. Base and tuned are then judged on fresh
pairs (likelihood of the preferred response, ROUGE-L, CLIP score), on MME's questions, and on the skills they were
pre-trained in. Beside it: how well each miniature finds drawn pictures by a text.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import blipfit
from benchmarks import measure
from blipfit import data as datasets
from blipfit import grid
from blipfit.commands import evaluate as evaluations
from blipfit.data import icons
from blipfit.model import tiny
from blipfit.recipe import Family
from blipfit.report import terminal
from blipfit.training.loop import train

OVERRIDES = ("training.learning_rate=2e-3", "training.max_epochs=3")
PAIRS, PICTURES, ASKED = 3000, 200, 1400
FOUND, TOP, FEWEST = 200, 5, 5
SEEDS = (11, 12, 13)


def run(families: list[Family], root: Path) -> dict[str, Any]:
    """Train, judge, search; returns and keeps everything."""
    folders = _data(root / "data")
    record: dict[str, Any] = {"overrides": list(OVERRIDES), "pairs": PAIRS, "search": {}, "explorations": {}}
    for family in families:
        record["search"][family] = found = _search(family, root / "search")
        print(f"{family}: precision at {TOP} {found['precision']:.3f} over {found['queries']} searches", flush=True)
        names = [name for name, (its, _) in grid.EXPLORATIONS.items() if its == family]
        recipes = [grid.explore(name, model="tiny").override(OVERRIDES) for name in names]
        runs = train(recipes, folders["rewardbench"], root / "results", listen=terminal.TrainingDisplay())
        on = ",".join(f"{name}={folder}" for name, folder in folders.items())
        for name, one in zip(names, runs, strict=True):
            judged = evaluations.run(str(one.folder), on)
            terminal.show(judged, False, lambda judged=judged: evaluations.shown(judged))  # type: ignore[misc]
            result = one.result()
            record["explorations"][name] = {
                "trained_parameters": result["trained_parameters"],
                "trained_share": result["trained_share"],
                "seconds": result["seconds"],
                "judged": {part["on"]: {k: part[k] for k in ("base", "tuned", "difference")} for part in judged},
            }
            measure.keep("explorations", record)
    return record


def _data(folder: Path) -> dict[str, Path]:
    found = {name: folder / name for name in ("rewardbench", "mme", "icons")}
    if not found["rewardbench"].exists():
        datasets.prepare_drawn("rewardbench", found["rewardbench"], PAIRS, seed=1042)
    if not found["mme"].exists():
        datasets.prepare_drawn("mme", found["mme"], PICTURES, seed=1043)
    icons.prepare(found["icons"], train=2, val=2, test=ASKED, seed=1044, skills=icons.PRETRAINED)
    return found


def _search(family: Family, folder: Path) -> dict[str, Any]:
    """Precision of the first five over every kind of icon that enough of 200 pictures show, three times."""
    model = blipfit.load(f"tiny-{family}")
    kinds = [f"{color} {shape}" for color in icons.COLORS for shape in icons.SHAPES]
    precisions: dict[str, float] = {}
    for seed in SEEDS:
        scenes = [icons.scene(2000 + seed, index) for index in range(FOUND)]
        place = folder / str(seed)
        place.mkdir(parents=True, exist_ok=True)
        for number, scene in enumerate(scenes):
            icons.draw(scene).save(place / f"{number:03d}.png")
        shown = [{f"{icon.color} {icon.shape}" for icon in scene.icons} for scene in scenes]
        for text in kinds:
            if sum(text in kinds_there for kinds_there in shown) >= FEWEST:
                best = model.search(place, text, top=TOP)
                right = sum(text in shown[int(one.image.stem)] for one in best)
                precisions[f"{seed}/{text}"] = right / TOP
    of_red_stars = {key: value for key, value in precisions.items() if key.endswith("red star")}
    mean = sum(precisions.values()) / len(precisions)
    return {
        "miniature": json.loads((tiny.folder(family) / "config.json").read_text())["blipfit"],
        "pictures": FOUND,
        "queries": len(precisions),
        "precision": mean,
        "red star": of_red_stars,
        "worst": min(precisions.items(), key=lambda item: item[1]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=("t5", "vicuna"), action="append", help="both if absent")
    parser.add_argument("--root", type=Path, default=Path("results/explorations"), help="data, pictures, runs")
    chosen = parser.parse_args()
    run(chosen.family or ["t5", "vicuna"], chosen.root)


if __name__ == "__main__":
    main()
