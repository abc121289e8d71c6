"""The command line: each command reads its arguments, calls one module of `commands/`, and prints the result.

Everything that needs torch is imported inside the commands, so that `--help` answers at once.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from blipfit.commands import options
from blipfit.errors import UserError

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
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
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
    as_json: options.Json = False,
) -> None:
    """Read a data set in its official layout, check every image, and write its annotation files."""
    from blipfit.commands import prepare as command

    report = command.run(dataset, source, to, questions, skills, seed, allow_outside, skip_bad)
    _print(report, as_json, command.render)


@app.command(rich_help_panel=TRAIN)
def train(
    dataset: Annotated[str, typer.Argument(help="scienceqa, iconqa, icons, own or rewardbench; or a recipe file.")],
    ids: options.TrainIds = None,
    model: options.Model = None,
    data: options.DataFolder = None,
    results: options.Results = Path("results"),
    sets: options.Sets = None,
    precision: options.TrainPrecision = None,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Train, evaluate and record experiments. Run it again to continue an interrupted training."""
    from blipfit.commands import resolve_arguments
    from blipfit.commands import train as command

    assignments = [*(sets or []), *([f"training.precision={precision}"] if precision else [])]
    recipes = resolve_arguments.load_recipes(dataset, ids or [], model, assignments)
    record = command.run(recipes, data, results, _device(device))
    _print(record, as_json, command.render)
    if record["failed"]:
        raise typer.Exit(1)


