"""Makes the embedded miniature models from nothing, by the stages of a pre-training recipe.

1. Tokenizers, trained on the texts of the icon world (`train_tokenizers`).
2. The vision tower with the miniature CLIP (`train_tower`).
3. The Q-Former on top of the frozen tower, without a language model, for both families (`train_queries` and
   `train_relating`).
4. For each family: the language model alone, on text (`train_words`); then Q-Former, projection and language model on
   top of the frozen tower (`train_answers`).

One thread per process is best if several processes share a machine; the two families may then train side by side.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import CLIPProcessor, InstructBlipProcessor, PreTrainedTokenizerBase

from blipfit.data import icons
from blipfit.data.batches import TextEncoder
from blipfit.errors import UserError
from blipfit.model import loading, tiny, tiny_tokenizers
from blipfit.model.backbone import Backbone
from blipfit.pretraining.evaluation import evaluate_miniature, evaluate_questions, sample_questions
from blipfit.pretraining.loop import Log, Losses, StageSchedule, fit, open_log
from blipfit.pretraining.pretrain_language_model import (
    AnswerModules,
    compute_answer_losses,
    compute_lookup_loss,
    initialize_attention,
)
from blipfit.pretraining.pretrain_qformer import QFormerWithHeads, compute_query_losses
from blipfit.pretraining.pretrain_vision_tower import (
    Tower,
    build_batch,
    clear_free_channels,
    copy_to_clip,
    evaluate_tower,
)
from blipfit.pretraining.recipe import RECIPE, PretrainRecipe
from blipfit.pretraining.tasks import Mixture
from blipfit.pretraining.texts import iterate_texts
from blipfit.recipe import ModelConfig


@dataclass(frozen=True)
class StateFiles:
    """The state files of the stages before the answers' stage."""

    tower: Path
    queries: Path
    words: Path


def pretrain_tiny(
    folder: Path,
    recipe: PretrainRecipe = RECIPE,
    families: Sequence[tiny.Family] = ("t5", "vicuna"),
    listener: Log = lambda record: None,
    questions: int = 1400,
    pictures: int = 200,
    curve_questions: int = 280,
) -> dict[tiny.Family, dict[str, Any]]:
    """Make the miniatures and return each family's results on new pictures, see `evaluate_miniature`.

    Writes into `folder`: `tiny-clip`, one model per family, `FAMILY.json` with the results, and `log.jsonl` with the
    learning curve. `listener` gets the same records as the log. During training, the models are evaluated on
    `curve_questions` questions (0: not at all). Starting the same command again continues.
    Raises UserError if `folder/state` belongs to another recipe.
    """
    states = folder / "state"
    _check_recipe(states, recipe)
    if not (folder / tiny.CLIP_NAME / "tokenizer.json").exists():
        train_tokenizers(recipe, folder)

    def stage_log(stage: str) -> Log:
        write = open_log(folder / "log.jsonl", stage=stage)

        def log(record: dict[str, Any]) -> None:
            write(record)
            listener({"stage": stage, **record})

        return log

    tower, queries = states / "tower.safetensors", states / "queries.safetensors"
    train_tower(recipe, folder, tower, stage_log("tower"))
    train_queries(recipe, folder, tower, queries, stage_log("queries"))
    related = states / "related.safetensors"
    train_relating(recipe, folder, tower, queries, related, stage_log("relating"))
    results = {}
    for family in families:
        words, answers = states / f"{family}-words.safetensors", states / f"{family}.safetensors"
        train_words(recipe, family, folder, words, stage_log(f"{family} words"))
        inputs = StateFiles(tower, related, words)
        train_answers(recipe, family, folder, inputs, answers, stage_log(family), curve_questions=curve_questions)
        backbone = loading.load(ModelConfig(name=str(folder / tiny.NAMES[family])))
        results[family] = evaluate_miniature(backbone, recipe.seed + 2, questions, pictures)
        text = json.dumps(results[family], indent=2) + "\n"
        (folder / f"{family}.json").write_text(text, encoding="utf-8")
    return results


def _check_recipe(states: Path, recipe: PretrainRecipe) -> None:
    """Write the recipe's hash into the folder of state files; raises UserError if it belongs to another recipe."""
    file = states / "recipe.txt"
    if file.exists() and file.read_text(encoding="utf-8") != recipe.hash():
        raise UserError(f"{states} belongs to another pre-training recipe; choose another folder or delete this one")
    states.mkdir(parents=True, exist_ok=True)
    file.write_text(recipe.hash(), encoding="utf-8")


