"""What a shrunk miniature keeps after recovery training, from most of its Q-Former to a few per cent.

Each size is shrunk, then its Q-Former is trained with the ordinary loop to see as the original does, on pictures and
questions like those that the original was taught: the icon world's in its prompt and MME's yes/no questions. Labels are
not used. Both are evaluated on fresh pictures by the whole model. Results are kept after every run, so that what was
stopped is continued.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from blipfit import data as datasets
from blipfit.commands import shrink as shrinking
from blipfit.data import icons
from blipfit.data.icons import write
from blipfit.data.prompts import prompt
from blipfit.evaluation import retention
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
"""By their share of the Q-Former's parameters in per cent."""


def run(model: str, sizes: list[str], seeds: list[int], epochs: int, rate: float, root: Path) -> dict[str, Any]:
    """Shrink, recover and judge every size with every seed; returns and keeps all results of the model so far."""
    name = f"shrink-recovery-{Path(model).name}"
    folders = _data(root / "data")
    sets = [("icons", folders["icons"]), ("mme", folders["mme"])]
    (base,) = retention.answers([model], sets, "cpu")
    for size in sizes:
        for seed in seeds:
            row = _recovered(model, size, seed, epochs, rate, root, folders, sets, base)
            row |= {"epochs": epochs, "rate": rate, "world": write.VERSION, "original": _told(base)}
            found = _kept(name)  # another process may have added to it meanwhile
            found["model"] = Path(model).name
            found.setdefault("runs", {})[f"{size}/{seed}"] = row
            measure.keep(name, found)
            print(f"{size} % seed {seed}: {json.dumps(row['kept'])}", flush=True)
    return _kept(name)


def _recovered(
    model: str,
    size: str,
    seed: int,
    epochs: int,
    rate: float,
    root: Path,
    folders: dict[str, Path],
    sets: Any,
    base: Any,
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
    (one,) = train([recipe], folders["own"], root / "results", device="cpu", model_cache=model_cache)
    untrained, trained = retention.answers([str(to), str(one.folder)], sets, "cpu")
    before, after = shapes.on_meta(model), shapes.on_meta(str(to))
    return {
        "shares": {
            "parameters": costs.qformer_parameters(after) / costs.qformer_parameters(before),
            "flops": costs.query(after.config, 40) / costs.query(before.config, 40),
        },
        "accuracy": {"shrunk": _told(untrained), "recovered": _told(trained)},
        "kept": {what: retention.retained(base[what], trained[what])["corrected"] for what in base},
        "kept_untrained": {what: retention.retained(base[what], untrained[what])["corrected"] for what in base},
        "seconds": one.result()["seconds"],
    }


def _data(root: Path) -> dict[str, Path]:
    """Icons to judge and calibrate on, MME's form to judge on, and own data to recover on; drawn apart."""
    places = {name: root / name for name in ("icons", "mme", "taught", "own")}
    icons.prepare(places["icons"], train=16000, val=100, test=800, seed=77, skills=icons.PRETRAINED)
    icons.write_mme(places["mme"], 100, seed=78)
    icons.write_mme(places["taught"], 800, seed=79)
    if not places["own"].exists():
        places["own"].mkdir()
        asked = prompt("iconqa-v1")
        for split in ("train", "val", "test"):
            rows = [(q.image, asked(q)) for q in datasets.load("icons", places["icons"], split)]
            lines = [{"image": str(image), "question": p.prompt, "answer": p.target} for image, p in rows]
            if split == "train":
                taught = datasets.load("mme", places["taught"], "test")
                lines += [{"image": str(q.image), "question": q.question, "answer": q.answer} for q in taught]
            elif split == "test":
                lines = lines[:16]  # the loop's own test is not what counts here
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (places["own"] / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return places


def _told(answered: Any) -> dict[str, Any]:
    return {what: retention.told(one) for what, one in answered.items()}


def _kept(name: str) -> dict[str, Any]:
    """The latest results of that name, to be continued."""
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