@app.command(rich_help_panel=TRAIN)
def sweep(
    datasets: Annotated[str, typer.Argument(metavar="DATASET", help="One data set or several: scienceqa,iconqa.")],
    ids: Annotated[list[str], typer.Argument(metavar="IDS…", help="1-32, 13,15,28, all, baseline; or recipe files.")],
    model: options.Model = None,
    data: Annotated[Path | None, typer.Option("--data", help="Data folder (one data set); else data/DATASET.")] = None,
    results: options.Results = Path("results"),
    sets: options.Sets = None,
    bank: options.SweepBank = None,
    plan: Annotated[bool, typer.Option("--plan", help="Only print the plan.")] = False,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Train many experiments in banks: several share each pass over the frozen model. Measures the fastest size."""
    from blipfit.commands import sweep as command

    recipes, folders = command.load_recipes(datasets, ids, model, sets or [], data)
    record = command.run(recipes, folders, results, bank, plan, _device(device))
    _print(record, as_json, command.render)
    if record.get("failed"):
        raise typer.Exit(1)


@app.command(rich_help_panel=TRAIN)
def demo(
    results: Annotated[Path, typer.Option("--results", help="Folder of the demo's data and runs.")] = Path(
        "results/demo"
    ),
    device: options.Device = None,
    as_json: options.Json = False,
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
    base: Annotated[bool, typer.Option("--base", help="Evaluate the untrained model too (always with --on).")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="With --on: only the first N questions.")] = None,
    decoding: Annotated[str, typer.Option(help="With --on: decoding of open answers.")] = "greedy",
    samples: options.EvaluateSamples = 0,
    clip: options.EvaluateClip = None,
    model: options.BaseModel = None,
    results: options.Results = Path("results"),
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Evaluate a finished run again. With --on: a run (with and without its adapter) or a model on other data sets."""
    from blipfit.commands import evaluate as command

    torch_device = _device(device)
    if on is None:
        _print(command.run(Path(subject), data, split, torch_device, base, model), as_json, command.render)
        return
    on_options = command.OnOptions(data, split, limit, decoding, samples, clip, results, model)
    _print(command.run_on(subject, on, torch_device, on_options), as_json, command.render_on)


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
def ablation(
    folders: Annotated[list[Path], typer.Argument(metavar="RESULTS/DATASET…", help="Folders of finished runs.")],
    as_json: options.Json = False,
) -> None:
    """Show the effect of each sublayer, the rank and the language model on the accuracy, from finished runs."""
    from blipfit.commands import ablation as command

    _print(command.run(folders), as_json, command.render)


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
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE…", help="Image files, or folders of them.")],
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


@app.command(rich_help_panel=COMPRESS)
def shrink(
    model: Annotated[str, typer.Option(help="Hub name, local folder, tiny-t5 or tiny-vicuna.")],
    hidden_size: Annotated[int | None, typer.Option(help="Width of the Q-Former.")] = None,
    heads: Annotated[int | None, typer.Option(help="Attention heads per layer.")] = None,
    intermediate_size: Annotated[int | None, typer.Option(help="Units of each feed-forward branch.")] = None,
    layers: Annotated[int | None, typer.Option(help="Layers.")] = None,
    queries: Annotated[int | None, typer.Option(help="Query tokens.")] = None,
    cross_every: Annotated[int | None, typer.Option(help="Cross-attention in every N-th layer.")] = None,
    importance: Annotated[str, typer.Option(help="taylor, activation or magnitude.")] = "taylor",
    dataset: Annotated[str | None, typer.Option("--on", help="Data set to measure importance and repair on.")] = None,
    data: options.DataFolder = None,
    questions: Annotated[int, typer.Option(min=1, help="Training questions to measure and repair on.")] = 256,
    seed: Annotated[int, typer.Option(help="Seed of the sample of questions.")] = 0,
    to: Annotated[Path | None, typer.Option("--to", help="New folder for the checkpoint.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print sizes and FLOPs; needs no weights.")] = False,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Make a smaller Q-Former from the weights of a larger one. Sizes that are not given stay as they are."""
    from blipfit.commands import shrink as command

    sizes = {"hidden": hidden_size, "heads": heads, "intermediate": intermediate_size}
    sizes |= {"layers": layers, "queries": queries, "cross_every": cross_every}
    if dry_run:
        record = command.run_dry(model, sizes)
    elif to is None:
        raise UserError("say where to write the smaller checkpoint: --to DIR; or only plan it with --dry-run")
    else:
        record = command.run(model, sizes, importance, dataset, data, questions, seed, to, _device(device))
    _print(record, as_json, command.render)


@app.command(rich_help_panel=COMPRESS)
def retain(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The original: a model or a run folder.")],
    candidates: Annotated[list[str], typer.Argument(metavar="CANDIDATES…", help="Models or run folders.")],
    on: Annotated[str, typer.Option(help="Data sets: icons,mme,rewardbench; NAME=DIR gives the folder.")] = "icons",
    data: options.DataFolder = None,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N samples of every data set.")] = None,
    at_least: options.RetainAtLeast = None,
    figure: Annotated[Path | None, typer.Option(help="Write retention against size as .png, .svg or .pdf.")] = None,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Compare candidates with an original on the same samples: how much performance they retain, and their cost."""
    from blipfit.commands import retain as command

    record = command.run(base, candidates, on, data, split, limit, at_least, _device(device))
    if figure is not None:
        command.write_figure(record, figure)
    _print(record, as_json, command.render)
    if command.any_below(record):
        raise typer.Exit(1)


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
    from blipfit.commands import cost as command
    from blipfit.model.cost import Lengths

    lengths = Lengths(text, text, answer, candidates)
    torch_device = _device(device) if measure else None
    _print(command.run(subject, experiment, model, lengths, torch_device), as_json, command.render)


@app.command(rich_help_panel=INSPECT)
def grid(as_json: options.Json = False) -> None:
    """List the 64 published experiments with their trained parameters."""
    from blipfit.commands import grid as command

    _print(command.run(), as_json, command.render)


@app.command(rich_help_panel=INSPECT)
def show(
    dataset: options.Dataset,
    experiment: options.ShowExperiment,
    model: options.Model = None,
    sets: options.Sets = None,
    as_json: options.Json = False,
) -> None:
    """Show an experiment before it runs: recipe, modules, parameters, memory. Needs no download."""
    from blipfit.commands import resolve_arguments
    from blipfit.commands import show as command

    (recipe,) = resolve_arguments.load_recipes(dataset, [experiment], model, sets or [])
    _print(command.run(recipe), as_json, command.render)


@app.command(rich_help_panel=INSPECT)
def features(
    action: Annotated[str, typer.Argument(help="list, build, check or delete.")] = "list",
    key: Annotated[str | None, typer.Argument(metavar="KEY", help="Key of the store, for delete.")] = None,
    dataset: Annotated[str | None, typer.Option("--on", help="Data set, for build and check.")] = None,
    data: options.DataFolder = None,
    model: options.FeaturesModel = "tiny-t5",
    store: options.FeaturesStore = None,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """List, build, check or delete stored image features."""
    from blipfit.commands import features as command

    torch_device = _device(device) if action != "list" else None
    _print(command.run(action, key, dataset, data, model, store, torch_device), as_json, command.render)


@app.command(rich_help_panel=INSPECT)
def ranks(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Folders of finished AdaLoRA runs.")],
    as_json: options.Json = False,
) -> None:
    """Show which sublayers and layers kept AdaLoRA's ranks; writes a heat map to RUN/ranks.png."""
    from blipfit.commands import ranks as command

    records = command.run(runs)
    _print(records[0] if len(records) == 1 else records, as_json, lambda _: command.render(records))


@app.command(rich_help_panel=INSPECT)
def doctor(model: options.Model = None, data: options.DataFolder = None, as_json: options.Json = False) -> None:
    """Check this machine and, with --model or --data, a checkpoint or a data folder; prints the fixes."""
    from blipfit.commands import doctor as command

    record = command.run(model, data)
    _print(record, as_json, command.render)
    if command.count_failed(record):
        raise typer.Exit(1)


@app.command("pretrain-tiny", hidden=True)
def pretrain_tiny(
    folder: Annotated[Path, typer.Argument(help="Folder for the miniatures; an interrupted run continues there.")],
    families: Annotated[str, typer.Option(help="t5, vicuna, or both, comma-separated.")] = "t5,vicuna",
    as_json: options.Json = False,
) -> None:
    """Make the embedded miniatures again, from nothing: tokenizers, tower and CLIP, Q-Former, language models."""
    from blipfit.commands import pretrain_tiny as command

    _print(command.run(folder, families), as_json, command.render)


def _device(name: str | None) -> Any:
    from blipfit.runtime import distributed

    return distributed.select_device(name)


def _print(record: Any, as_json: bool, render: Callable[[Any], Any]) -> None:
    from blipfit.report import terminal

    terminal.print_record(record, as_json, render)
