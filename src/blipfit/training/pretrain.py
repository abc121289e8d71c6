"""Pre-training of the embedded miniatures: the recipe, and the stages one after the other.

1. Tokenizers, from the texts of the icon world.
2. The vision tower with the miniature CLIP (`pretrain_tower`).
3. Q-Former, projection and language model on top of the frozen tower, each family by itself (`pretrain_answers`).

One thread is best where several processes share a machine; the two families may then train side by side.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import CLIPProcessor, InstructBlipProcessor

from blipfit.data import icons
from blipfit.data.batches import TextEncoder
from blipfit.errors import UserError
from blipfit.model import tiny, tiny_tokenizers
from blipfit.model.backbone import Backbone
from blipfit.training import pretrain_answers, pretrain_check, pretrain_texts, pretrain_tower
from blipfit.training.pretrain_answers import Mixture
from blipfit.training.pretrain_loop import Schedule, fit, json_lines

Log = Callable[[dict], None]


@dataclass(frozen=True)
class PretrainRecipe:
    """Everything that decides the miniatures' weights; its hash is recorded in every checkpoint."""

    version: int = 1
    seed: int = 20_260_101
    token_scenes: int = 6000
    t5_pieces: int = 1152
    llama_pieces: int = 1408
    bert_pieces: int = 1024
    clip_pieces: int = 1024
    tower: Schedule = field(default_factory=lambda: Schedule(steps=1000, batch=64, lr=1.5e-3))
    wrong_captions: int = 1
    """Captions with a planted error, for every picture of the tower's stage."""

    answers: Schedule = field(default_factory=lambda: Schedule(steps=2400, batch=32, lr=1e-3))
    """`batch` counts pictures; each is asked `mixture.asks` things."""
    mixture: Mixture = field(default_factory=Mixture)

    def hash(self) -> str:
        """The first 16 hexadecimal digits of SHA-256 over the recipe as sorted JSON."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


RECIPE = PretrainRecipe()


def train_tokenizers(recipe: PretrainRecipe, target: Path) -> None:
    """Train all four tokenizers on the icon world's texts and write them into the folders of the miniatures."""
    scenes = (icons.scene(recipe.seed - 1, index) for index in range(recipe.token_scenes))
    texts = [text for scene in scenes for text in pretrain_texts.spelled(scene)]
    texts += [" ".join(tiny_tokenizers.COMMON_WORDS)] * 10
    families = {
        "t5": tiny_tokenizers.train_t5(texts, recipe.t5_pieces),
        "vicuna": tiny_tokenizers.train_llama(texts, recipe.llama_pieces),
    }
    qformer = tiny_tokenizers.train_bert(texts, recipe.bert_pieces)
    for family, tokenizer in families.items():
        tiny.save_processor(tiny.processor(tokenizer, qformer), target / tiny.NAMES[family])
    clip = tiny_tokenizers.train_clip(texts, recipe.clip_pieces, tiny.CLIP_TEXT_LENGTH)
    tiny.save_processor(tiny.clip_processor(clip), target / tiny.CLIP_NAME)


def train_tower(recipe: PretrainRecipe, target: Path, state: Path, log: Log, until: int | None = None) -> None:
    """Train the tower and write the miniature CLIP; `state` keeps what a later start continues from."""
    tokenizer = CLIPProcessor.from_pretrained(target / tiny.CLIP_NAME).tokenizer
    torch.manual_seed(recipe.seed)
    clip = tiny.build_clip(tokenizer, recipe.seed)
    tower = pretrain_tower.Tower(clip)
    batch = recipe.tower.batch

    def losses_at(step: int) -> dict[str, torch.Tensor]:
        scenes = [icons.scene(recipe.seed, step * batch + row) for row in range(batch)]
        return tower.losses(*pretrain_tower.batch(scenes, tokenizer, recipe.wrong_captions, step))

    fit(
        tower,
        losses_at,
        recipe.tower,
        state,
        log,
        after_step=lambda: pretrain_tower.keep_free_channels(tower.vision),
        check=lambda: pretrain_tower.check(tower, tokenizer, recipe.seed + 1),
        until=until,
    )
    metadata = {"recipe": recipe.hash(), "stage": "tower"}
    tiny.save(pretrain_tower.to_clip(tower, clip), target / tiny.CLIP_NAME, metadata)


