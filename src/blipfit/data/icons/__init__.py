"""Icons: an endless, deterministic data set of small generated pictures with questions about them."""

from blipfit.data.icons.draw import draw
from blipfit.data.icons.icon_data_sets import VERSION, load, prepare, write_mme, write_preferences
from blipfit.data.icons.questions import SceneQuestion, iterate_questions, make_questions
from blipfit.data.icons.scene import BACKGROUNDS, COLORS, KINDS, PLANS, SHAPES, Icon, Scene, make_scene
from blipfit.data.icons.skills import HELD_OUT, PRETRAINED, SKILLS
from blipfit.data.icons.statements import (
    SUBTASKS,
    Preference,
    YesNoPair,
    make_captions,
    make_preference,
    make_yes_no_pairs,
)

__all__ = [
    "BACKGROUNDS",
    "COLORS",
    "HELD_OUT",
    "KINDS",
    "PLANS",
    "PRETRAINED",
    "SHAPES",
    "SKILLS",
    "SUBTASKS",
    "VERSION",
    "Icon",
    "Preference",
    "Scene",
    "SceneQuestion",
    "YesNoPair",
    "draw",
    "iterate_questions",
    "load",
    "make_captions",
    "make_preference",
    "make_questions",
    "make_scene",
    "make_yes_no_pairs",
    "prepare",
    "write_mme",
    "write_preferences",
]
