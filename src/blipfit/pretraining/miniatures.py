"""Pre-training of the embedded miniatures: the recipe, and the stages one after the other.

1. Tokenizers, from the texts of the icon world.
2. The vision tower with the miniature CLIP (`pretrain_tower`).
3. The Q-Former on top of the frozen tower, without a language model, for both families (`pretrain_queries`).
4. The language model alone, on text; then Q-Former, projection and language model on top of the frozen tower; each
   family by itself (`pretrain_answers`).

One thread is best where several processes share a machine; the two families may then train side by side.
"""

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import (
    CLIPProcessor,
    InstructBlipProcessor,
    PreTrainedTokenizerBase,
)

from blipfit.data import icons
from blipfit.data.batches import TextEncoder
from blipfit.errors import UserError
from blipfit.model import loading, tiny, tiny_tokenizers
from blipfit.model.backbone import Backbone
from blipfit.pretraining import answers as pretrain_answers
from blipfit.pretraining import check as pretrain_check
from blipfit.pretraining import queries as pretrain_queries
from blipfit.pretraining import texts as pretrain_texts
from blipfit.pretraining import tower as pretrain_tower
from blipfit.pretraining.loop import Schedule, fit, json_lines
from blipfit.pretraining.tasks import Mixture
from blipfit.recipe import ModelConfig

Log = Callable[[dict], None]


# What the tokenizers are trained on, and what the Q-Former learns first.
SEEING = (
    *("count_all", "count_kind", "color", "shape", "exists", "relation", "bigger", "size"),
    *("where", "shape_at", "color_at", "beside", "time", "scale"),
)
# Reasoning over two things is what takes longest, so it is asked most often.
SLOW = ("relation", "size", "where", "count_kind", "beside", "count_all", "bigger")
# The Q-Former's own stages: no captions, and counts in MME's wording as often as the rest.
ALONE = Mixture(asks=5, counts=4.0, caption=0.0, named=4.0, hard=3.0)
LOOKING = replace(ALONE, skills=SEEING, options=0.3, hard_skills=(*SLOW, "time", "scale"))
# Then what several icons have to do with each other; other pictures than before show it.
BLOCKS = ("end", "side", "flank", "times", "mark", "all")
PLANS = ("line", "pattern", "pair", "odd")
RELATING = replace(ALONE, plans=PLANS, options=0.5, hard_skills=(*BLOCKS, *SLOW))
TOGETHER = Mixture(
    plans=PLANS,
    options=0.75,
    yes_no=1.2,
    counts=3.0,
    caption=0.5,
    heads=1.0,
    named=4.0,
    blank=0.05,
    lookups=16,
    hard=3.0,
    hard_skills=(*BLOCKS, *SLOW),
)


# At last what was weakest after that: whether so many are there, letters in one's own words, and the slowest skills.
LAST = replace(
    TOGETHER,
    counts=6.0,
    lookups=32,
    hard=4.0,
    hard_skills=("flank", "mark", "beside", "times", "count_all", "count_kind"),
)


# The Q-Former stays as it is now, and the language model learns to trust it.
READING = replace(LAST, misread=0.5)


@dataclass(frozen=True)
class PretrainRecipe:
    """Everything that decides the miniatures' weights; its hash is recorded in every checkpoint."""

    version: int = 2
    seed: int = 20_260_101
    token_scenes: int = 6000
    token_skills: tuple[str, ...] = (*SEEING, *BLOCKS, *icons.HELD_OUT)
    t5_pieces: int = 1152
    llama_pieces: int = 1408
    bert_pieces: int = 1024
    clip_pieces: int = 1024
    tower: Schedule = field(default_factory=lambda: Schedule(steps=1000, batch=64, lr=1.5e-3))
    wrong_captions: int = 1
    """Captions with a planted error, for every picture of the tower's stage."""

    queries: Schedule = field(default_factory=lambda: Schedule(steps=3000, batch=16, lr=1.5e-3))
    looking: Mixture = LOOKING
    """What is asked of a picture in the Q-Former's own stage."""
    relating: Schedule = field(default_factory=lambda: Schedule(steps=3000, batch=16, lr=1.5e-3))
    related: Mixture = RELATING
    """The second half of that stage: more skills."""
    words: Schedule = field(default_factory=lambda: Schedule(steps=700, batch=96, lr=2e-3))
    """The language model's stage without pictures; `batch` counts questions."""
    answers: Schedule = field(default_factory=lambda: Schedule(steps=1000, batch=16, lr=1e-3))
    """The stage of Q-Former and language model together; `batch` counts pictures."""
    together: Mixture = TOGETHER
    gently: float = 0.2
    """Fraction of the rate at which the Q-Former, which knows its work by then, learns beside the language model."""
    last: Schedule = field(default_factory=lambda: Schedule(steps=700, batch=16, lr=1e-3))
    lasting: Mixture = LAST
    last_gently: float = 0.5
    reading: Schedule = field(default_factory=lambda: Schedule(steps=500, batch=16, lr=1e-3))
    read: Mixture = READING

    def hash(self) -> str:
        """The first 16 hexadecimal digits of SHA-256 over the recipe as sorted JSON."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


RECIPE = PretrainRecipe()


def train_tokenizers(recipe: PretrainRecipe, target: Path) -> None:
    """Train all four tokenizers on the icon world's texts and write them into the folders of the miniatures."""
    scenes = (icons.scene(recipe.seed - 1, index) for index in range(recipe.token_scenes))
    texts = [text for scene in scenes for text in pretrain_texts.spelled(scene, recipe.token_skills)]
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
    _fit_queries(recipe, backbone, queries, recipe.queries, recipe.looking, 0, state, log, until)