def train_answers(
    recipe: PretrainRecipe,
    family: tiny.Family,
    target: Path,
    tower: Path,
    state: Path,
    log: Log,
    until: int | None = None,
    checked: int = 280,
) -> None:
    """Train a family's Q-Former and language model on the tower in the state file `tower`, and write the miniature."""
    torch.manual_seed(recipe.seed)
    backbone = untrained(family, target, tower, recipe.seed)
    backbone.hf.train()

    def losses_at(step: int) -> dict[str, torch.Tensor]:
        backbone.hf.train()
        return pretrain_answers.losses(backbone, recipe.seed, step, recipe.answers.batch, recipe.mixture)

    fit(
        pretrain_answers.Trained(backbone),
        losses_at,
        recipe.answers,
        state,
        log,
        check=lambda: quick_check(backbone, recipe.seed + 1, checked) if checked else {},
        until=until,
    )
    metadata = {"recipe": recipe.hash(), "stage": "answers"}
    tiny.save(backbone.hf, target / tiny.NAMES[family], metadata)


def untrained(family: tiny.Family, target: Path, tower: Path, seed: int) -> Backbone:
    """A miniature with a trained tower and, beyond that, random weights."""
    parts = InstructBlipProcessor.from_pretrained(target / tiny.NAMES[family])
    hf = tiny.build(family, parts, seed)
    weights = load_file(tower)
    prefix = "weight.vision."
    hf.vision_model.load_state_dict(
        {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    )
    start = 0 if family == "t5" else parts.tokenizer.bos_token_id
    text = TextEncoder(parts.qformer_tokenizer, parts.tokenizer, family, start)
    return Backbone(hf, text, family, tiny.NAMES[family])


def quick_check(backbone: Backbone, seed: int, questions: int) -> dict:
    """Accuracies by ranking on a few fresh pictures, for the curve."""
    known = pretrain_check.judge(backbone, pretrain_check.fresh(seed, icons.PRETRAINED, questions))
    held_out = pretrain_check.judge(backbone, pretrain_check.fresh(seed, icons.HELD_OUT, questions // 3))
    return {
        "ranked": round(known.accuracy, 4),
        "held_out": round(held_out.accuracy, 4),
        "by_skill": {skill: round(value, 2) for skill, value in {**known.by_skill(), **held_out.by_skill()}.items()},
    }


def pretrain_tiny(
    target: Path, recipe: PretrainRecipe = RECIPE, families: Sequence[tiny.Family] = ("t5", "vicuna")
) -> None:
    """Make the miniatures in `target`: `tiny-clip` and one folder a family, and `log.jsonl` with the curve.

    Starting the same command again continues; what `target/state` holds of another recipe is refused. The stages
    and families may also run one by one, as long as the tower is first.
    """
    state = target / "state"
    _claim(state, recipe)
    if not (target / tiny.CLIP_NAME / "tokenizer.json").exists():
        train_tokenizers(recipe, target)
    log = target / "log.jsonl"
    train_tower(recipe, target, state / "tower.safetensors", json_lines(log, stage="tower"))
    for family in families:
        train_answers(
            recipe,
            family,
            target,
            state / "tower.safetensors",
            state / f"{family}.safetensors",
            json_lines(log, stage=family),
        )


def _claim(state: Path, recipe: PretrainRecipe) -> None:
    """Write the recipe's hash into the state folder, or refuse a folder of another recipe."""
    mark = state / "recipe.txt"
    if mark.exists() and mark.read_text(encoding="utf-8") != recipe.hash():
        raise UserError(f"{state} belongs to another pre-training recipe; give another folder or delete this one")
    state.mkdir(parents=True, exist_ok=True)
    mark.write_text(recipe.hash(), encoding="utf-8")
