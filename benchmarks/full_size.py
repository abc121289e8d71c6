"""Times models of the published sizes with random weights on one GPU: `python -m benchmarks.full_size`.

Needs torch, transformers and peft, but neither weights nor data. Questions have the sizes of ScienceQA's: batches of
16, 106 tokens of text, answers of 5 tokens, four candidates. Training in a bank of 8 with stored features is compared
with Hugging Face's Trainer and peft, ranking in the bank with ranking one question at a time. It also measures which
share of the rate of a large matrix product the bank's steps reach. `--scale small` takes models of 200 million
parameters, which a CPU can train, in a bank of 4; `--scale tiny` takes the miniatures, to check that everything runs.
"""

import argparse
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import InstructBlipConfig

from benchmarks import bank, measure
from benchmarks.peers import OriginalPeer, TrainerPeer
from blipfit import grid
from blipfit.data.batches import EncodedQuestion
from blipfit.data.encoded_split import EncodedSplit
from blipfit.data.question import Question
from blipfit.model import cost, loading, shapes
from blipfit.model.backbone import Backbone
from blipfit.model.image_features import ImageFeatures
from blipfit.recipe import Family, ModelConfig, Recipe
from blipfit.runtime import onednn

FULL: dict[Family, str] = {"t5": "Salesforce/instructblip-flan-t5-xl", "vicuna": "Salesforce/instructblip-vicuna-7b"}
TEXT, ANSWER, CANDIDATES = 106, 5, 4
"""Tokens of a question, tokens of an answer, and candidates per question."""
LORA_FIELDS = 32
SCALES = {"full": (8, 5), "small": (4, 3), "tiny": (8, 5)}
"""Experiments in a bank, and training steps, by scale."""
_SMALL_VISION = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8}
_SMALL_QFORMER = {**_SMALL_VISION, "num_hidden_layers": 8, "encoder_hidden_size": 512}
_SMALL_TEXT = {
    "t5": {"d_model": 512, "d_ff": 1024, "num_layers": 8, "num_decoder_layers": 8, "num_heads": 8},
    "vicuna": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 12},
}
"""The sizes of the small models; the vocabularies are the published ones."""