def train_tokenizers(recipe: PretrainRecipe, folder: Path) -> None:
    """Train the four tokenizers on the icon world's texts, and write the processors of the miniatures."""
    scenes = (icons.make_scene(recipe.seed - 1, index) for index in range(recipe.tokenizer_scenes))
    texts = [text for scene in scenes for text in iterate_texts(scene, recipe.tokenizer_skills)]
    texts += [" ".join(tiny_tokenizers.COMMON_WORDS)] * 10
    tokenizers: dict[tiny.Family, PreTrainedTokenizerBase] = {
        "t5": tiny_tokenizers.train_t5(texts, recipe.t5_vocabulary),
        "vicuna": tiny_tokenizers.train_llama(texts, recipe.llama_vocabulary),
    }
    qformer = tiny_tokenizers.train_bert(texts, recipe.bert_vocabulary)
    for family, tokenizer in tokenizers.items():
        tiny.save_processor(tiny.processor(tokenizer, qformer), folder / tiny.NAMES[family])
    clip = tiny_tokenizers.train_clip(texts, recipe.clip_vocabulary, tiny.CLIP_TEXT_LENGTH)
    tiny.save_processor(tiny.clip_processor(clip), folder / tiny.CLIP_NAME)


def train_tower(recipe: PretrainRecipe, folder: Path, state_file: Path, log: Log, until: int | None = None) -> None:
    """Train the vision tower into `state_file`, and write the miniature CLIP.

    Like all stages, it continues from `state_file` if that exists, and `until` stops it before that step.
    """
    tokenizer = CLIPProcessor.from_pretrained(folder / tiny.CLIP_NAME, trust_remote_code=False).tokenizer
    torch.manual_seed(recipe.seed)
    clip = tiny.build_clip(tokenizer, recipe.seed)
    tower = Tower(clip)
    batch = recipe.tower.batch

    def losses_at(step: int) -> Losses:
        scenes = [icons.make_scene(recipe.seed, step * batch + row) for row in range(batch)]
        return tower.compute_losses(*build_batch(scenes, tokenizer, recipe.false_captions, step))

    fit(
        tower,
        losses_at,
        recipe.tower,
        state_file,
        log,
        after_step=lambda: clear_free_channels(tower.vision),
        check=lambda: evaluate_tower(tower, tokenizer, recipe.seed + 1),
        until=until,
    )
    tiny.save(copy_to_clip(tower, clip), folder / tiny.CLIP_NAME, {"recipe": recipe.hash(), "stage": "tower"})


def train_queries(
    recipe: PretrainRecipe, folder: Path, tower: Path, state_file: Path, log: Log, until: int | None = None
) -> None:
    """Train the Q-Former into `state_file`, on top of the tower in the state file `tower`."""
    torch.manual_seed(recipe.seed)
    backbone = build_backbone("t5", folder, tower, seed=recipe.seed)
    module = QFormerWithHeads(backbone.hf)
    _fit_qformer(recipe, backbone, module, recipe.queries, recipe.queries_mixture, 0, state_file, log, until)


def train_relating(
    recipe: PretrainRecipe,
    folder: Path,
    tower: Path,
    queries: Path,
    state_file: Path,
    log: Log,
    until: int | None = None,
) -> None:
    """Train the Q-Former of the state file `queries` on more skills, into `state_file`."""
    backbone = build_backbone("t5", folder, tower, queries, seed=recipe.seed)
    module = QFormerWithHeads(backbone.hf)
    _load_heads(module, queries)
    first = recipe.queries.steps
    _fit_qformer(recipe, backbone, module, recipe.relating, recipe.relating_mixture, first, state_file, log, until)


def _fit_qformer(
    recipe: PretrainRecipe,
    backbone: Backbone,
    module: QFormerWithHeads,
    schedule: StageSchedule,
    mixture: Mixture,
    first: int,
    state_file: Path,
    log: Log,
    until: int | None,
) -> None:
    """Train the Q-Former without a language model.

    Step s draws the pictures numbered `first + s`, so that a later stage sees new ones.
    """

    def losses_at(step: int) -> Losses:
        return compute_query_losses(
            backbone.hf, module, backbone.text.qformer_tokenizer, recipe.seed, first + step, schedule.batch, mixture
        )

    fit(module, losses_at, schedule, state_file, log, until=until)


def train_words(
    recipe: PretrainRecipe, family: tiny.Family, folder: Path, state_file: Path, log: Log, until: int | None = None
) -> None:
    """Train a family's language model on text alone, into `state_file`."""
    backbone = build_backbone(family, folder, seed=recipe.seed)
    backbone.hf.train()

    def losses_at(step: int) -> Losses:
        rng = random.Random(f"{recipe.seed}/words/{step}")
        return {"lookups": compute_lookup_loss(backbone, recipe.words.batch, rng)}

    fit(backbone.language, losses_at, recipe.words, state_file, log, until=until)