def train_relating(
    recipe: PretrainRecipe, target: Path, tower: Path, queries: Path, state: Path, log: Log, until: int | None = None
) -> None:
    """Go on with the Q-Former in the state file `queries`, on more skills; the result lies in `state`."""
    backbone = untrained("t5", target, tower, queries, seed=recipe.seed)
    module = _with_heads(pretrain_queries.Queries(backbone.hf), queries)
    _fit_queries(recipe, backbone, module, recipe.relating, recipe.related, recipe.queries.steps, state, log, until)


def _fit_queries(
    recipe: PretrainRecipe,
    backbone: Backbone,
    queries: pretrain_queries.Queries,
    schedule: Schedule,
    mixture: Mixture,
    first: int,
    state: Path,
    log: Log,
    until: int | None,
) -> None:
    """Train the Q-Former by itself; its pictures are those from step `first` on."""

    def losses_at(step: int) -> dict[str, torch.Tensor]:
        return pretrain_queries.losses(
            backbone.hf, queries, backbone.text.qformer, recipe.seed, first + step, schedule.batch, mixture
        )

    fit(queries, losses_at, schedule, state, log, until=until)


def _with_heads(queries: pretrain_queries.Queries, state: Path) -> pretrain_queries.Queries:
    """The same with the heads that a state file holds."""
    for name in ("answer", "cell", "named"):
        getattr(queries, name).load_state_dict(_part(state, f"{name}."))
    return queries


def train_words(
    recipe: PretrainRecipe, family: tiny.Family, target: Path, state: Path, log: Log, until: int | None = None
) -> None:
    """Train a family's language model on text alone; the result lies in `state`."""
    backbone = untrained(family, target, seed=recipe.seed)
    backbone.hf.train()

    def losses_at(step: int) -> dict[str, torch.Tensor]:
        rng = random.Random(f"{recipe.seed}/words/{step}")
        return {"lookups": pretrain_answers.lookup_loss(backbone, recipe.words.batch, rng)}

    fit(backbone.language, losses_at, recipe.words, state, log, until=until)


@dataclass(frozen=True)
class Before:
    """The state files of the stages before the last one."""

    tower: Path
    queries: Path
    words: Path


def train_answers(
    recipe: PretrainRecipe,
    family: tiny.Family,
    target: Path,
    before: Before,
    state: Path,
    log: Log,
    until: int | None = None,
    checked: int = 280,
) -> None:
    """Train a family's Q-Former and language model together and write the miniature."""
    torch.manual_seed(recipe.seed)
    backbone = untrained(family, target, before.tower, before.queries, before.words, seed=recipe.seed)
    trained = pretrain_answers.Trained(backbone)
    _with_heads(trained.queries, before.queries)

    first = 0
    for schedule, mixture, gently, file in (
        (recipe.answers, recipe.together, recipe.gently, state),
        (recipe.last, recipe.lasting, recipe.last_gently, state.with_stem(f"{state.stem}-last")),
        (recipe.reading, recipe.read, 0.0, state.with_stem(f"{state.stem}-reading")),
    ):
        trained.queries.requires_grad_(gently > 0)

        def losses_at(step: int, schedule: Schedule = schedule, mixture: Mixture = mixture, first: int = first) -> dict:
            backbone.hf.train()
            step += first  # other pictures
            return pretrain_answers.losses(backbone, trained, recipe.seed, step, schedule.batch, mixture)

        fit(
            trained,
            losses_at,
            schedule,
            file,
            log,
            check=lambda: quick_check(backbone, recipe.seed + 1, checked) if checked else {},
            until=None if until is None else max(0, until - first),
            gently={"queries.": gently},
        )
        first += schedule.steps
    tiny.save(backbone.hf, target / tiny.NAMES[family], {"recipe": recipe.hash(), "stage": "answers"})


