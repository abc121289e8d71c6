"""The command line: each command reads its arguments, calls one module of `commands/`, and prints the result.

torch is imported inside the commands, after names are checked, so that `--help` and a wrong name are answered at once.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from blipfit import cli_sweep
from blipfit.commands import options
from blipfit.runtime import launcher

app = typer.Typer(
    name="blipfit",
    help="Fine-tune InstructBLIP with few trained parameters; shrink, evaluate and compare it.",
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
TRAIN, EVALUATE, USE, COMPRESS, INSPECT = "Train", "Evaluate", "Use a model", "Compress", "Inspect"


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", metavar="", help="Print the version and exit.")] = False,
) -> None:
    """Fine-tune InstructBLIP with few trained parameters; shrink, evaluate and compare it."""
    if version:
        from blipfit import __version__

        print(f"blipfit {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


@app.command(rich_help_panel=TRAIN)
def prepare(
    dataset: Annotated[str, typer.Argument(help="scienceqa, iconqa, icons, own, rewardbench or mme.")],
    source: options.PrepareSource = None,
    to: Annotated[Path | None, typer.Option("--to", help="Folder to write. Default: data/DATASET.")] = None,
    questions: options.PrepareQuestions = None,
    skills: options.PrepareSkills = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of data that is drawn. Default: 42.")] = None,
    allow_outside: options.PrepareAllowOutside = False,
    skip_bad: options.PrepareSkipBad = False,
    columns: options.PrepareColumns = None,
    as_json: options.Json = False,
) -> None:
    """Check a data set (downloaded, your own or drawn) and write the folder that `train` reads."""
    from blipfit.commands import prepare as command

    report = command.run(dataset, source, to, questions, skills, seed, allow_outside, skip_bad, columns)
    _print(report, as_json, command.render)


@app.command(rich_help_panel=TRAIN)
def train(
    dataset: options.TrainSubject,
    ids: options.TrainIds = None,
    model: options.Model = None,
    data: options.DataFolder = None,
    results: options.Results = Path("results"),
    sets: options.Sets = None,
    precision: options.TrainPrecision = None,
    save_every: options.SaveEvery = None,
    processes: options.Processes = None,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Train, evaluate and record experiments. Run it again to continue an interrupted training."""
    from blipfit.commands import resolve_arguments

    assignments = [*(sets or []), *([f"training.precision={precision}"] if precision else [])]
    recipes = resolve_arguments.load_recipes(dataset, ids or [], model, assignments)
    launcher.launch(processes)
    from blipfit.commands import train as command

    record = command.run(recipes, data, results, _device(device), save_every)
    _print(record, as_json, command.render, failed=bool(record["failed"]))


app.command(rich_help_panel=TRAIN)(cli_sweep.sweep)
app.command(hidden=True)(cli_sweep.unit)


@app.command(rich_help_panel=TRAIN)
def demo(
    results: options.DemoResults = Path("results/demo"), device: options.Device = None, as_json: options.Json = False
) -> None:
    """Fine-tune a miniature InstructBLIP on new kinds of questions. No download, no GPU, a few minutes."""
    from blipfit.commands import demo as command

    _print(command.run(results, _device(device)), as_json, command.render)


