"""Arguments and options of the command line: those that several commands share, and long ones."""

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout; everything else goes to stderr.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N. Default: the first GPU, or the CPU.")]
DataFolder = Annotated[Path | None, typer.Option("--data", help="Prepared data folder. Default: data/DATASET.")]
Results = Annotated[Path, typer.Option("--results", help="Folder of the run folders: RESULTS/DATASET/ID.")]
Model = Annotated[
    str | None,
    typer.Option(help="Hub name, local folder, or a miniature: tiny-t5, tiny-vicuna, or tiny (the one that fits)."),
]
BaseModel = Annotated[
    str | None,
    typer.Option("--model", help="The run's base model, if it is not where the run was trained any more."),
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
Dataset = Annotated[str, typer.Argument(help="scienceqa, iconqa, icons or own.")]
PrepareSource = Annotated[
    str | None, typer.Option("--from", help="Folder with the official data; hub: download it; icons: draw it.")
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
    typer.Option("--allow-outside", help="Copy images that are outside the data folder (absolute paths, ../, links)."),
]
PrepareSkipBad = Annotated[
    bool, typer.Option("--skip-bad", help="own: leave out lines that are invalid or whose image is bad, and list them.")
]
TrainIds = Annotated[
    list[str] | None,
    typer.Argument(metavar="ID…", help="1–64 (see `blipfit grid`), baseline, recover, explore-last, …."),
]
TrainPrecision = Annotated[
    str | None, typer.Option(help="auto, fp32, bf16 or fp16; short for --set training.precision=…")
]
SweepBank = Annotated[int | None, typer.Option(min=1, help="Experiments per bank. Default: measured with trial steps.")]
EvaluateSamples = Annotated[
    int, typer.Option(min=0, help="rewardbench: judgments in words per pair, in each order of the responses.")
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
    str | None, typer.Argument(metavar="ID", help="Experiment, if the first argument is a data set.")
]
CostMeasure = Annotated[bool, typer.Option("--measure", help="Load the weights and time one answer on this machine.")]
ShowExperiment = Annotated[
    str, typer.Argument(metavar="ID", help="1–64, baseline, baseline-vicuna, recover or explore-last, ….")
]
FeaturesModel = Annotated[
    str, typer.Option(help="Checkpoint whose vision tower computes the features, for build and check.")
]
FeaturesStore = Annotated[
    Path | None,
    typer.Option(help="Folder of the stores. Default: $BLIPFIT_CACHE/features or ~/.cache/blipfit/features."),
]
