"""Arguments and options of the command line: those that several commands share, and long ones."""

from pathlib import Path
from typing import Annotated

import typer

from blipfit.runtime.save_interval import SaveInterval


def _check_data_set(name: str | None) -> str | None:
    """Raise UserError at once, before torch is imported, if a data set does not exist."""
    from blipfit.data import get_data_set

    return name if name is None else get_data_set(name).name


def _check_data_sets(on: str) -> str:
    """Raise UserError at once, before torch is imported, if a data set of `--on` does not exist."""
    from blipfit.commands.resolve_arguments import parse_on

    parse_on(on)
    return on


Json = Annotated[
    bool, typer.Option("--json", metavar="", help="Print one JSON object on stdout; everything else goes to stderr.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N. Default: the first GPU, or the CPU.")]
DataFolder = Annotated[Path | None, typer.Option("--data", help="Prepared data folder. Default: data/DATASET.")]
Results = Annotated[
    Path, typer.Option("--results", help="Folder that holds one folder per experiment: RESULTS/DATASET/EXPERIMENT.")
]
DemoResults = Annotated[Path, typer.Option("--results", help="Folder of the demo's data and runs.")]
Model = Annotated[
    str | None,
    typer.Option(
        help="Hub name, local folder, or a miniature: tiny-t5, tiny-vicuna, or tiny (the one of the experiment's "
        "family)."
    ),
]
BaseModel = Annotated[
    str | None,
    typer.Option("--model", help="The run's base model, if it has been moved since the training."),
]
Adapter = Annotated[Path | None, typer.Option(help="Folder of a finished run, or an adapter folder.")]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="Change a field of the recipe, for example training.max_epochs=2. Can be given several times.",
    ),
]
ShowSubject = Annotated[
    str, typer.Argument(metavar="DATASET|FILE", help="scienceqa, iconqa, icons, own or rewardbench; or a recipe file.")
]
TrainSubject = ShowSubject
PrepareSource = Annotated[
    str | None,
    typer.Option(
        "--from",
        help="Folder with the official data; hub: download it; icons: draw it. own: a table (JSON, CSV, TSV, parquet, "
        "WebDataset), a folder, or hf://owner/name@revision.",
    ),
]
PrepareQuestions = Annotated[
    int | None,
    typer.Option(min=1, help="Training questions to draw (mme: images per subtask; rewardbench: pairs in all)."),
]
PrepareSkills = Annotated[
    str | None, typer.Option(help="Skills of icons: held-out (default), taught, every, or names: odd,pattern.")
]
PrepareAllowOutside = Annotated[
    bool,
    typer.Option(
        "--allow-outside", metavar="", help="Copy images that are outside the data folder (absolute paths, ../, links)."
    ),
]
PrepareSkipBad = Annotated[
    bool,
    typer.Option(
        "--skip-bad", metavar="", help="own: leave out lines that are invalid or whose image is bad, and list them."
    ),
]
PrepareColumns = Annotated[
    str | None,
    typer.Option(
        metavar="PART=NAME,…",
        help="own: columns with other names than usual: image=path,question=prompt,answer=label.",
    ),
]
TrainIds = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="ID",
        help="1–64 (see `blipfit grid`), or a name: baseline, recover (train a shrunk Q-Former), explore-… "
        "(docs/use.md).",
    ),
]
TrainPrecision = Annotated[
    str | None, typer.Option(help="auto, fp32, bf16 or fp16; short for --set training.precision=…")
]
SaveEvery = Annotated[
    SaveInterval | None,
    typer.Option(
        parser=SaveInterval.parse,
        metavar="TIME|STEPS",
        help="Interval between saves of unfinished work: 5m, 90s, or 200 (steps). Default: 5m.",
    ),
]
Processes = Annotated[
    int | None,
    typer.Option(min=1, help="Processes that share every batch, one GPU each (without GPUs: CPU cores). Default: 1."),
]
SweepBank = Annotated[int | None, typer.Option(min=1, help="Experiments per bank. Default: measured with trial steps.")]
EvaluateSamples = Annotated[
    int,
    typer.Option(min=0, help="rewardbench: written judgments per pair, for each of the two orders of the responses."),
]
EvaluateClip = Annotated[
    str | None, typer.Option(help="CLIP model for the CLIP score of open answers, for example tiny-clip.")
]
ScoreSource = Annotated[
    Path, typer.Argument(help="mme: folder of SUBTASK.txt files; rewardbench: JSONL file of judgments.")
]
ScoreSamples = Annotated[int | None, typer.Option(min=1, help="rewardbench: only the first N judgments of a pair.")]
AskChoices = Annotated[
    list[str] | None,
    typer.Option("--choice", help="Rank this choice instead of generating; give the option once per choice."),
]
AskPrompt = Annotated[
    str | None, typer.Option(help="Prompt: vqa-v1, instruction-v1, and others. Default: the adapter's own.")
]
RetainOn = Annotated[
    str,
    typer.Option(callback=_check_data_sets, help="Data sets: icons,mme,rewardbench; NAME=DIR gives the folder."),
]
RetainAtLeast = Annotated[
    float | None,
    typer.Option(
        help="Exit with code 1 if retention may be lower than this, for example 0.7 (lower end of the 95 % interval)."
    ),
]
CostSubject = Annotated[
    str, typer.Argument(metavar="MODEL|RUN|DATASET", help="A model, run folder, recipe or data set.")
]
CostExperiment = Annotated[
    str | None,
    typer.Argument(metavar="ID", help="If the first argument is a data set: 1–64, or a name (baseline, explore-…)."),
]
CostMeasure = Annotated[
    bool, typer.Option("--measure", metavar="", help="Load the weights and time one answer on this machine.")
]
ShowExperiment = Annotated[
    str | None,
    typer.Argument(
        metavar="ID", help="If the first argument is a data set: 1–64, or a name (baseline, recover, explore-…)."
    ),
]
ShrinkOn = Annotated[
    str | None,
    typer.Option("--on", callback=_check_data_set, help="Data set to measure importance and repair on."),
]
FeaturesOn = Annotated[
    str | None, typer.Option("--on", callback=_check_data_set, help="Data set, for build and check.")
]
FeaturesModel = Annotated[
    str, typer.Option(help="Checkpoint whose vision tower computes the features, for build and check.")
]
FeaturesStore = Annotated[
    Path | None,
    typer.Option(help="Folder of the stores. Default: $BLIPFIT_CACHE/features or ~/.cache/blipfit/features."),
]
ShrinkDryRun = Annotated[
    bool, typer.Option("--dry-run", metavar="", help="Only print sizes and FLOPs; needs no weights.")
]
EvaluateBase = Annotated[
    bool, typer.Option("--base", metavar="", help="Evaluate the base model too (always with --on).")
]
AblationFolders = Annotated[list[Path], typer.Argument(metavar="RESULTS/DATASET", help="Folders of finished runs.")]
RanksRuns = Annotated[list[Path], typer.Argument(metavar="RUN", help="Folders of finished AdaLoRA runs.")]
PretrainFolder = Annotated[Path, typer.Argument(help="Folder for the miniatures; an interrupted run continues there.")]
PretrainFamilies = Annotated[str, typer.Option(help="t5, vicuna, or both, comma-separated.")]
ReportPaths = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="RESULTS",
        help="Results folders, data set folders or run folders; files with the output of `retain --json`. "
        "Default: results.",
    ),
]
ReportTo = Annotated[
    Path | None,
    typer.Option("--to", help="File to write: .html, .md, .tex, .csv or .json. Default: report.html."),
]
ReportData = Annotated[
    list[Path] | None,
    typer.Option(
        "--data",
        help="Prepared data folder with the questions and pictures of the examples. Can be given several times. "
        "Default: data/DATASET, or the data folder beside the results.",
    ),
]
ReportWatch = Annotated[
    bool,
    typer.Option("--watch", metavar="", help="Serve the report on 127.0.0.1 and make it again when results change."),
]
ReportPort = Annotated[int, typer.Option(min=0, max=65535, help="With --watch: port; 0 is any free one.")]
