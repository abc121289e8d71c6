"""Measures how much accuracy shrunk miniatures retain after recovery training: `python -m benchmarks.shrink_recovery`.

Each size is shrunk, then its Q-Former is trained with the ordinary loop to give the same visual tokens as the original.
The pictures and questions are like those of pre-training: the icon world's in its prompt, and MME's yes/no questions.
Labels are not used. The whole model is evaluated on new pictures, before and after training. Results are written after
every run, so the same command continues after an interruption.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from blipfit import data as blipfit_data
from blipfit.commands import shrink as shrinking
from blipfit.data import icons
from blipfit.data.icons import icon_data_sets
from blipfit.data.prompts import get_prompt
from blipfit.evaluation import retention_vs_original
from blipfit.evaluation.retention_vs_original import SampleScores
from blipfit.model import cost as costs
from blipfit.model import shapes
from blipfit.recipe import (
    AdapterConfig,
    DataConfig,
    DistillationConfig,
    EvaluationConfig,
    ModelConfig,
    Recipe,
    TrainingConfig,
)
from blipfit.training.loop import train
from blipfit.training.model_cache import ModelCache

SIZES: dict[str, dict[str, int]] = {
    "79": {"hidden": 112, "heads": 4, "intermediate": 224},
    "52": {"hidden": 96, "heads": 3, "intermediate": 128},
    "34": {"hidden": 64, "heads": 2, "intermediate": 160},
    "20": {"hidden": 48, "heads": 2, "intermediate": 96},
    "11": {"hidden": 32, "heads": 1, "intermediate": 64},
    "7": {"hidden": 32, "heads": 2, "intermediate": 64, "layers": 2},
    "3": {"hidden": 16, "heads": 1, "intermediate": 32, "layers": 2},
}
"""Sizes by their share of the Q-Former's parameters, in percent."""


def run(model: str, sizes: list[str], seeds: list[int], epochs: int, rate: float, root: Path) -> dict[str, Any]:
    """Shrink, recover and evaluate every size with every seed; writes and returns all results of the model so far.

    `rate` is the learning rate; `root` is the folder of data, checkpoints and runs.
    """
    name = f"shrink-recovery-{Path(model).name}"
    folders = _prepare_data(root / "data")
    data_sets = [("icons", folders["icons"]), ("mme", folders["mme"])]
    (base,) = retention_vs_original.score_models([model], data_sets, "cpu")
    for size in sizes:
        for seed in seeds:
            row = _recover(model, size, seed, epochs, rate, root, folders, data_sets, base)
            row |= {"epochs": epochs, "rate": rate, "world": icon_data_sets.VERSION, "original": _summarize(base)}
            results = _load_results(name)  # another process may have added to it
            results["model"] = Path(model).name
            results.setdefault("runs", {})[f"{size}/{seed}"] = row
            measure.write_results(name, results)
            print(f"{size} % seed {seed}: {json.dumps(row['kept'])}", flush=True)
    return _load_results(name)


def _recover(
    model: str,
    size: str,
    seed: int,
    epochs: int,
    rate: float,
    root: Path,
    folders: dict[str, Path],
    data_sets: list[tuple[str, Path]],
    base: Mapping[str, SampleScores],
) -> dict[str, Any]:
    to = root / f"{Path(model).name}-{size}"
    sizes = dict.fromkeys(("hidden", "heads", "intermediate", "layers", "queries", "cross_every")) | SIZES[size]
    if not to.exists():
        device = torch.device("cpu")
        shrinking.run(model, sizes, "taylor", "icons", folders["icons"], 256, 0, to, device)
    recipe = Recipe(
        experiment=f"{to.name}-{seed}",
        model=ModelConfig(name=str(to)),
        data=DataConfig(name="own", prompt="instruction-v1", images="stored"),
        adapter=AdapterConfig(qformer="full"),
        training=TrainingConfig(
            batch_size=64, learning_rate=rate, max_epochs=epochs, patience=epochs, seed=seed, dropout=False
        ),
        evaluation=EvaluationConfig(method="generation", decoding="short-answer"),
        distillation=DistillationConfig(teacher=model, labels=0, answers=0),
    )
    model_cache = ModelCache("cpu", root / "features")
    (run,) = train([recipe], folders["own"], root / "results", device="cpu", model_cache=model_cache)
    untrained, trained = retention_vs_original.score_models([str(to), str(run.folder)], data_sets, "cpu")
    before, after = shapes.on_meta(model), shapes.on_meta(str(to))
    return {
        "shares": {
            "parameters": costs.qformer_parameters(after) / costs.qformer_parameters(before),
            "flops": costs.query(after.config, 40) / costs.query(before.config, 40),
        },
        "accuracy": {"shrunk": _summarize(untrained), "recovered": _summarize(trained)},
        "kept": {
            name: retention_vs_original.compute_retention(base[name], trained[name])["corrected"] for name in base
        },
        "kept_untrained": {
            name: retention_vs_original.compute_retention(base[name], untrained[name])["corrected"] for name in base
        },
        "seconds": run.result()["seconds"],
    }


def _prepare_data(root: Path) -> dict[str, Path]:
    """Write the data sets: icons for calibration and evaluation, MME's form for evaluation, own data for recovery.

    All have different pictures.
    """
    folders = {name: root / name for name in ("icons", "mme", "taught", "own")}
    icons.prepare(folders["icons"], train=16000, val=100, test=800, seed=77, skills=icons.PRETRAINED)
    icons.write_mme(folders["mme"], 100, seed=78)
    icons.write_mme(folders["taught"], 800, seed=79)
    if not folders["own"].exists():
        folders["own"].mkdir()
        prompt = get_prompt("iconqa-v1")
        for split in ("train", "val", "test"):
            rows = [(q.image, prompt(q)) for q in blipfit_data.load("icons", folders["icons"], split)]
            lines = [{"image": str(image), "question": p.prompt, "answer": p.target} for image, p in rows]
            if split == "train":
                taught = blipfit_data.load("mme", folders["taught"], "test")
                lines += [{"image": str(q.image), "question": q.question, "answer": q.answer} for q in taught]
            elif split == "test":
                lines = lines[:16]  # the test at the end of training is not used
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (folders["own"] / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return folders


def _summarize(scores: Mapping[str, SampleScores]) -> dict[str, Any]:
    return {name: retention_vs_original.summarize(sample_scores) for name, sample_scores in scores.items()}


def _load_results(name: str) -> dict[str, Any]:
    """Load the latest results of that name, or none."""
    files = sorted(measure.RESULTS.glob(f"*-{name}.json"))
    return json.loads(files[-1].read_text(encoding="utf-8")) if files else {}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="tiny-t5")
    parser.add_argument("--sizes", default="34")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--root", type=Path)
    options = parser.parse_args()
    seeds = [int(seed) for seed in options.seeds.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        run(
            options.model,
            options.sizes.split(","),
            seeds,
            options.epochs,
            options.rate,
            options.root or Path(folder),
        )
