"""Multiple-choice questions about scenes."""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from blipfit.data.icons.scene import PLANS, Scene, make_scene
from blipfit.data.icons.skills import SKILLS

MAX_CHOICES = 5


@dataclass(frozen=True, slots=True)
class SceneQuestion:
    """One multiple-choice question about one scene."""

    question: str
    choices: tuple[str, ...]
    """Two to five texts, all different."""
    answer_index: int
    """Position of the right choice in `choices`, counted from 0."""
    skill: str
    """A key of `SKILLS`."""

    @property
    def answer(self) -> str:
        """The text of the right choice."""
        return self.choices[self.answer_index]


def check_skills(names: Iterable[str] | None) -> tuple[str, ...]:
    """Return the names of skills as a tuple; None stands for all skills.

    Raises ValueError if a name is not a key of `SKILLS` or if there are no names.
    """
    skills = tuple(SKILLS if names is None else names)
    if not skills:
        raise ValueError(f"no skills given; name at least one of {', '.join(SKILLS)}")
    if unknown := [name for name in skills if name not in SKILLS]:
        raise ValueError(f"unknown skill '{unknown[0]}'; expected one of {', '.join(SKILLS)}")
    return skills


def make_questions(scene: Scene, skills: Iterable[str] | None = None) -> list[SceneQuestion]:
    """Make at most one question per skill about a scene, for every skill that the scene allows.

    `skills` are keys of `SKILLS`; None stands for all. The question of a skill does not depend on the other skills.
    The right choice is equally likely at every position.

    Raises ValueError if a skill is unknown or `skills` is empty.
    """
    return [question for name in check_skills(skills) if (question := _make_question(scene, name)) is not None]


def _make_question(scene: Scene, skill_name: str) -> SceneQuestion | None:
    """Make the question of one skill about a scene, or return None if the scene does not allow it."""
    skill = SKILLS[skill_name]
    if scene.plan not in skill.plans:
        return None
    rng = scene.make_rng(skill_name)
    draft = skill.ask(scene, rng)
    if draft is None:
        return None
    question, answer, pool = draft
    wrong_answers = [option for option in pool if option != answer]
    wrong_choices = rng.sample(wrong_answers, rng.randint(1, min(MAX_CHOICES - 1, len(wrong_answers))))
    index = rng.randint(0, len(wrong_choices))
    return SceneQuestion(question, (*wrong_choices[:index], answer, *wrong_choices[index:]), index, skill_name)


def iterate_questions(
    seed: int, skills: Iterable[str] | None = None, start: int = 0
) -> Iterator[tuple[Scene, SceneQuestion]]:
    """Yield endless pairs of a scene and one question about it; the skills take turns.

    `skills` are keys of `SKILLS`; None stands for all. `start` is the index of the first scene in the series of
    `seed`.

    Raises ValueError, at the first pair, if a skill is unknown or `skills` is empty.
    """
    names = check_skills(skills)
    count, index = 0, start
    while True:
        name = names[count % len(names)]
        rng = random.Random(f"{seed}/{index}/plan")
        plans = SKILLS[name].plans
        plan = rng.choices(plans, [PLANS[plan_name].weight for plan_name in plans])[0]
        scene = make_scene(seed, index, plan=plan)
        question = _make_question(scene, name)
        if question is not None:
            yield scene, question
            count += 1
        index += 1
