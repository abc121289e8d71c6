"""Everything that has to be measured on a GPU, within a given time: `python -m benchmarks.gpu --minutes 6`.

Needs torch, transformers, peft and accelerate; nothing is downloaded, and models have random weights. Parts, in this
order: `tests` (those marked gpu), then for Flan-T5-XL and Vicuna-7B `peers` (Trainer + peft, the original protocol),
`banks` (1 to 16 experiments in one pass, with memory predicted and measured), `settings` (each speed-up on and off),
`ranking` and `profile` (where the time of a step goes). What does not fit into the time is skipped and listed. The
record is written after every measurement, so a run that is stopped leaves what it has.

Questions are shaped like ScienceQA's: 16 a step, 106 tokens of text, answers of 5, four candidates.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from benchmarks import bank, full_size, measure
from benchmarks.peers import OriginalPeer, TrainerPeer
from blipfit import grid
from blipfit.adapters import count
from blipfit.data.encoded_split import EncodedSplit
from blipfit.model.backbone import Backbone
from blipfit.model.image_features import ImageFeatures
from blipfit.recipe import Family, Recipe
from blipfit.training import plan
from blipfit.training.step import Stepper

PARTS = ("tests", "peers", "banks", "settings", "ranking", "profile")
BANKS = (1, 2, 4, 8, 16)
WARM_UP, STEPS = 2, 6
RANKED_QUESTIONS = 64
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
FIRST_FULL: dict[Family, int] = {"t5": 1, "vicuna": 33}
"""The first of a family's 12 experiments that train all of the Q-Former; setting "full Q-Former"."""
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


class Record:
    """What was measured so far, on disk after every entry."""

    def __init__(self, path: Path, minutes: float, scale: str):
        self.path, self.deadline = path, time.monotonic() + 60 * minutes
        self.entries: dict[str, Any] = {
            "name": "gpu",
            "scale": scale,
            "machine": measure.machine(),
            "skipped": [],
            "failed": {},
        }

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def add(self, name: str, estimate: float, action: Callable[[], Any]) -> Any:
        """Run and record an action that takes about so many seconds; None where it was skipped or failed."""
        if self.left() < estimate:
            self.entries["skipped"].append(name)
            print(f"{name}: skipped, {self.left():.0f} s left", flush=True)
            self.write()
            return None
        started = time.monotonic()
        try:
            entry = action()
        except torch.OutOfMemoryError as error:
            entry = {"out_of_memory": str(error).splitlines()[0]}
        except Exception as error:  # one broken measurement must not cost the others
            self.entries["failed"][name] = f"{type(error).__name__}: {error}".splitlines()[0][:500]
            print(f"{name}: FAILED {type(error).__name__}: {str(error)[:600]}", flush=True)
            entry = None
        if entry is not None:
            place = self.entries
            *sections, last = name.split("/")
            for section in sections:
                place = place.setdefault(section, {})
            place[last] = entry
            print(f"{name}: {_summary(entry)}   [{time.monotonic() - started:.1f} s]", flush=True)
        self.write()
        _free()
        return entry

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.entries, indent=1) + "\n", encoding="utf-8")


def run(
    scale: str,
    minutes: float,
    families: Sequence[Family],
    parts: Sequence[str],
    banks: Sequence[int],
    settings: Sequence[tuple[int, str]],
    to: Path,
) -> Record:
    record = Record(to, minutes, scale)
    print(json.dumps(record.entries["machine"]), flush=True)
    if "tests" in parts:
        record.add("tests", 20, lambda: _tests(record.left()))
    device = torch.device(measure.DEVICE)
    rate = record.add("matrix_rate", 5, lambda: full_size.matrix_rate(device))
    for family, _ in measure.LORA:
        if family in families and set(parts) - {"tests"}:
            with tempfile.TemporaryDirectory() as folder:
                _family(record, family, scale, parts, banks, settings, Path(folder), rate or float("nan"))
    return record