def run(scale: str, rounds: int = 3) -> dict[str, Any]:
    """Measure both families; a family that does not fit into memory is reported and skipped."""
    device = torch.device(measure.DEVICE)
    results: dict[str, Any] = {"scale": scale, "matrix_rate": matrix_rate(device)}
    print(f"matrix product: {results['matrix_rate'] / 1e12:.2f} TFLOP/s", flush=True)
    for family, first in measure.FIRST_LORA:
        with tempfile.TemporaryDirectory() as folder:
            bank_size, steps = SCALES[scale]
            ids = range(first, first + 16, 16 // bank_size)
            recipes = [grid.recipe("scienceqa", number, f"tiny-{family}") for number in ids]
            try:
                backbone = build_model(model_config(family, scale), family, device)
                rate = results["matrix_rate"]
                results[family] = measure_family(backbone, recipes, steps, Path(folder), rate, rounds)
            except torch.OutOfMemoryError as error:
                results[family] = {"out_of_memory": str(error)}
                print(f"{family} does not fit: {error}", flush=True)
                continue
            finally:
                if device.type == "cuda":
                    torch.cuda.empty_cache()
            _print_family(family, results[family])
    measure.write_results(f"{scale}-size-{measure.MACHINE_KIND}", results)
    return results


def model_config(family: Family, scale: str) -> Any:
    """Return the configuration of a family's model at a scale: "full", "small" or "tiny"."""
    config = shapes.on_meta(f"tiny-{family}" if scale == "tiny" else FULL[family]).config.to_dict()
    if scale == "small":
        config["vision_config"] |= _SMALL_VISION
        config["qformer_config"] |= _SMALL_QFORMER
        config["text_config"] |= _SMALL_TEXT[family]
        for derived in ("head_dim", "num_key_value_heads"):
            config["text_config"].pop(derived, None)
    if config.get("image_token_index") is None:  # the published checkpoints have one
        config["image_token_index"] = {"t5": 32_100, "vicuna": 32_000}[family]
    return InstructBlipConfig(**config)


def build_model(config: Any, family: Family, device: torch.device) -> Backbone:
    """Build a model with random weights, in the dtypes that `loading.load` gives a checkpoint."""
    text = loading.load(ModelConfig(name=f"tiny-{family}")).text
    low_dtype = loading.low_precision_dtype("auto", device)
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(low_dtype or default_dtype)
    try:
        with device, loading.quiet():
            hf = shapes.initialize(config)
    finally:
        torch.set_default_dtype(default_dtype)
    for weight in (
        hf.query_tokens,
        hf.language_model.lm_head.weight,
    ):  # they are zero at first, and products with zeros may be faster
        torch.nn.init.normal_(weight, std=0.02)
    for part in (hf.qformer, hf.language_projection, hf.vision_model):
        part.float()
    hf.query_tokens.data = hf.query_tokens.data.float()
    if low_dtype is not None:
        loading.halve_tower(hf)
    loading.prepare_model(hf, family, f"random-{family}")
    hf.requires_grad_(False).eval()
    return Backbone(hf, text, family, f"random-{family}", autocast=low_dtype)


def random_questions(backbone: Backbone, picture: Path, count: int) -> EncodedSplit:
    """Make `count` questions of random tokens, all about the same picture."""
    rng = random.Random(0)
    config = backbone.hf.config
    qformer_vocabulary, text_vocabulary = config.qformer_config.vocab_size, config.text_config.vocab_size

    def sample_tokens(length: int, vocabulary: int) -> list[int]:
        ids = [token for token in range(5, min(vocabulary, 30_000)) if token != config.image_token_index]
        return rng.choices(ids, k=length)

    encoded = []
    for _ in range(count):
        prompt = sample_tokens(TEXT, text_vocabulary)
        answers = [sample_tokens(ANSWER, text_vocabulary) for _ in range(CANDIDATES)]
        encoded.append(EncodedQuestion(sample_tokens(TEXT, qformer_vocabulary), prompt, prompt, answers[0], answers))
    questions = [Question(str(i), picture, "", "") for i in range(count)]
    return EncodedSplit(questions, [], encoded)


def measure_family(
    backbone: Backbone, recipes: list[Recipe], steps: int, folder: Path, rate: float, rounds: int
) -> dict[str, Any]:
    """Measure one family: seconds of all sides, speedups, and the bank's share of `rate` (FLOPs per second)."""
    picture = folder / "picture.png"
    Image.effect_noise((224, 224), 64).convert("RGB").save(picture)
    training = recipes[0].training
    train = random_questions(backbone, picture, training.batch_size * training.accumulation * steps)
    val = random_questions(backbone, picture, LORA_FIELDS)
    image_features = ImageFeatures.from_backbone(backbone, "stored", folder / "store")
    image_features.prepare(train.questions)

    def train_bank(size: int) -> None:
        bank.train(backbone, recipes[:size], train, image_features, steps)

    size, peak = _largest_bank(train_bank, len(recipes))
    single = recipes[len(recipes) // 2]  # all experiments take about the same time by themselves
    sides = {"trainer_peft": _trainer_side(backbone, single, train, steps), "bank": lambda: train_bank(size)}
    training_times = measure.time_alternately(sides, rounds)
    sides.clear()  # frees the Trainer's copy of the model before the next copy is made
    sides = {
        "original_ranking": _original_side(backbone, single, val),
        "bank_ranking": lambda: bank.rank(backbone, recipes[:size], val, image_features),
    }
    ranking_times = measure.time_alternately(sides, rounds)
    times = training_times | ranking_times
    per_experiment = times | {name: [t / size for t in times[name]] for name in ("bank", "bank_ranking")}
    flops = training_flops(backbone.hf.config) * len(train)
    return {
        "parameters": sum(p.numel() for p in backbone.hf.parameters()),
        "experiments": size,
        "steps": steps,
        "judged": LORA_FIELDS,
        "seconds_each": per_experiment,
        "against_trainer": measure.compute_speedup(per_experiment["trainer_peft"], per_experiment["bank"]),
        "ranking": measure.compute_speedup(per_experiment["original_ranking"], per_experiment["bank_ranking"]),
        "utilization": sorted(flops / seconds / rate for seconds in per_experiment["bank"]),
        "bank_peak_bytes": peak,
    }


def _trainer_side(backbone: Backbone, recipe: Recipe, encoded_split: EncodedSplit, steps: int) -> Callable[[], None]:
    peer = TrainerPeer(backbone, recipe, encoded_split, bf16=backbone.autocast_dtype is not None)
    return lambda: peer.train(steps)


def _original_side(backbone: Backbone, recipe: Recipe, encoded_split: EncodedSplit) -> Callable[[], None]:
    peer = OriginalPeer(backbone, recipe, encoded_split)

    def rank() -> None:
        with torch.autocast(backbone.device.type, backbone.autocast_dtype, enabled=backbone.autocast_dtype is not None):
            peer.rank(range(LORA_FIELDS))

    return rank


def training_flops(config: Any) -> int:
    """Return the FLOPs of training on one question: the forward pass, and as many for the gradients of the inputs.

    Frozen layers have no gradients of weights; those of the adapters are not counted.
    """
    return 2 * (cost.query(config, TEXT) + cost.answer(config, TEXT, ANSWER))


def _largest_bank(train_bank: Callable[[int], None], size: int) -> tuple[int, int | None]:
    """Halve a bank of `size` until it fits into memory; returns its size and, on a GPU, the peak memory in bytes."""
    while True:
        if measure.DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            train_bank(size)
            return size, torch.cuda.max_memory_allocated() if measure.DEVICE == "cuda" else None
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            torch.cuda.empty_cache()
            size //= 2


def matrix_rate(device: torch.device) -> float:
    """Return the FLOPs per second of a large matrix product, in the dtype and with the library of the frozen layers."""
    width = 8192 if device.type == "cuda" else 1024
    dtype = loading.low_precision_dtype("auto", device) or torch.float32
    matrix = torch.randn(width, width, dtype=dtype, device=device)
    with onednn.onednn_products():
        seconds = measure.time_alternately({"product": lambda: [matrix @ matrix for _ in range(10)]}, 5)["product"]
    return 10 * 2 * width**3 / min(seconds)


def _print_family(family: str, results: dict[str, Any]) -> None:
    model = f"{family}, {results['parameters'] / 1e6:,.0f} million parameters"
    print(f"\n{model}, {results['experiments']} experiments in a bank, time per experiment:")
    measure.print_unit_times(results)
    print(f"  training against peft + Trainer:  {measure.format_speedup(results['against_trainer'])}")
    print(f"  ranking against the original:     {measure.format_speedup(results['ranking'])}")
    print(f"  share of the matrix product's rate: {100 * results['utilization'][-1]:.1f} %", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", choices=list(SCALES), default="full")
    options = parser.parse_args()
    if options.scale == "full" and not torch.cuda.is_available():
        sys.exit("--scale full needs a GPU, and there is none; --scale small runs the same with smaller models")
    run(options.scale)
