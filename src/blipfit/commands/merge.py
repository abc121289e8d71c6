"""`blipfit merge`: an adapter merged into its base model, written as an ordinary checkpoint and compared with it."""

import dataclasses
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from blipfit import data as blipfit_data
from blipfit import disk_space, run_folder
from blipfit.adapters import merge, open_model
from blipfit.adapters.open_model import Source
from blipfit.compression.checkpoint_writer import checkpoint_folder, refuse_existing
from blipfit.data import icons
from blipfit.data.prompts import PromptedQuestion, get_prompt
from blipfit.data.question import Question
from blipfit.errors import UserError
from blipfit.evaluation import ranking
from blipfit.evaluation.ranking import QuestionScores
from blipfit.model import cost, loading, shapes
from blipfit.model.backbone import Backbone
from blipfit.model.image_features import ImageFeatures
from blipfit.recipe import ModelConfig, TrainingConfig
from blipfit.report import terminal

QUESTIONS, BATCH_SIZE, DRAWN_SEED = 32, 8, 7
MAX_DIFFERENCE, MAX_RELATIVE_DIFFERENCE = 1e-3, 1e-5
"""Fp32: most that the log-likelihood of an answer may change by, in nats and as a share of it. Only the order of the
additions differs, which changes the miniatures' log-likelihoods by at most 6e-5; every answer of a wrongly merged model
changes by much more."""
MAX_ROUNDING = 0.2
"""16 bit: most that rounding may change log-likelihoods by, as a share of what the adapter changes (both as the root of
the mean square). The miniatures in bf16 have 0.01 to 0.07; above 0.2 rounding would hide a part of the training."""
RECORD_FILE, README_FILE = "merge.json", "README.md"
_README = """# {base} with a merged adapter

`blipfit merge` made this checkpoint from {base} and an adapter of method {method}. It is an ordinary InstructBLIP.
`merge.json` holds the hashes of both, and how far the scores of this checkpoint are from those of both together.

```python
from transformers import pipeline

pipe = pipeline("image-text-to-text", model="FOLDER")
pipe(images="photo.jpg", text="Question: What is this? Short answer:", return_full_text=False)
```
"""


@dataclass(frozen=True, slots=True)
class CheckQuestions:
    """The questions on which the adapter and the merged model are compared, and where they come from."""

    source: str
    questions: Sequence[Question]
    prompted: Sequence[PromptedQuestion]


def run(
    folder: Path,
    to: Path,
    dtype: str,
    data: Path | None,
    device: torch.device | str,
    model_name: str | None = None,
) -> dict[str, Any]:
    """Merge the adapter of a finished run, or of an adapter folder, into its base model, and write a checkpoint folder.

    `dtype`: of the written weights, a key of `merge.DTYPES`; the merge itself is in fp32. `data`: the run's data folder
    for the comparison. `model_name`: the base model, if it is not where the run was trained. Raises UserError if `to`
    exists, if the run or its base model cannot be used, or if the merged model's scores differ too much from the
    adapter's; then nothing is written.
    """
    if dtype not in merge.DTYPES:
        raise UserError(f"dtype {dtype!r:.100} does not exist; known: {', '.join(merge.DTYPES)}")
    refuse_existing(to)
    source = open_model.locate_adapter(folder, None if model_name is None else ModelConfig(name=model_name))
    quantization = source.model.quantization
    source = dataclasses.replace(source, model=source.model.model_copy(update={"quantization": "none"}))
    _require_space(source.model.name, to, dtype)
    with _check_questions(source, data) as check, run_folder.replacing(to) as temporary:
        record: dict[str, Any] = {"run": str(folder), "to": str(to), "dtype": dtype}
        details, scores = _merge_and_write(source, temporary, dtype, device, check)
        record |= details | {"questions": len(check.questions), "questions_from": check.source}
        written = _load_written(temporary, source, device)
        record |= _compare(check, scores, _score(written, check), dtype)
        record |= {"versions": run_folder.versions(), **_announce_warnings(details["warnings"], quantization)}
        run_folder.write_json(temporary / RECORD_FILE, record)
        run_folder.write_text(temporary / README_FILE, _README.format(**record))
    return record


def render(record: Mapping[str, Any]) -> list[str]:
    """What was written, and how far its scores are from the adapter's."""
    return [
        f"merged {record['run']} ({record['method']}) into {record['base']}: {record['to']}, {record['dtype']}",
        f"compared on {record['questions']} questions ({record['questions_from']}): the same answer to "
        f"{record['same_answers']}; log-likelihoods differ by at most {record['max_difference']:.1e} "
        f"({100 * record['relative_difference']:.2g} % of what the adapter changes)",
        f"use it: blipfit ask IMAGE QUESTION --model {record['to']}",
    ]


def _announce_warnings(warnings: Sequence[str], quantization: str) -> dict[str, list[str]]:
    """Print warnings on stderr, and return them as a part of the record."""
    if quantization != "none":
        warnings = [
            *warnings,
            f"the run trained on {quantization} weights; the adapter was merged into the same weights without "
            "quantization, and is compared on those, so the scores differ from the run's: evaluate the merged model",
        ]
    for warning in warnings:
        terminal.console(stderr=True).print(f"warning: {warning}", soft_wrap=True)
    return {"warnings": list(warnings)}


def _require_space(model: str, to: Path, dtype: str) -> None:
    """Raise UserError if the disk has too little room for the merged weights."""
    parameters = sum(cost.parameters(shapes.on_meta(model)).values())
    disk_space.require_space(to, parameters * merge.DTYPES[dtype].itemsize, f"the files of {to}")


