"""The published sizes with random weights on one GPU: `python -m benchmarks.full_size`.

Needs torch, transformers and peft, no weights and no data. Questions are shaped like ScienceQA's: batches of 16, 106
tokens of text, answers of 5, four candidates. Sides: a bank of 8 with stored features against Hugging Face's Trainer
with peft on the same model; ranking against one question at a time; and how much of a measured matrix product's rate a
bank's steps reach. `--scale small` takes models of 200 million parameters, which a CPU trains too, in a bank of 4;
`--scale tiny` the miniatures, to see that it runs.
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
from blipfit.data.batches import Encoded
from blipfit.data.encoded_split import EncodedSplit
from blipfit.data.question import Question
from blipfit.model import cost, loading, shapes
from blipfit.model.backbone import Backbone
from blipfit.model.image_features import ImageFeatures
from blipfit.recipe import Family, ModelConfig, Recipe
from blipfit.runtime import cpu

FULL: dict[Family, str] = {"t5": "Salesforce/instructblip-flan-t5-xl", "vicuna": "Salesforce/instructblip-vicuna-7b"}
TEXT, ANSWER, CANDIDATES = 106, 5, 4
JUDGED = 32
SCALES = {"full": (8, 5), "small": (4, 3), "tiny": (8, 5)}
"""Experiments in a bank, and steps."""
_SMALL_VISION = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8}
_SMALL_QFORMER = {**_SMALL_VISION, "num_hidden_layers": 8, "encoder_hidden_size": 512}
_SMALL_TEXT = {
    "t5": {"d_model": 512, "d_ff": 1024, "num_layers": 8, "num_decoder_layers": 8, "num_heads": 8},
    "vicuna": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 12},
}
"""What the small models have instead of the published sizes; the vocabularies stay."""


def run(scale: str, rounds: int = 3) -> dict[str, Any]:
    """Both families; a family that does not fit is told so and left out."""
    device = torch.device(measure.DEVICE)
    found: dict[str, Any] = {"scale": scale, "matrix_rate": matrix_rate(device)}
    print(f"matrix product: {found['matrix_rate'] / 1e12:.2f} TFLOP/s", flush=True)
    for family, first in measure.LORA:
        with tempfile.TemporaryDirectory() as folder:
            together, steps = SCALES[scale]
            ids = range(first, first + 16, 16 // together)
            recipes = [grid.recipe("scienceqa", number, f"tiny-{family}") for number in ids]
            try:
                backbone = build_model(model_config(family, scale), family, device)
                found[family] = measure_family(backbone, recipes, steps, Path(folder), found["matrix_rate"], rounds)
            except torch.OutOfMemoryError as error:
                found[family] = {"out_of_memory": str(error)}
                print(f"{family} does not fit: {error}", flush=True)
                continue
            finally:
                if device.type == "cuda":
                    torch.cuda.empty_cache()
            _print_family(family, found[family])
    measure.keep(f"{scale}-size-{measure.KIND}", found)
    return found


def model_config(family: Family, scale: str) -> Any:
    """The shape of a family's model at that scale."""
    config = shapes.on_meta(f"tiny-{family}" if scale == "tiny" else FULL[family]).config.to_dict()
    if scale == "small":
        config["vision_config"] |= _SMALL_VISION
        config["qformer_config"] |= _SMALL_QFORMER
        config["text_config"] |= _SMALL_TEXT[family]
        for derived in ("head_dim", "num_key_value_heads"):
            config["text_config"].pop(derived, None)
    if config.get("image_token_index") is None:  # as the published checkpoints have it
        config["image_token_index"] = {"t5": 32_100, "vicuna": 32_000}[family]
    return InstructBlipConfig(**config)


def build_model(config: Any, family: Family, device: torch.device) -> Backbone:
    """A model of that shape with random weights, in the types that loading gives a checkpoint."""
    text = loading.load(ModelConfig(name=f"tiny-{family}")).text
    low = loading.low_precision("auto", device)
    kind = torch.get_default_dtype()
    torch.set_default_dtype(low or kind)
    try:
        with device, loading.quiet():
            hf = shapes.untrained(config)
    finally:
        torch.set_default_dtype(kind)
    for weight in (hf.query_tokens, hf.language_model.lm_head.weight):  # zeros at first, which multiply too easily
        torch.nn.init.normal_(weight, std=0.02)
    for part in (hf.qformer, hf.language_projection, hf.vision_model.post_layernorm):
        part.float()
    hf.query_tokens.data = hf.query_tokens.data.float()
    loading.prepare(hf, family, f"random-{family}")
    hf.requires_grad_(False).eval()
    return Backbone(hf, text, family, f"random-{family}", autocast=low)