def untrained(
    family: tiny.Family,
    target: Path,
    tower: Path | None = None,
    queries: Path | None = None,
    words: Path | None = None,
    *,
    seed: int,
) -> Backbone:
    """A miniature with what these state files hold of tower, Q-Former and language model; the rest is random."""
    parts = InstructBlipProcessor.from_pretrained(target / tiny.NAMES[family])
    hf = tiny.build(family, parts, seed)
    pretrain_answers.head_start(hf.language_model)
    if tower is not None:
        hf.vision_model.load_state_dict(_part(tower, "vision."))
    if queries is not None:
        hf.qformer.load_state_dict(_part(queries, "qformer."))
        hf.vision_model.post_layernorm.load_state_dict(_part(queries, "post_layernorm."))
        hf.query_tokens.data.copy_(_part(queries, "query_tokens")[""])
    if words is not None:
        hf.language_model.load_state_dict(_part(words, ""), strict=False)  # tied copies are not in the file
    start = loading.decoder_start(hf, family)
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
    target: Path,
    recipe: PretrainRecipe = RECIPE,
    families: Sequence[tiny.Family] = ("t5", "vicuna"),
    listen: Log = lambda record: None,
    questions: int = 1400,
    pictures: int = 200,
    checked: int = 280,
) -> dict[tiny.Family, dict]:
    """Make the miniatures in `target`: `tiny-clip` and one folder a family, `log.jsonl` with the curve.

    Starting the same command again continues; what `target/state` holds of another recipe is refused (`UserError`).
    Returns what each family answers right on so many fresh `questions` and, in MME's wording, `pictures`
    (`pretrain_check.measure`), and writes it as `FAMILY.json`. The curve is checked on `checked` questions.
    """
    state = target / "state"
    _claim(state, recipe)
    if not (target / tiny.CLIP_NAME / "tokenizer.json").exists():
        train_tokenizers(recipe, target)

    def log(stage: str) -> Log:
        keep = json_lines(target / "log.jsonl", stage=stage)

        def both(record: dict) -> None:
            keep(record)
            listen({"stage": stage, **record})

        return both

    tower, queries = state / "tower.safetensors", state / "queries.safetensors"
    train_tower(recipe, target, tower, log("tower"))
    train_queries(recipe, target, tower, queries, log("queries"))
    related = state / "related.safetensors"
    train_relating(recipe, target, tower, queries, related, log("relating"))
    measured = {}
    for family in families:
        words = state / f"{family}-words.safetensors"
        train_words(recipe, family, target, words, log(f"{family} words"))
        before, done = Before(tower, related, words), state / f"{family}.safetensors"
        train_answers(recipe, family, target, before, done, log(family), checked=checked)
        measured[family] = measure(target / tiny.NAMES[family], recipe.seed + 2, questions, pictures)
        text = json.dumps(measured[family], indent=2) + "\n"
        (target / f"{family}.json").write_text(text, encoding="utf-8")
    return measured


def measure(folder: Path, seed: int, questions: int = 1400, pictures: int = 200) -> dict:
    """What a finished miniature is judged by (`pretrain_check.measure`), read back from its folder."""
    return pretrain_check.measure(loading.load(ModelConfig(name=str(folder))), seed, questions, pictures)


def _claim(state: Path, recipe: PretrainRecipe) -> None:
    """Write the recipe's hash into the state folder, or refuse a folder of another recipe."""
    mark = state / "recipe.txt"
    if mark.exists() and mark.read_text(encoding="utf-8") != recipe.hash():
        raise UserError(f"{state} belongs to another pre-training recipe; give another folder or delete this one")
    state.mkdir(parents=True, exist_ok=True)
    mark.write_text(recipe.hash(), encoding="utf-8")