def train_answers(
    recipe: PretrainRecipe,
    family: tiny.Family,
    folder: Path,
    inputs: StateFiles,
    state_file: Path,
    log: Log,
    until: int | None = None,
    curve_questions: int = 280,
) -> None:
    """Train a family's Q-Former and language model together, and write the miniature.

    The second and third part have state files of their own, `…-last` and `…-reading`. While training, the model is
    evaluated on `curve_questions` questions for the log (0: not at all).
    """
    torch.manual_seed(recipe.seed)
    backbone = build_backbone(family, folder, inputs.tower, inputs.queries, inputs.words, seed=recipe.seed)
    modules = AnswerModules(backbone)
    _load_heads(modules.queries, inputs.queries)

    first = 0
    for schedule, mixture, qformer_factor, file in (
        (recipe.answers, recipe.answers_mixture, recipe.answers_qformer_factor, state_file),
        (recipe.last, recipe.last_mixture, recipe.last_qformer_factor, _add_to_stem(state_file, "last")),
        (recipe.reading, recipe.reading_mixture, 0.0, _add_to_stem(state_file, "reading")),
    ):
        modules.queries.requires_grad_(qformer_factor > 0)

        def losses_at(
            step: int, schedule: StageSchedule = schedule, mixture: Mixture = mixture, first: int = first
        ) -> Losses:
            backbone.hf.train()
            return compute_answer_losses(backbone, modules, recipe.seed, first + step, schedule.batch, mixture)

        fit(
            modules,
            losses_at,
            schedule,
            file,
            log,
            check=lambda: evaluate_quickly(backbone, recipe.seed + 1, curve_questions) if curve_questions else {},
            until=None if until is None else max(0, until - first),
            lr_factors={"queries.": qformer_factor},
        )
        first += schedule.steps
    tiny.save(backbone.hf, folder / tiny.NAMES[family], {"recipe": recipe.hash(), "stage": "answers"})


def _add_to_stem(file: Path, part: str) -> Path:
    return file.with_stem(f"{file.stem}-{part}")


def evaluate_quickly(backbone: Backbone, seed: int, questions: int) -> dict[str, Any]:
    """Return accuracies by ranking on a few new pictures, for the learning curve."""
    known = evaluate_questions(backbone, sample_questions(seed, icons.PRETRAINED, questions))
    held_out = evaluate_questions(backbone, sample_questions(seed, icons.HELD_OUT, questions // 3))
    return {
        "ranked": round(known.accuracy, 4),
        "held_out": round(held_out.accuracy, 4),
        "by_skill": {skill: round(value, 2) for skill, value in {**known.by_skill(), **held_out.by_skill()}.items()},
    }


def build_backbone(
    family: tiny.Family,
    folder: Path,
    tower: Path | None = None,
    queries: Path | None = None,
    words: Path | None = None,
    *,
    seed: int,
) -> Backbone:
    """Build a miniature with the weights of the given state files; the other weights are random.

    `folder` has the tokenizers; `tower`, `queries` and `words` are state files of tower, Q-Former and language model.
    """
    processor = InstructBlipProcessor.from_pretrained(folder / tiny.NAMES[family], trust_remote_code=False)
    hf = tiny.build(family, processor, seed)
    initialize_attention(hf.language_model)
    if tower is not None:
        hf.vision_model.load_state_dict(_load_weights(tower, "vision."))
    if queries is not None:
        hf.qformer.load_state_dict(_load_weights(queries, "qformer."))
        hf.vision_model.post_layernorm.load_state_dict(_load_weights(queries, "post_layernorm."))
        hf.query_tokens.data.copy_(_load_weights(queries, "query_tokens")[""])
    if words is not None:
        hf.language_model.load_state_dict(_load_weights(words, ""), strict=False)  # tied copies are not in the file
    start = loading.decoder_start_id(hf, family)
    text = TextEncoder(processor.qformer_tokenizer, processor.tokenizer, family, start)
    return Backbone(hf, text, family, tiny.NAMES[family])


def _load_heads(module: QFormerWithHeads, state_file: Path) -> None:
    """Load the weights of the three heads from a state file of the Q-Former's stage."""
    module.answer.load_state_dict(_load_weights(state_file, "answer."))
    module.cell.load_state_dict(_load_weights(state_file, "cell."))
    module.named.load_state_dict(_load_weights(state_file, "named."))


def _load_weights(state_file: Path, prefix: str) -> dict[str, torch.Tensor]:
    """Load the weights whose names begin with `prefix`; the keys are the rest of the names."""
    prefix = f"weight.{prefix}"
    weights = load_file(state_file)
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
