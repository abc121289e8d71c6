"""`blipfit prepare`: a data set in its official layout, checked and written as a prepared folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blipfit import data
from blipfit.errors import UserError


def run(
    dataset: str,
    source: str | None,
    to: Path | None,
    questions: int | None = None,
    skills: str | None = None,
    seed: int | None = None,
    allow_outside: bool = False,
    skip_bad: bool = False,
    columns: str | None = None,
) -> Any:
    """Write a prepared folder and return its report. `icons` are drawn; `mme` and `rewardbench` can be.

    Only for data sets that are drawn: `questions` for training (MME: images per subtask; VL-RewardBench: pairs), and
    the `seed`. Only for `icons`: `skills`, a list of `held-out`, `taught`, `every` and names. Only for data that is
    read: `allow_outside` copies images from outside the source. Only for `own`: `skip_bad` leaves bad entries out, and
    `columns` says which columns hold what; the columns are printed on stderr before anything is written.
    Raises UserError if an argument does not fit the data set, or if the source is not the official data.
    """
    target = to or Path("data") / dataset
    data.get_data_set(dataset)  # an unknown name is the first thing to report
    is_drawn = dataset == "icons" or (source == "icons" and not Path(source).exists())
    if not is_drawn and (questions is not None or seed is not None):
        drawable = f", as {dataset} is with --from icons" if dataset in data.DRAWN_COUNTS else ""
        raise UserError(f"{dataset} is read as it is; --questions and --seed are for data that is drawn{drawable}")
    if skills is not None and dataset != "icons":
        raise UserError(f"--skills are those of icons; {dataset} has none to choose")
    if skip_bad and dataset != "own":
        raise UserError(f"--skip-bad is for own data; {dataset} is read whole or not at all")
    if columns is not None and dataset != "own":
        raise UserError(f"--columns is for own data; the columns of {dataset} are known")
    if allow_outside and is_drawn:
        raise UserError("--allow-outside is for data that is read from a folder; these are drawn")
    drawing = {} if seed is None else {"seed": seed}
    if dataset == "icons":
        if source is not None:
            raise UserError("icons are drawn, not read; leave --from out")
        sizes = {} if questions is None else {"train": questions}
        return data.prepare(dataset, target, **sizes, **drawing, **_skills(skills))
    if source is None:
        raise UserError(f"say where the official {dataset} folder is: --from DIR, or --from hub")
    if is_drawn:
        return data.prepare_drawn(dataset, target, questions, **drawing)
    own_options: dict[str, Any] = {}
    if dataset == "own":
        own_options = {"skip_bad": skip_bad, "columns": columns, "announce": _announce}
    return data.prepare(dataset, source, target, allow_outside=allow_outside, **own_options)


def render(report: Any) -> str:
    """The report in words."""
    return str(report)


def _announce(recognized: Mapping[str, Any]) -> None:
    """Print on stderr which columns of own data were recognized, with an example."""
    from blipfit.report import terminal

    screen = terminal.console(stderr=True)
    columns = ", ".join(f"{part}={name}" for part, name in recognized["columns"].items())
    ignored = f"; ignored: {', '.join(recognized['ignored'])}" if recognized["ignored"] else ""
    screen.print(f"format {recognized['format']}; columns: {columns}{ignored}", soft_wrap=True)
    for key, text in recognized["example"].items():
        screen.print(f"  {key}: {text}", soft_wrap=True)


def _skills(text: str | None) -> dict[str, Any]:
    from blipfit.data import icons

    if text is None:
        return {}
    groups = {"held-out": icons.HELD_OUT, "taught": icons.PRETRAINED, "every": tuple(icons.SKILLS)}
    entries = [name.strip() for name in text.split(",")]
    names = list(dict.fromkeys(skill for name in entries for skill in groups.get(name, (name,))))
    if unknown := [name for name in names if name not in icons.SKILLS]:
        raise UserError(
            f"icons have no skill {unknown[0]!r}; write {', '.join(groups)}, or of {', '.join(icons.SKILLS)}"
        )
    return {"skills": names}
