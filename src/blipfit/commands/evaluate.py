"""`blipfit evaluate … --on`: a model or a run on several data sets, base and adapter side by side; `blipfit score`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from blipfit import data as datasets
from blipfit.commands import arguments as experiments
from blipfit.data.mme import COGNITION, PERCEPTION
from blipfit.errors import UserError
from blipfit.evaluation import benchmarks, mme, rewardbench
from blipfit.evaluation.benchmarks import BASE, TUNED, EvaluationTask, Settings
from blipfit.evaluation.evaluate import evaluation_features
from blipfit.model import clip, loading, tiny
from blipfit.model.image_features import ImageFeatures
from blipfit.recipe import ModelConfig
from blipfit.report import benchmark_tables as judges
from blipfit.report import terminal
from blipfit.run import Evaluation, Run
from blipfit.runtime import distributed


def run(
    subject: str,
    on: str,
    data: Path | None = None,
    split: str = "test",
    results: Path = Path("results"),
    device: torch.device | None = None,
    limit: int | None = None,
    decoding: str = "greedy",
    samples: int = 0,
    clip_name: str | None = None,
) -> list[dict[str, Any]]:
    """Judge a run folder or a model on every set of `on` (`icons,mme=DIR`); one record a set, written and returned."""
    screen = terminal.console(stderr=True)
    device = device or distributed.device()
    trained = Run(Path(subject))
    recipe = trained.recipe() if trained.recipe_file.exists() else None
    if recipe is not None and trained.state() != "finished":
        raise UserError(f"{subject} is not finished; run the same `blipfit train` again to continue it")
    asked = places(on, data)
    _refuse_trained(asked, split, None if recipe is None else recipe.data.name)
    part = ModelConfig(name=subject) if recipe is None else recipe.model
    loading.locate(part)
    judge = _clip(part.name, clip_name, asked, device)
    if recipe is None:
        backbone = loading.load(part, device=device)
        image_features = ImageFeatures.from_backbone(backbone, "stored")
    else:
        training = recipe.training
        backbone = loading.load(part, training.precision, device, training.max_text_tokens, training.max_target_tokens)
        image_features = evaluation_features(backbone, recipe)
    image_features.announce = lambda sentence: screen.print(sentence, soft_wrap=True)
    tasks = []
    for name, folder in asked:
        own = recipe.data.prompt if recipe is not None and recipe.data.name == name else None
        at = "test" if name == "mme" else split
        tasks.append(benchmarks.read(backbone, name, folder, at, own, limit))

    image_features.prepare([question for task in tasks for question in task.encoded_split.questions])

    def place(task: EvaluationTask) -> Evaluation:
        if recipe is not None:
            return trained.evaluation(task.title)
        return Evaluation.of_model(results, subject, task.title)

    return benchmarks.side_by_side(
        backbone,
        None if recipe is None else trained.adapter,
        tasks,
        image_features.features,
        Settings(decoding=decoding, samples=samples, clip=judge),
        place,
        {"run": None if recipe is None else subject},
        None if recipe is None else trained.result()["adapter_sha256"],
        lambda sentence: screen.print(sentence, soft_wrap=True),
    )


def places(on: str, data: Path | None) -> list[tuple[str, Path]]:
    """`icons,mme=DIR` as names with their folders; what can be drawn is drawn where its default folder is absent."""
    asked = [part.strip().partition("=") for part in on.split(",") if part.strip()]
    names = [name for name, _, _ in asked]
    if not asked:
        raise UserError("say on what: --on icons, or --on icons,mme=DIR")
    if len(set(names)) < len(names):
        raise UserError(f"--on {on} names a data set twice")
    if data is not None and len(asked) > 1:
        raise UserError("--data names one folder and --on several data sets; write --on icons=DIR,mme=DIR")
    for name in names:
        datasets.dataset(name)
    return [(name, experiments.data_folder(name, Path(place) if place else data)) for name, _, place in asked]


def _refuse_trained(asked: Sequence[tuple[str, Path]], split: str, trained_on: str | None) -> None:
    if split == "all" and (odd := [name for name, _ in asked if name not in ("rewardbench", "mme")]):
        raise UserError(f"--split all is for rewardbench, not for {', '.join(odd)}; choose train, val or test")
    if split == "all" and trained_on == "rewardbench":
        raise UserError("this run was trained on rewardbench's split train; judge it with --split test")


def _clip(model: str, name: str | None, asked: Sequence[tuple[str, Path]], device: torch.device) -> clip.Clip | None:
    """The CLIP that judges texts: the miniature one for miniatures, else only one that is asked for."""
    chosen = name or (tiny.CLIP_NAME if model in tiny.NAMES.values() else None)
    if chosen is None or not {name for name, _ in asked} & {"rewardbench", "own"}:
        return None
    return clip.load(chosen, device)


# --------------------------------------------------------------------- shown


def shown(records: Sequence[Mapping[str, Any]]) -> list[Any]:
    """One table over all sets: base, tuned, difference."""
    table = Table(title=f"{records[0]['run'] or records[0]['model']}", title_justify="left")
    tuned = TUNED in records[0]
    for column in ("on", "measure"):
        table.add_column(column)
    for column in ("questions", "base", *(("with adapter", "difference [95 %]") if tuned else ())):
        table.add_column(column, justify="right")
    for record in records:
        told = {who: _measures(record[who]) for who in (BASE, TUNED) if who in record}
        for number, measure in enumerate(told[BASE]):
            first = [f"{record['on']} {record['split']}" if not number else "", measure]
            row = [*first, str(record["questions"]) if not number else "", told[BASE][measure]]
            if tuned:
                row += [told[TUNED][measure], _difference(record["difference"].get(_DIFFERENCES.get(measure, "")))]
            table.add_row(*row, end_section=number == len(told[BASE]) - 1)
    lines: list[Any] = [table]
    for record in records:
        lines.append(f"{record['on']}: prompt {record['prompt']}, one in full: {record['prompt_example']!r}")
        if missing := record[BASE].get("missing"):
            lines.append(f"{record['on']}: not in the totals, no questions: {', '.join(missing)}")
        if cut := record[BASE].get("cut_responses"):
            lines.append(
                f"{record['on']}: {cut} responses are longer than the model reads; their likelihood is of the part read"
            )
        if record["on"] in ("rewardbench", "own") and record["clip"] is None:
            lines.append(f"{record['on']}: no CLIP score; --clip {clip.DEFAULT} gives one")
    return lines


_DIFFERENCES = {
    "accuracy": "accuracy",
    "perception": "perception",
    "cognition": "cognition",
    "pairwise accuracy, sum": "pairwise_sum",
    "pairwise accuracy, mean": "pairwise_mean",
    "ROUGE-L": "rougeL",
    "exact match": "exact",
    "CLIP score": "clip_score",
}


def _measures(metrics: Mapping[str, Any]) -> dict[str, str]:
    """What a set is told by, name → number with its interval."""
    if metrics.get("judge") == "mme":
        return _totals(metrics) | {f"· {name}": f"{one['score']:.2f}" for name, one in metrics["subtasks"].items()}
    if metrics.get("judge") == "rewardbench":
        both = {
            f"pairwise accuracy, {how}": terminal.percent(metrics[f"likelihood_{how}"]["pooled"])
            for how in ("sum", "mean")
        }
        if "judgements" in metrics:
            both["accuracy of judgements"] = terminal.percent(metrics["judgements"]["pooled"])
        return both | _texts(metrics["answers"])
    if metrics["method"] == "generation":
        return _texts(metrics)
    return {"accuracy": terminal.percent(metrics)}


def _totals(metrics: Mapping[str, Any]) -> dict[str, str]:
    """MME's totals of which there is a subtask."""
    totals = {"perception": PERCEPTION, "cognition": COGNITION}
    return {name: f"{metrics[name]:.2f}" for name, of in totals.items() if set(of) & metrics["subtasks"].keys()}