@contextmanager
def _check_questions(source: Source, data: Path | None) -> Iterator[CheckQuestions]:
    """Questions to compare on: of the run's validation split, if its data folder is there, else drawn icons.

    An open question is compared by the likelihood of its reference answer. Raises UserError if `data` cannot be read.
    """
    config = None if source.recipe is None else source.recipe.data
    folder = data or (None if config is None else Path("data") / config.name)
    prompt = get_prompt("vqa-v1" if config is None else config.prompt)
    with tempfile.TemporaryDirectory(prefix="blipfit-") as temporary:
        if config is not None and folder is not None and (data is not None or folder.is_dir()):
            questions = blipfit_data.load(config.name, folder, "val", QUESTIONS)
            origin = f"split val of {config.name} in {folder}"
        else:
            icons.prepare(Path(temporary, "icons"), train=1, val=QUESTIONS, test=1, seed=DRAWN_SEED)
            questions = blipfit_data.load("icons", Path(temporary, "icons"), "val", QUESTIONS)
            origin = "drawn icons"
        prompted = [prompt(question) for question in questions]
        prompted = [dataclasses.replace(texts, candidates=texts.candidates or (texts.target,)) for texts in prompted]
        yield CheckQuestions(origin, questions, prompted)


def _merge_and_write(
    source: Source, folder: Path, dtype: str, device: torch.device | str, check: CheckQuestions
) -> tuple[dict[str, Any], Mapping[str, list[QuestionScores]]]:
    """Load base model and adapter in fp32, merge, compare in memory, and write the checkpoint.

    Returns a part of the record, and the scores of the base model alone (`base`) and with the adapter (`adapter`).
    """
    assert source.adapter is not None
    assert source.saved is not None
    model = open_model.load(source, device, "fp32")
    scores = {"base": _score(model.backbone, check)}
    with model.adapter() as backbone:
        scores["adapter"] = _score(backbone, check)
    merge.merge_adapter(model.backbone.hf, source.adapter)
    _compare(check, scores, _score(model.backbone, check), "fp32")
    details = {
        "base": source.model.name,
        "base_sha256": model.backbone.base_sha256,
        "method": source.saved.config.method,
        "adapter_sha256": source.adapter_sha256,
        "warnings": list(model.source.warnings),
    }
    merge.cast(model.backbone.hf, merge.DTYPES[dtype])
    merge.write_checkpoint(folder, model.backbone, checkpoint_folder(source.model), merge.DTYPES[dtype])
    return details, scores


def _load_written(folder: Path, source: Source, device: torch.device | str) -> Backbone:
    """Load the written checkpoint, with the limits of the run's texts, so that its scores are comparable."""
    training = TrainingConfig() if source.recipe is None else source.recipe.training
    limits = training.max_text_tokens, training.max_target_tokens
    return loading.load(ModelConfig(name=str(folder)), "fp32", device, *limits)


def _score(backbone: Backbone, check: CheckQuestions) -> list[QuestionScores]:
    """The log-likelihoods of all candidates of the questions."""
    features = ImageFeatures.from_backbone(backbone, "off")
    encoded = backbone.text.encode(check.prompted)
    scores: list[QuestionScores]
    (scores,) = ranking.rank(
        backbone, encoded, lambda rows: features.features([check.questions[row] for row in rows]), BATCH_SIZE
    )
    ranking.require_finite(check.questions, scores)
    return scores


def _compare(
    check: CheckQuestions,
    scores: Mapping[str, Sequence[QuestionScores]],
    merged: Sequence[QuestionScores],
    dtype: str,
) -> dict[str, Any]:
    """Compare a merged model with base model and adapter; raise UserError if its scores differ too much.

    `scores`: of the base model alone (`base`) and with the adapter (`adapter`).
    """
    base, adapter, values = ([x for q in side for x in q.sums] for side in (scores["base"], scores["adapter"], merged))
    differences = [abs(x - y) for x, y in zip(values, adapter, strict=True)]
    changes = [x - y for x, y in zip(adapter, base, strict=True)]
    relative = _root_mean_square(differences) / (_root_mean_square(changes) or math.inf)
    excess = max(d - MAX_RELATIVE_DIFFERENCE * abs(x) for d, x in zip(differences, adapter, strict=True))
    record = {
        "max_difference": max(differences),
        "relative_difference": relative,
        "tolerance": MAX_DIFFERENCE if dtype == "fp32" else MAX_ROUNDING,
        "same_answers": sum(x.best == y.best for x, y in zip(merged, scores["adapter"], strict=True)),
    }
    if dtype == "fp32" and excess > MAX_DIFFERENCE:
        raise UserError(
            f"the merged model does not compute what the adapter does: on {check.source} a log-likelihood differs by "
            f"{max(differences):.2g}, more than {MAX_DIFFERENCE:g}; nothing was written: use --adapter, and report this"
        )
    if dtype != "fp32" and relative > MAX_ROUNDING:
        raise UserError(
            f"rounding to {dtype} changes the scores on {check.source} by {100 * relative:.0f} % of what the adapter "
            f"changes, more than {100 * MAX_ROUNDING:.0f} %; nothing was written: merge with --dtype fp32"
        )
    return record


def _root_mean_square(values: Sequence[float]) -> float:
    return math.sqrt(sum(value * value for value in values) / len(values))
