"""The world of icons: an endless, deterministic data set of small pictures with questions about them."""

from blipfit.data.icons.draw import draw
from blipfit.data.icons.scene import BACKGROUNDS, COLORS, KINDS, PLANS, SHAPES, Icon, Scene, scene
from blipfit.data.icons.skills import HELD_OUT, PRETRAINED, SKILLS, Ask, asked, questions
from blipfit.data.icons.words import SUBTASKS, Preference, YesNo, captions, preference, yes_no
from blipfit.data.icons.write import VERSION, load, prepare, write_mme, write_preferences

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
    "Ask",
    "Icon",
    "Preference",
    "Scene",
    "YesNo",
    "asked",
    "captions",
    "draw",
    "load",
    "preference",
    "prepare",
    "questions",
    "scene",
    "write_mme",
    "write_preferences",
    "yes_no",
]