@app.command(rich_help_panel=EVALUATE)
def evaluate(
    subject: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run folder; with --on also a model.")],
    on: Annotated[str | None, typer.Option(help="Data sets: icons,mme,rewardbench; NAME=DIR gives the folder.")] = None,
    data: options.DataFolder = None,
    split: Annotated[str, typer.Option(help="train, val or test; all for rewardbench.")] = "test",
    base: options.EvaluateBase = False,
    limit: Annotated[int | None, typer.Option(min=1, help="With --on: only the first N questions.")] = None,
    decoding: Annotated[str, typer.Option(help="With --on: decoding of open answers.")] = "greedy",
    samples: options.EvaluateSamples = 0,
    clip: options.EvaluateClip = None,
    model: options.BaseModel = None,
    results: options.Results = Path("results"),
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Evaluate a run on its own test split; with --on, a run or a model on other data sets."""
    from blipfit.commands import resolve_arguments

    resolve_arguments.check_evaluation(subject, on)
    from blipfit.commands import evaluate as command

    if on is None:
        _print(command.run(Path(subject), data, split, _device(device), base, model), as_json, command.render)
        return
    on_options = command.OnOptions(data, split, limit, decoding, samples, clip, results, model)
    _print(command.run_on(subject, on, _device(device), on_options), as_json, command.render_on)


@app.command(rich_help_panel=EVALUATE)
def score(
    benchmark: Annotated[str, typer.Argument(help="mme or rewardbench.")],
    source: options.ScoreSource,
    samples: options.ScoreSamples = None,
    as_json: options.Json = False,
) -> None:
    """Score answers that exist already by a benchmark's official rule; needs no model."""
    from blipfit.commands import score as command

    _print(command.run(benchmark, source, samples), as_json, command.render)


@app.command(rich_help_panel=EVALUATE)
def ablation(folders: options.AblationFolders, as_json: options.Json = False) -> None:
    """Show the effect of each sublayer, the rank and the language model on the accuracy, from finished runs."""
    from blipfit.commands import ablation as command

    _print(command.run(folders), as_json, command.render)


@app.command(rich_help_panel=EVALUATE)
def report(
    paths: options.ReportPaths = None,
    to: options.ReportTo = None,
    data: options.ReportData = None,
    watch: options.ReportWatch = False,
    port: options.ReportPort = 8765,
    as_json: options.Json = False,
) -> None:
    """Write the results as one HTML page, or their main table as Markdown, LaTeX, CSV or JSON. Needs no model."""
    from blipfit.commands import report as command

    record = command.start(paths or [Path("results")], to, data or [], port if watch else None)
    _print(record, as_json, command.render)


@app.command(rich_help_panel=USE)
def ask(
    image: Annotated[Path, typer.Argument(help="An image file.")],
    question: Annotated[str, typer.Argument(help="What to ask about it.")],
    choices: options.AskChoices = None,
    model: options.Model = None,
    adapter: options.Adapter = None,
    prompt: options.AskPrompt = None,
    decoding: Annotated[str, typer.Option(help="short-answer, greedy, published, caption, sampling.")] = "short-answer",
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Ask a model about an image."""
    from blipfit.commands import ask as command

    opened = command.load_model(model, adapter, device)
    _print(command.run(opened, image, question, choices or [], prompt, decoding), as_json, command.render)


@app.command(rich_help_panel=USE)
def caption(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="Image files, or folders of them.")],
    model: options.Model = None,
    adapter: options.Adapter = None,
    decoding: Annotated[str, typer.Option(help="caption, greedy, published, sampling.")] = "caption",
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Describe each image in one sentence."""
    from blipfit.commands import ask
    from blipfit.commands import caption as command

    _print(command.run(ask.load_model(model, adapter, device), images, decoding), as_json, command.render)


@app.command(rich_help_panel=USE)
def search(
    folder: Annotated[Path, typer.Argument(help="Folder of images; subfolders are searched too.")],
    text: Annotated[str, typer.Argument(help="What the images should show, for example 'a yellow star'.")],
    top: Annotated[int, typer.Option(min=1, help="Number of images.")] = 9,
    sheet: Annotated[Path, typer.Option(help="File of the contact sheet.")] = Path("search.png"),
    model: options.Model = None,
    adapter: options.Adapter = None,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Find the images that a text describes best. Image features are stored for the next search."""
    from blipfit.commands import ask
    from blipfit.commands import search as command

    _print(command.run(ask.load_model(model, adapter, device), folder, text, top, sheet), as_json, command.render)


@app.command(rich_help_panel=USE)
def merge(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run, or an adapter folder.")],
    to: Annotated[Path, typer.Option("--to", help="New folder for the checkpoint.")],
    dtype: Annotated[str, typer.Option(help="Precision of the written weights: fp32, bf16 or fp16.")] = "fp32",
    data: options.DataFolder = None,
    model: options.BaseModel = None,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Merge an adapter into its base model: an ordinary checkpoint for transformers, compared with the adapter."""
    from blipfit.commands import merge as command

    _print(command.run(run, to, dtype, data, _device(device), model), as_json, command.render)


@app.command(rich_help_panel=COMPRESS)
def shrink(
    model: Annotated[str, typer.Option(help="Hub name, local folder, tiny-t5 or tiny-vicuna.")],
    hidden_size: Annotated[int | None, typer.Option(help="Width of the Q-Former.")] = None,
    heads: Annotated[int | None, typer.Option(help="Attention heads per layer.")] = None,
    intermediate_size: Annotated[int | None, typer.Option(help="Width of each feed-forward branch.")] = None,
    layers: Annotated[int | None, typer.Option(help="Layers.")] = None,
    queries: Annotated[int | None, typer.Option(help="Query tokens.")] = None,
    cross_every: Annotated[int | None, typer.Option(help="Cross-attention in every N-th layer.")] = None,
    importance: Annotated[str, typer.Option(help="taylor, activation or magnitude.")] = "taylor",
    dataset: options.ShrinkOn = None,
    data: options.DataFolder = None,
    questions: Annotated[int, typer.Option(min=1, help="Training questions to measure and repair on.")] = 256,
    seed: Annotated[int, typer.Option(help="Seed of the sample of questions.")] = 0,
    to: Annotated[Path | None, typer.Option("--to", help="New folder for the checkpoint.")] = None,
    dry_run: options.ShrinkDryRun = False,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Make a smaller Q-Former from the weights of a larger one. Options left out keep the original size."""
    from blipfit.commands import shrink as command

    sizes = {"hidden": hidden_size, "heads": heads, "intermediate": intermediate_size}
    sizes |= {"layers": layers, "queries": queries, "cross_every": cross_every}
    if dry_run:
        record = command.run_dry(model, sizes)
    else:
        record = command.run(model, sizes, importance, dataset, data, questions, seed, to, _device(device))
    _print(record, as_json, command.render)


@app.command(rich_help_panel=COMPRESS)
def retain(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The original: a model or a run folder.")],
    candidates: Annotated[list[str], typer.Argument(metavar="CANDIDATE", help="Smaller models, or run folders.")],
    on: options.RetainOn = "icons",
    data: options.DataFolder = None,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N samples of every data set.")] = None,
    at_least: options.RetainAtLeast = None,
    figure: Annotated[Path | None, typer.Option(help="Write retention against size as .png, .svg or .pdf.")] = None,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Compare smaller models with the original one: how much accuracy they keep on the same samples, and their cost."""
    from blipfit.commands import retain as command

    record = command.run(base, candidates, on, data, split, limit, at_least, _device(device))
    if figure is not None:
        command.write_figure(record, figure)
    _print(record, as_json, command.render, failed=command.any_may_be_below(record))


@app.command(rich_help_panel=COMPRESS)
def cost(
    subject: options.CostSubject,
    experiment: options.CostExperiment = None,
    model: options.Model = None,
    text: Annotated[int, typer.Option(min=1, help="Tokens of the prompt, for Q-Former and language model.")] = 40,
    answer: Annotated[int, typer.Option(min=1, help="Tokens of the answer and of every candidate.")] = 8,
    candidates: Annotated[int, typer.Option(min=1, help="Candidates to rank.")] = 4,
    measure: options.CostMeasure = False,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Count parameters and FLOPs of a model, recipe or run; with --measure, time and memory of an answer too."""
    from blipfit.commands import resolve_arguments

    resolve_arguments.check_experiment(subject, experiment, model)
    from blipfit.commands import cost as command
    from blipfit.model.cost import Lengths

    lengths = Lengths(text, text, answer, candidates)
    record = command.run(subject, experiment, model, lengths, _device(device) if measure else None)
    _print(record, as_json, command.render)


@app.command(rich_help_panel=INSPECT)
def grid(as_json: options.Json = False) -> None:
    """List the 64 published experiments with their trained parameters."""
    from blipfit.commands import grid as command

    _print(command.run(), as_json, command.render)


@app.command(rich_help_panel=INSPECT)
def show(
    dataset: options.ShowSubject,
    experiment: options.ShowExperiment = None,
    model: options.Model = None,
    sets: options.Sets = None,
    as_json: options.Json = False,
) -> None:
    """Show an experiment before it runs: recipe, adapted layers, parameters, memory. Needs no download."""
    from blipfit.commands import resolve_arguments

    (recipe,) = resolve_arguments.load_recipes(dataset, [experiment] if experiment else [], model, sets or [])
    from blipfit.commands import show as command

    _print(command.run(recipe), as_json, command.render)


@app.command(rich_help_panel=INSPECT)
def features(
    action: Annotated[str, typer.Argument(help="list, build, check or delete.")] = "list",
    key: Annotated[str | None, typer.Argument(metavar="KEY", help="Key of the store, for delete.")] = None,
    dataset: options.FeaturesOn = None,
    data: options.DataFolder = None,
    model: options.FeaturesModel = "tiny-t5",
    store: options.FeaturesStore = None,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """List, build, check or delete stored image features."""
    from blipfit.commands import features as command

    used_device = None if action == "list" else _device(device)
    _print(command.run(action, key, dataset, data, model, store, used_device), as_json, command.render)


@app.command(rich_help_panel=INSPECT)
def ranks(runs: options.RanksRuns, as_json: options.Json = False) -> None:
    """Show how AdaLoRA distributed the ranks over sublayers and layers; writes a heat map to RUN/ranks.png."""
    from blipfit.commands import ranks as command

    records = command.run(runs)
    _print(records[0] if len(records) == 1 else records, as_json, lambda _: command.render(records))


@app.command(rich_help_panel=INSPECT)
def doctor(model: options.Model = None, data: options.DataFolder = None, as_json: options.Json = False) -> None:
    """Check this machine and, with --model or --data, a checkpoint or a data folder; prints the fixes."""
    from blipfit.commands import doctor as command

    record = command.run(model, data)
    _print(record, as_json, command.render, failed=command.count_failed(record) > 0)


@app.command("pretrain-tiny", hidden=True)
def pretrain_tiny(
    folder: options.PretrainFolder, families: options.PretrainFamilies = "t5,vicuna", as_json: options.Json = False
) -> None:
    """Make the embedded miniatures again, from nothing: tokenizers, tower and CLIP, Q-Former, language models."""
    from blipfit.commands import pretrain_tiny as command

    _print(command.run(folder, families), as_json, command.render)


def _device(name: str | None) -> Any:
    from blipfit.runtime import distributed

    return distributed.select_device(name)


def _print(record: Any, as_json: bool, render: Callable[[Any], Any], failed: bool = False) -> None:
    """Print a record; a command that has `failed` then ends with exit code 1."""
    from blipfit.report import terminal

    terminal.print_record(record, as_json, render)
    if failed:
        raise typer.Exit(1)
