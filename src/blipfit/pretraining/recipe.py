"""The recipe of pre-training: seeds, sizes, schedules and task mixtures of all stages, and their hash."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from blipfit.data import icons
from blipfit.pretraining.loop import StageSchedule
from blipfit.pretraining.tasks import Mixture

# Skills about single icons, clocks and number lines: what the Q-Former learns first.
PERCEPTION_SKILLS = (
    *("count_all", "count_kind", "color", "shape", "exists", "relation", "bigger", "size"),
    *("where", "shape_at", "color_at", "beside", "time", "scale"),
)
# Skills about how several icons are arranged.
ARRANGEMENT_SKILLS = ("end", "side", "flank", "times", "mark", "all")
# Reasoning about two things is learned last, so these skills are sampled most often.
SLOW_SKILLS = ("relation", "size", "where", "count_kind", "beside", "count_all", "bigger")
ARRANGEMENT_PLANS = ("line", "pattern", "pair", "odd")

# The Q-Former's own stages have no captions, and many counts in MME's wording.
QFORMER_MIXTURE = Mixture(
    tasks_per_picture=5, count_factor=4.0, caption_weight=0.0, named_loss_weight=4.0, hard_weight=3.0
)
QUERIES_MIXTURE = replace(
    QFORMER_MIXTURE,
    skills=PERCEPTION_SKILLS,
    options_share=0.3,
    hard_skills=(*SLOW_SKILLS, "time", "scale"),
)
RELATING_MIXTURE = replace(
    QFORMER_MIXTURE,
    plans=ARRANGEMENT_PLANS,
    options_share=0.5,
    hard_skills=(*ARRANGEMENT_SKILLS, *SLOW_SKILLS),
)
ANSWERS_MIXTURE = Mixture(
    plans=ARRANGEMENT_PLANS,
    options_share=0.75,
    yes_no_weight=1.2,
    count_factor=3.0,
    caption_weight=0.5,
    heads_loss_weight=1.0,
    named_loss_weight=4.0,
    blank_share=0.05,
    lookups_per_step=16,
    hard_weight=3.0,
    hard_skills=(*ARRANGEMENT_SKILLS, *SLOW_SKILLS),
)
# More of what is weakest after that: counts in MME's wording, letters of known answers, and the slowest skills.
LAST_MIXTURE = replace(
    ANSWERS_MIXTURE,
    count_factor=6.0,
    lookups_per_step=32,
    hard_weight=4.0,
    hard_skills=("flank", "mark", "beside", "times", "count_all", "count_kind"),
)
# The Q-Former is frozen, and the language model learns to read the answer from the visual tokens.
READING_MIXTURE = replace(LAST_MIXTURE, random_text_share=0.5)

# The hash reads fields under the names that they had when the embedded miniatures were made.
HASHED_NAMES = {
    "tokenizer_scenes": "token_scenes",
    "tokenizer_skills": "token_skills",
    "t5_vocabulary": "t5_pieces",
    "llama_vocabulary": "llama_pieces",
    "bert_vocabulary": "bert_pieces",
    "clip_vocabulary": "clip_pieces",
    "false_captions": "wrong_captions",
    "queries_mixture": "looking",
    "relating_mixture": "related",
    "answers_mixture": "together",
    "answers_qformer_factor": "gently",
    "last_mixture": "lasting",
    "last_qformer_factor": "last_gently",
    "reading_mixture": "read",
    "tasks_per_picture": "asks",
    "options_share": "options",
    "yes_no_weight": "yes_no",
    "count_factor": "counts",
    "caption_weight": "caption",
    "heads_loss_weight": "heads",
    "named_loss_weight": "named",
    "blank_share": "blank",
    "random_text_share": "misread",
    "lookups_per_step": "lookups",
    "hard_weight": "hard",
}


@dataclass(frozen=True)
class PretrainRecipe:
    """Everything that determines the miniatures' weights; its hash is recorded in every checkpoint."""

    version: int = 2
    seed: int = 20_260_101
    tokenizer_scenes: int = 6000
    """Scenes whose texts the tokenizers are trained on."""
    tokenizer_skills: tuple[str, ...] = (*PERCEPTION_SKILLS, *ARRANGEMENT_SKILLS, *icons.HELD_OUT)
    t5_vocabulary: int = 1152
    """Number of tokens; so are the next three."""
    llama_vocabulary: int = 1408
    bert_vocabulary: int = 1024
    clip_vocabulary: int = 1024
    tower: StageSchedule = field(default_factory=lambda: StageSchedule(steps=1000, batch=64, lr=1.5e-3))
    """Stage 1, vision tower and CLIP; `batch` counts pictures."""
    false_captions: int = 1
    """Captions with a false word for every picture of stage 1."""

    queries: StageSchedule = field(default_factory=lambda: StageSchedule(steps=3000, batch=16, lr=1.5e-3))
    """Stage 2, the Q-Former without a language model; `batch` counts pictures."""
    queries_mixture: Mixture = QUERIES_MIXTURE
    relating: StageSchedule = field(default_factory=lambda: StageSchedule(steps=3000, batch=16, lr=1.5e-3))
    """The second half of stage 2, with the skills about arrangements."""
    relating_mixture: Mixture = RELATING_MIXTURE
    words: StageSchedule = field(default_factory=lambda: StageSchedule(steps=700, batch=96, lr=2e-3))
    """Stage 3, the language model without pictures; `batch` counts questions."""
    answers: StageSchedule = field(default_factory=lambda: StageSchedule(steps=1000, batch=16, lr=1e-3))
    """Stage 4, Q-Former and language model together; `batch` counts pictures."""
    answers_mixture: Mixture = ANSWERS_MIXTURE
    answers_qformer_factor: float = 0.2
    """Factor on the learning rate of the Q-Former, which is trained already."""
    last: StageSchedule = field(default_factory=lambda: StageSchedule(steps=700, batch=16, lr=1e-3))
    """The second part of stage 4, with more of the weakest tasks."""
    last_mixture: Mixture = LAST_MIXTURE
    last_qformer_factor: float = 0.5
    reading: StageSchedule = field(default_factory=lambda: StageSchedule(steps=500, batch=16, lr=1e-3))
    """The third part of stage 4, in which the Q-Former is frozen."""
    reading_mixture: Mixture = READING_MIXTURE

    def hash(self) -> str:
        """Return the first 16 hexadecimal digits of SHA-256 over the recipe as sorted JSON."""
        text = json.dumps(_restore_names(asdict(self)), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _restore_names(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        HASHED_NAMES.get(name, name): _restore_names(value) if isinstance(value, dict) else value
        for name, value in fields.items()
    }


RECIPE = PretrainRecipe()
