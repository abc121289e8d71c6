"""Pre-training of the embedded miniatures: the recipe, and the stages one after the other.

1. Tokenizers, from the texts of the icon world.
2. The vision tower with the miniature CLIP (`pretrain_tower`).
3. The Q-Former on top of the frozen tower, without a language model, for both families (`pretrain_queries`).
4. Q-Former, projection and language model on top of the frozen tower, each family by itself (`pretrain_answers`).

One thread is best where several processes share a machine; the two families may then train side by side.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import CLIPProcessor, InstructBlipProcessor, PreTrainedTokenizerBase

from blipfit.data import icons
from blipfit.data.batches import TextEncoder
from blipfit.errors import UserError
from blipfit.model import tiny, tiny_tokenizers
from blipfit.model.backbone import Backbone
from blipfit.training import pretrain_answers, pretrain_check, pretrain_queries, pretrain_texts, pretrain_tower
from blipfit.training.pretrain_loop import Schedule, fit, json_lines
from blipfit.training.pretrain_tasks import Mixture

Log = Callable[[dict], None]


@dataclass(frozen=True)
class Round:
    """One round of the language model's stage."""

    schedule: Schedule
    mixture: Mixture


# What the first round leaves weakest: naming one thing among others, and comparing two of them.
LATER = Mixture(
    options=0.6,
    yes_no=1.5,
    caption=0.4,
    heads=1.0,
    named=4.0,
    blank=0.08,
    hard=4.0,
    hard_skills=("relation", "size", "where", "count_kind", "beside", "exists"),
)


# Which letter belongs to a known answer: first without any picture, then with all the rest.
LETTERS = Mixture(lookups=96)
TOGETHER = replace(
    LATER,
    options=0.8,
    lookups=32,
    hard_skills=("relation", "size", "bigger", "count_kind", "count_all", "beside"),
)


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

    queries: Schedule = field(default_factory=lambda: Schedule(steps=1200, batch=16, lr=1.5e-3))
    queries_asks: int = 5
    queries_options: float = 0.3
    """What is asked of a picture in the Q-Former's own stage, and how much of it with options."""
    rounds: tuple[Round, ...] = (
        Round(Schedule(steps=1600, batch=20, lr=1e-3), Mixture()),
        Round(Schedule(steps=1300, batch=20, lr=1e-3), LATER),
        Round(Schedule(steps=700, batch=0, lr=1e-3), LETTERS),
        Round(Schedule(steps=1000, batch=20, lr=1e-3), TOGETHER),
    )
    """The language model's stage, in rounds; each warms up and cools down again. `batch` counts pictures."""

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
    tokenizers: dict[tiny.Family, PreTrainedTokenizerBase] = {
        "t5": tiny_tokenizers.train_t5(texts, recipe.t5_pieces),
        "vicuna": tiny_tokenizers.train_llama(texts, recipe.llama_pieces),
    }
    qformer = tiny_tokenizers.train_bert(texts, recipe.bert_pieces)
    for family, tokenizer in tokenizers.items():
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


def train_queries(
    recipe: PretrainRecipe, target: Path, tower: Path, state: Path, log: Log, until: int | None = None
) -> None:
    """Train the Q-Former on the tower in the state file `tower`; the result lies in `state`."""
    torch.manual_seed(recipe.seed)
    backbone = untrained("t5", target, tower, seed=recipe.seed)
    queries = pretrain_queries.Queries(backbone.hf)
    mixture = Mixture(asks=recipe.queries_asks, options=recipe.queries_options)

    def losses_at(step: int) -> dict[str, torch.Tensor]:
        return pretrain_queries.losses(
            backbone.hf, queries, backbone.text.qformer, recipe.seed, step, recipe.queries.batch, mixture
        )

    fit(queries, losses_at, recipe.queries, state, log, until=until)


def train_answers(
    recipe: PretrainRecipe,
    family: tiny.Family,
    target: Path,
    before: tuple[Path, Path],
    state: Path,
    log: Log,
    until: int | None = None,
    checked: int = 280,
) -> None:
    """Train a family's Q-Former and language model and write the miniature; `before`: states of tower and Q-Former."""
    torch.manual_seed(recipe.seed)
    backbone = untrained(family, target, *before, seed=recipe.seed)
    trained = pretrain_answers.Trained(backbone)
    trained.queries.answer.load_state_dict(_part(before[1], "answer."))
    trained.queries.cell.load_state_dict(_part(before[1], "cell."))

    first = 0
    for number, one in enumerate(recipe.rounds):

        def losses_at(step: int, first: int = first, one: Round = one) -> dict[str, torch.Tensor]:
            backbone.hf.train()
            return pretrain_answers.losses(
                backbone, trained, recipe.seed, first + step, one.schedule.batch, one.mixture
            )

        fit(
            trained,
            losses_at,
            one.schedule,
            state.with_name(f"{state.stem}-{number}{state.suffix}"),
            log,
            check=lambda: quick_check(backbone, recipe.seed + 1, checked) if checked else {},
            until=None if until is None else until - first,
        )
        first += one.schedule.steps
        metadata = {"recipe": recipe.hash(), "stage": f"answers, round {number + 1} of {len(recipe.rounds)}"}
        tiny.save(backbone.hf, target / tiny.NAMES[family], metadata)
        if until is not None and first >= until:
            break


def untrained(family: tiny.Family, target: Path, tower: Path, queries: Path | None = None, *, seed: int) -> Backbone:
    """A miniature with the trained tower, the trained Q-Former where given, and beyond that random weights."""
    parts = InstructBlipProcessor.from_pretrained(target / tiny.NAMES[family])
    hf = tiny.build(family, parts, seed)
    hf.vision_model.load_state_dict(_part(tower, "vision."))
    if queries is not None:
        hf.qformer.load_state_dict(_part(queries, "qformer."))
        hf.vision_model.post_layernorm.load_state_dict(_part(queries, "post_layernorm."))
        hf.query_tokens.data.copy_(_part(queries, "query_tokens")[""])
    start = 0 if family == "t5" else parts.tokenizer.bos_token_id
    text = TextEncoder(parts.qformer_tokenizer, parts.tokenizer, family, start)
    return Backbone(hf, text, family, tiny.NAMES[family])


def _part(state: Path, prefix: str) -> dict[str, torch.Tensor]:
    """The weights of a state file whose names begin so, without that beginning."""
    prefix = f"weight.{prefix}"
    return {name.removeprefix(prefix): value for name, value in load_file(state).items() if name.startswith(prefix)}


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
    tower, queries = state / "tower.safetensors", state / "queries.safetensors"
    train_tower(recipe, target, tower, json_lines(log, stage="tower"))
    train_queries(recipe, target, tower, queries, json_lines(log, stage="queries"))
    for family in families:
        done = state / f"{family}.safetensors"
        train_answers(recipe, family, target, (tower, queries), done, json_lines(log, stage=family))


def _claim(state: Path, recipe: PretrainRecipe) -> None:
    """Write the recipe's hash into the state folder, or refuse a folder of another recipe."""
    mark = state / "recipe.txt"
    if mark.exists() and mark.read_text(encoding="utf-8") != recipe.hash():
        raise UserError(f"{state} belongs to another pre-training recipe; give another folder or delete this one")
    state.mkdir(parents=True, exist_ok=True)
    mark.write_text(recipe.hash(), encoding="utf-8")