def random_questions(backbone: Backbone, picture: Path, count: int) -> EncodedSplit:
    """Questions of random tokens about one picture."""
    draws = random.Random(0)
    read, spoken = backbone.hf.config.qformer_config.vocab_size, backbone.hf.config.text_config.vocab_size

    def tokens(number: int, vocabulary: int) -> list[int]:
        ordinary = [i for i in range(5, min(vocabulary, 30_000)) if i != backbone.hf.config.image_token_index]
        return draws.choices(ordinary, k=number)

    encoded = []
    for _ in range(count):
        prompt, answers = tokens(TEXT, spoken), [tokens(ANSWER, spoken) for _ in range(CANDIDATES)]
        encoded.append(Encoded(tokens(TEXT, read), prompt, prompt, answers[0], answers))
    questions = [Question(str(i), picture, "", "") for i in range(count)]
    return EncodedSplit(questions, [], encoded)


def measure_family(
    backbone: Backbone, recipes: list[Recipe], count: int, folder: Path, rate: float, rounds: int
) -> dict[str, Any]:
    picture = folder / "picture.png"
    Image.effect_noise((224, 224), 64).convert("RGB").save(picture)
    training = recipes[0].training
    train = random_questions(backbone, picture, training.batch_size * training.accumulation * count)
    val = random_questions(backbone, picture, JUDGED)
    image_features = ImageFeatures.from_backbone(backbone, "stored", folder / "store")
    image_features.prepare(train.questions)

    def steps(size: int) -> None:
        bank.train(backbone, recipes[:size], train, image_features, count)

    size, peak = _largest(steps, len(recipes))
    single = recipes[len(recipes) // 2]  # one experiment alone takes as long as another
    sides = {"trainer_peft": _trainer(backbone, single, train, count), "bank": lambda: steps(size)}
    taken = measure.alternately(sides, rounds)
    sides.clear()  # the Trainer's copy of the model goes before the next comes
    sides = {
        "original_ranking": _original(backbone, single, val),
        "bank_ranking": lambda: bank.rank(backbone, recipes[:size], val, image_features),
    }
    judged = measure.alternately(sides, rounds)
    each = {"trainer_peft": taken["trainer_peft"], "bank": [t / size for t in taken["bank"]]}
    each |= {"original_ranking": judged["original_ranking"], "bank_ranking": [t / size for t in judged["bank_ranking"]]}
    work = training_flops(backbone.hf.config) * len(train)
    return {
        "parameters": sum(p.numel() for p in backbone.hf.parameters()),
        "experiments": size,
        "steps": count,
        "judged": JUDGED,
        "seconds_each": each,
        "against_trainer": measure.ratio(each["trainer_peft"], each["bank"]),
        "ranking": measure.ratio(each["original_ranking"], each["bank_ranking"]),
        "utilization": sorted(work / seconds / rate for seconds in each["bank"]),
        "bank_peak_bytes": peak,
    }


def _trainer(backbone: Backbone, recipe: Recipe, encoded_split: EncodedSplit, count: int) -> Callable[[], None]:
    peer = TrainerPeer(backbone, recipe, encoded_split, bf16=backbone.autocast_dtype is not None)
    return lambda: peer.train(count)


def _original(backbone: Backbone, recipe: Recipe, encoded_split: EncodedSplit) -> Callable[[], None]:
    peer = OriginalPeer(backbone, recipe, encoded_split)

    def rank() -> None:
        with torch.autocast(backbone.device.type, backbone.autocast_dtype, enabled=backbone.autocast_dtype is not None):
            peer.rank(range(JUDGED))

    return rank


def training_flops(config: Any) -> int:
    """FLOPs of training on one question: forward, and as many for what comes back through frozen layers."""
    return 2 * (cost.query(config, TEXT) + cost.answer(config, TEXT, ANSWER))


def _largest(steps: Callable[[int], None], size: int) -> tuple[int, int | None]:
    """The largest bank, of `size` at most, that memory holds, and on a GPU the peak of its training in bytes."""
    while True:
        if measure.DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            steps(size)
            return size, torch.cuda.max_memory_allocated() if measure.DEVICE == "cuda" else None
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            torch.cuda.empty_cache()
            size //= 2


def matrix_rate(device: torch.device) -> float:
    """FLOPs a second of a large matrix product in the type of the frozen layers, by the library that serves them."""
    wide = 8192 if device.type == "cuda" else 1024
    dtype = loading.low_precision("auto", device) or torch.float32
    a = torch.randn(wide, wide, dtype=dtype, device=device)
    with cpu.products():
        taken = measure.alternately({"product": lambda: [a @ a for _ in range(10)]}, 5)["product"]
    return 10 * 2 * wide**3 / min(taken)


def _print_family(family: str, found: dict[str, Any]) -> None:
    size = f"{family}, {found['parameters'] / 1e6:,.0f} million parameters"
    print(f"\n{size}, {found['experiments']} experiments in a bank, an experiment's share:")
    measure.tell_shares(found)
    print(f"  training against Trainer + peft:  {measure.told(found['against_trainer'])}")
    print(f"  ranking against the original:     {measure.told(found['ranking'])}")
    print(f"  of the matrix product's rate:     {100 * found['utilization'][-1]:.1f} %", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", choices=list(SCALES), default="full")
    options = parser.parse_args()
    if options.scale == "full" and not torch.cuda.is_available():
        sys.exit("no GPU here; --scale small runs the same with smaller models")
    run(options.scale)