def _tests(seconds: float) -> dict[str, Any]:
    """The tests marked gpu, in processes of their own; what they print so far survives a timeout."""
    command = [sys.executable, "-m", "pytest", *TESTS, "-n", str(min(8, (os.cpu_count() or 2) // 2))]
    environment = os.environ | {"OMP_NUM_THREADS": "2"}  # as many threads per process as there are cores are slower
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


def _family(
    record: Record,
    family: Family,
    scale: str,
    parts: Sequence[str],
    banks: Sequence[int],
    settings: Sequence[tuple[int, str]],
    folder: Path,
    rate: float,
) -> None:
    backbone = None

    def build() -> dict[str, Any]:
        nonlocal backbone
        backbone = full_size.build_model(full_size.model_config(family, scale), family, torch.device(measure.DEVICE))
        return {"count": sum(p.numel() for p in backbone.hf.parameters()), "bytes": _allocated()}

    if record.add(f"{family}/parameters", 10, build) is None or backbone is None:
        return
    first = dict(measure.LORA)[family]
    recipes = [grid.recipe("scienceqa", first + i, f"tiny-{family}") for i in range(16)]
    picture = folder / "picture.png"
    Image.effect_noise((224, 224), 64).convert("RGB").save(picture)
    training = recipes[0].training
    size = training.batch_size * training.accumulation
    questions = full_size.random_questions(backbone, picture, size * (WARM_UP + STEPS))
    image_features = ImageFeatures.from_backbone(backbone, "stored", folder / "store")
    image_features.prepare(questions.questions)
    flops = full_size.training_flops(backbone.hf.config) * size

    def bank_entry(members: Sequence[Recipe]) -> dict[str, Any]:
        seconds, peak, losses = bank_seconds(backbone, members, questions, image_features)
        per_experiment = seconds / len(members)
        return {
            "experiments": len(members),
            "step_seconds": seconds,
            "seconds_per_experiment": per_experiment,
            "utilization": flops / per_experiment / rate,
            "peak_bytes": peak,
            "predicted_bytes": _predicted_bytes(backbone, members),
            "ids": [recipe.experiment for recipe in members],
            "first_losses": losses,
        }

    def spread(K: int, setting: str = "plain") -> list[Recipe]:
        assignments = SETTINGS[setting]
        if setting.startswith("full Q-Former"):
            first_full = FIRST_FULL[family]
            return [grid.recipe("scienceqa", first_full + k, f"tiny-{family}").override(assignments) for k in range(K)]
        return [recipes[i * len(recipes) // K].override(assignments) for i in range(K)]

    def measure_banks() -> None:
        for K in banks:
            record.add(f"{family}/banks/{K}", 5 + 1.5 * K, lambda K=K: bank_entry(spread(K)))  # type: ignore[misc]

    def measure_settings() -> None:
        for K, name in settings:
            record.add(
                f"{family}/settings/{K}/{name}",
                (50 if "compile" in name else 10) + 1.5 * K,
                lambda K=K, name=name: bank_entry(spread(K, name)),  # type: ignore[misc]
            )

    single = recipes[len(recipes) // 2]  # one experiment alone takes as long as another

    def measure_peers() -> None:
        record.add(f"{family}/peers/trainer_peft", 20, lambda: _trainer(backbone, single, questions, rate, flops))
        record.add(f"{family}/peers/original_training", 15, lambda: _original(backbone, single, questions, rate, flops))

    def measure_ranking() -> None:
        record.add(f"{family}/ranking/original", 15, lambda: _original_ranking(backbone, single, questions))
        for K in (8, 16):
            record.add(
                f"{family}/ranking/bank of {K}",
                10,
                lambda K=K: _bank_ranking(backbone, spread(K), questions, image_features),  # type: ignore[misc]
            )

    def measure_profiles() -> None:
        profiled = [name for K, name in settings if K == 8]
        for name in profiled:
            record.add(
                f"{family}/profile/{name}",
                100 if "compile" in name and "settings" not in parts else 15,
                lambda name=name: profile(backbone, spread(8, name), questions, image_features),  # type: ignore[misc]
            )

    actions = {
        "banks": measure_banks,
        "peers": measure_peers,
        "settings": measure_settings,
        "ranking": measure_ranking,
        "profile": measure_profiles,
    }
    for part in parts:
        if part in actions:
            actions[part]()
    backbone = None
    _free()


@contextmanager
def stepping(backbone: Backbone, recipes: Sequence[Recipe], questions: Any, image_features: ImageFeatures) -> Any:
    """A function that takes the n-th step of a bank, features read from the store included."""
    stepper = Stepper(backbone, recipes, questions.encoded)
    stepper.train_mode()
    batches = plan.effective_batches(questions.lengths, stepper.training, 0)

    def step(number: int) -> Tensor:
        micros = list(plan.micro_batches(batches[number % len(batches)], stepper.training))
        features = [image_features.features([questions.questions[i] for i in micro]) for micro in micros]
        losses_K, labels = stepper.step(batches[number % len(batches)], features, 0, number)
        return losses_K / labels

    try:
        yield step
    finally:
        stepper.remove()
        backbone.hf.eval()


def bank_seconds(
    backbone: Backbone, recipes: Sequence[Recipe], questions: Any, image_features: ImageFeatures
) -> tuple[float, int | None, list[float]]:
    """Median seconds of a step of the whole bank after a warm-up, the peak of allocated bytes on a GPU, and the losses
    of the first step, which must not depend on the setting or the size of the bank (compiled or padded: on other noise
    alone)."""
    _reset_peak()
    with stepping(backbone, recipes, questions, image_features) as step:
        losses = step(0)
        for number in range(1, WARM_UP):
            step(number)
        times = [measure.seconds(lambda n=n: step(n)) for n in range(WARM_UP, WARM_UP + STEPS)]  # type: ignore[misc]
    return statistics.median(times), _peak(), losses.tolist()


def _predicted_bytes(backbone: Backbone, recipes: Sequence[Recipe]) -> int:
    trained = [count.trained(backbone.hf, backbone.family, recipe.adapter) for recipe in recipes]
    mean = {
        part: sum(each.get(part, 0) for each in trained) // len(trained) for part in {p for t in trained for p in t}
    }
    estimate = count.memory_estimate(
        backbone.hf,
        mean,
        len(recipes),
        full_size.TEXT,
        recipes[0].training.batch_size,
        recipes[0].performance.checkpointing,
    )
    return int(sum(estimate.values()))


def _trainer(backbone: Backbone, recipe: Recipe, questions: Any, rate: float, flops: float) -> dict[str, Any]:
    """Seconds of a step between the Trainer's own step ends, so that its construction does not count."""
    _reset_peak()
    peer = TrainerPeer(backbone, recipe, questions, bf16=backbone.autocast_dtype is not None)
    ends: list[float] = []
    peer.train(WARM_UP + STEPS, lambda: (measure.wait(), ends.append(time.perf_counter())))
    times = [after - before for before, after in zip(ends[WARM_UP - 1 :], ends[WARM_UP:], strict=False)]
    seconds = statistics.median(times)
    return {"step_seconds": seconds, "utilization": flops / seconds / rate, "peak_bytes": _peak()}


def _original(backbone: Backbone, recipe: Recipe, questions: Any, rate: float, flops: float) -> dict[str, Any]:
    _reset_peak()
    peer = OriginalPeer(backbone, recipe, questions)
    with _autocast(backbone):
        peer.train(WARM_UP)
        seconds = measure.seconds(lambda: peer.train(STEPS)) / STEPS
    return {"step_seconds": seconds, "utilization": flops / seconds / rate, "peak_bytes": _peak()}


def _original_ranking(backbone: Backbone, recipe: Recipe, questions: Any) -> dict[str, Any]:
    peer = OriginalPeer(backbone, recipe, questions)
    few = range(16)
    with _autocast(backbone):
        peer.rank(range(2))
        seconds = measure.seconds(lambda: peer.rank(few)) / len(few)
    return {"question_seconds": seconds}


def _bank_ranking(
    backbone: Backbone, recipes: Sequence[Recipe], questions: Any, image_features: ImageFeatures
) -> dict[str, Any]:
    ranked = EncodedSplit(questions.questions[:RANKED_QUESTIONS], [], questions.encoded[:RANKED_QUESTIONS])
    _reset_peak()
    bank.rank(backbone, recipes, EncodedSplit(ranked.questions[:16], [], ranked.encoded[:16]), image_features)
    seconds = measure.seconds(lambda: bank.rank(backbone, recipes, ranked, image_features)) / len(ranked)
    return {"question_seconds": seconds, "seconds_per_experiment": seconds / len(recipes), "peak_bytes": _peak()}


def profile(
    backbone: Backbone, recipes: Sequence[Recipe], questions: Any, image_features: ImageFeatures
) -> dict[str, Any]:
    """Where the time of one step goes: the longest kernels, and how long the device was busy."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    on_gpu = measure.DEVICE == "cuda"
    with stepping(backbone, recipes, questions, image_features) as step:
        for number in range(WARM_UP):
            step(number)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        with profiler(activities=activities, acc_events=True) as trace:
            wall = measure.seconds(lambda: step(WARM_UP))
    averages = trace.key_averages()
    kernels = [a for a in averages if a.device_type == torch.autograd.DeviceType.CUDA] if on_gpu else list(averages)
    cost = {a.key: a.self_device_time_total if on_gpu else a.self_cpu_time_total for a in kernels}
    calls = {a.key: a.count for a in kernels}
    longest = sorted(cost, key=lambda key: -cost[key])[:30]
    busy = sum(cost.values()) / 1e6
    for key in longest[:18]:
        print(f"  {cost[key] / 1e3:9.2f} ms {calls[key]:6} x {key[:130]}", flush=True)
    return {
        "experiments": len(recipes),
        "wall_seconds": wall,
        "busy_seconds": busy,
        "kernels": sum(calls.values()),
        "longest": [{"name": key[:200], "seconds": cost[key] / 1e6, "calls": calls[key]} for key in longest],
    }


@contextmanager
def _autocast(backbone: Backbone) -> Any:
    with torch.autocast(backbone.device.type, backbone.autocast_dtype, enabled=backbone.autocast_dtype is not None):
        yield


def _allocated() -> int | None:
    return torch.cuda.memory_allocated() if measure.DEVICE == "cuda" else None


def _peak() -> int | None:
    return torch.cuda.max_memory_allocated() if measure.DEVICE == "cuda" else None


def _reset_peak() -> None:
    if measure.DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _free() -> None:
    gc.collect()  # accelerate binds a model's forward to itself, a circle that only the collector opens
    if measure.DEVICE == "cuda":
        torch.cuda.empty_cache()


def _summary(entry: Any) -> str:
    if not isinstance(entry, dict):
        return f"{entry:.4g}" if isinstance(entry, float) else str(entry)
    texts = []
    for key, value in entry.items():
        if key.endswith("bytes") and value is not None:
            texts.append(f"{key} {value / 1e9:.1f} GB")
        elif isinstance(value, float):
            texts.append(f"{key} {value:.4g}")
        elif not isinstance(value, list):
            texts.append(f"{key} {value}")
    return ", ".join(texts)


if __name__ == "__main__":
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
        sys.exit("no GPU here; --scale tiny rehearses the same with the miniatures")
    run(
        options.scale,
        options.minutes,
        options.families.split(","),
        options.parts.split(","),
        [int(K) for K in options.banks.split(",")],
        [(int(entry.partition(":")[0]), entry.partition(":")[2]) for entry in options.settings.split(",")],
        options.to or measure.RESULTS / f"{time.strftime('%Y-%m-%d')}-gpu.json",
    )