def _texts(metrics: Mapping[str, Any]) -> dict[str, str]:
    found = metrics["texts"]["rougeL"]
    told = {"ROUGE-L": terminal.interval(found["mean"], found["interval"], 100)}
    if "clip_score" in metrics:
        score = metrics["clip_score"]
        told["CLIP score"] = terminal.interval(score["mean"], score["interval"])
    return told | {"exact match": terminal.percent(metrics)}


def _difference(found: Mapping[str, Any] | None) -> str:
    if not found or found["difference"] is None:
        return ""
    if found["interval"] is None:
        return f"{found['difference']:+.2f}"
    low, high = found["interval"]
    return f"{found['difference']:+.1f} [{low:+.1f}–{high:+.1f}]"


# --------------------------------------------------------------------- score


def score(judge: str, source: Path, samples: int | None) -> tuple[dict[str, Any], list[Any]]:
    """Score finished answers without a model; the record and what a person reads."""
    if judge == "mme":
        record = mme.score_mme(source)
        return record, judges.mme(record)
    if judge == "rewardbench":
        record = rewardbench.score_rewardbench(source, samples)
        return record, judges.rewardbench(record)
    raise UserError(
        f"unknown judge {judge!r}; known: mme (a folder of answer files), rewardbench (a file of judgements)"
    )
