"""Commands: read arguments, call one function, print. Heavy imports happen inside, so that --help answers at once."""

import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from blipfit.errors import UserError

app = typer.Typer(
    name="blipfit",
    help="Fine-tune InstructBLIP with few trained parameters; evaluate and compare.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout; all else goes to stderr.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; the first GPU where there is one.")]
DataFolder = Annotated[Path | None, typer.Option("--data", help="Prepared data folder; data/DATASET if absent.")]
Results = Annotated[Path, typer.Option("--results", help="Where run folders go: RESULTS/DATASET/ID.")]
Model = Annotated[
    str | None,
    typer.Option(help="Hub name, local folder, or `tiny`: the embedded miniature of the experiment's family."),
]
Adapter = Annotated[Path | None, typer.Option(help="A finished run's folder, or an adapter folder.")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Override a field: training.max_epochs=2.")
]
Dataset = Annotated[str, typer.Argument(help="scienceqa, iconqa, icons or own.")]


@app.command()
def grid(as_json: Json = False) -> None:
    """List the 64 published experiments with their trained parameters, counted on the model's modules."""
    from blipfit.commands import arguments as experiments

    records = experiments.grid_records()
    _show(records, as_json, lambda: experiments.grid_table(records))


@app.command()
def show(
    dataset: Dataset,
    experiment: Annotated[
        str, typer.Argument(metavar="ID", help="1–64, baseline, baseline-vicuna, recover or explore-last, ….")
    ],
    model: Model = None,
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """Show an experiment before it runs: recipe, modules, parameters, memory. Needs no download."""
    from blipfit import grid as grid_room
    from blipfit.commands import arguments as experiments

    recipe = grid_room.recipe(dataset, experiment, model).override(sets or [])
    record = experiments.describe(recipe)
    _show(record, as_json, lambda: experiments.description(recipe, record))


@app.command()
def prepare(
    dataset: Annotated[str, typer.Argument(help="scienceqa, iconqa, icons, own, rewardbench or mme.")],
    source: Annotated[str | None, typer.Option("--from", help="Official folder, hub, or icons, drawn.")] = None,
    to: Annotated[Path | None, typer.Option("--to", help="Folder to write; data/DATASET if absent.")] = None,
    questions: Annotated[
        int | None,
        typer.Option(min=1, help="How many to draw to train on (mme: pictures a subtask; rewardbench: pairs in all)."),
    ] = None,
    skills: Annotated[
        str | None, typer.Option(help="Of icons: held-out (if absent), taught, every, or names: odd,pattern.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of what is drawn; 42 if absent.")] = None,
    as_json: Json = False,
) -> None:
    """Read a data set in its official layout, check every image, and write its annotation files."""
    from blipfit.commands import arguments as experiments

    report = experiments.prepare(dataset, source, to, questions, skills, seed)
    _show(report, as_json, lambda: str(report))


@app.command()
def train(
    dataset: Annotated[str, typer.Argument(help="scienceqa, iconqa, icons, own or rewardbench; or a recipe file.")],
    ids: Annotated[
        list[str] | None, typer.Argument(metavar="ID…", help="1–64, baseline, recover, explore-last, ….")
    ] = None,
    model: Model = None,
    data: DataFolder = None,
    results: Results = Path("results"),
    sets: Sets = None,
    precision: Annotated[
        str | None, typer.Option(help="auto, fp32, bf16 or fp16; short for --set training.precision=…")
    ] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Train, judge and record experiments. The same command again continues or skips what is there."""
    from blipfit.commands import arguments as experiments
    from blipfit.report import terminal
    from blipfit.training.loop import train as run_training

    assignments = [*(sets or []), *([f"training.precision={precision}"] if precision else [])]
    recipes = experiments.chosen(dataset, ids or [], model, assignments)
    folder = experiments.data_folder(recipes[0].data.name, data)
    display = terminal.TrainingDisplay()
    try:
        runs = run_training(recipes, folder, results, device=_device(device), listen=display)
    finally:
        display.close()
    records = [run.result() for run in runs if run.state() == "finished"]
    failures = {str(run.folder): run.failure() for run in runs if run.state() != "finished"}
    summary = {"results": records, "failed": failures, "folders": [str(run.folder) for run in runs]}
    _show(summary, as_json, lambda: experiments.outcome(records, [run.folder for run in runs]))
    if failures:
        raise typer.Exit(1)


@app.command()
def sweep(
    datasets: Annotated[str, typer.Argument(metavar="DATASET", help="One data set or several: scienceqa,iconqa.")],
    ids: Annotated[list[str], typer.Argument(metavar="IDS…", help="1-32, 13,15,28, all, baseline; or recipe files.")],
    model: Model = None,
    data: Annotated[Path | None, typer.Option("--data", help="Data folder (one data set); else data/DATASET.")] = None,
    results: Results = Path("results"),
    sets: Sets = None,
    bank: Annotated[int | None, typer.Option(min=1, help="Experiments at once; measured if absent.")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Only print the plan.")] = False,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Train many experiments, as many at once as pays: several share one pass over the frozen model."""
    from blipfit.commands import sweep as sweeps

    recipes, folders = sweeps.chosen(datasets, ids, model, sets or [], data)
    swept = sweeps.run(recipes, folders, results, bank, plan, _device(device))
    _show(swept.record, as_json, lambda: swept.shown)
    if swept.record.get("failed"):
        raise typer.Exit(1)


@app.command()
def features(
    action: Annotated[str, typer.Argument(help="list, build, check or delete.")] = "list",
    key: Annotated[str | None, typer.Argument(metavar="KEY", help="Of the store, for delete.")] = None,
    dataset: Annotated[str | None, typer.Option("--on", help="Data set, for build and check.")] = None,
    data: DataFolder = None,
    model: Annotated[str, typer.Option(help="Checkpoint whose vision tower sees, for build and check.")] = "tiny-t5",
    store: Annotated[Path | None, typer.Option(help="Folder of stores; $BLIPFIT_CACHE or ~/.cache if absent.")] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """List, build, check or delete stored image features, which all sweeps share."""
    from blipfit.commands import features as stores

    record = stores.act(action, key, dataset, data, model, store, _device(device) if action != "list" else None)
    _show(record, as_json, lambda: stores.table(record))


@app.command()
def evaluate(
    subject: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run folder; with --on also a model.")],
    on: Annotated[str | None, typer.Option(help="Sets: icons,mme,rewardbench,…; NAME=DIR gives a folder.")] = None,
    data: DataFolder = None,
    split: Annotated[str, typer.Option(help="train, val or test; all for rewardbench.")] = "test",
    base: Annotated[bool, typer.Option("--base", help="Judge the untrained model too; always so with --on.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="With --on: the first so many questions.")] = None,
    decoding: Annotated[str, typer.Option(help="With --on: how open answers are worded.")] = "greedy",
    samples: Annotated[int, typer.Option(min=0, help="rewardbench: judgements in words, in each order.")] = 0,
    clip: Annotated[str | None, typer.Option(help="CLIP for the CLIP score of open answers; tiny-clip …")] = None,
    results: Results = Path("results"),
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Judge a finished run again from its files; with --on a run or a model on other sets, base and adapter."""
    from blipfit.commands import arguments as experiments
    from blipfit.commands import evaluate as evaluations

    if on is None:
        record = experiments.evaluate_run(Path(subject), data, split, _device(device), base)
        _show(record, as_json, lambda: experiments.judgement(record))
        return
    chosen = _device(device)
    records = evaluations.run(subject, on, data, split, results, chosen, limit, decoding, samples, clip)
    _show(records, as_json, lambda: evaluations.shown(records))


@app.command()
def score(
    judge: Annotated[str, typer.Argument(help="mme or rewardbench.")],
    source: Annotated[Path, typer.Argument(help="mme: folder of SUBTASK.txt; rewardbench: JSONL of judgements.")],
    samples: Annotated[int | None, typer.Option(min=1, help="rewardbench: the first so many of a pair.")] = None,
    as_json: Json = False,
) -> None:
    """Score finished answers by a benchmark's official rule; needs no model."""
    from blipfit.commands import evaluate as evaluations

    record, shown = evaluations.score(judge, source, samples)
    _show(record, as_json, lambda: shown)


@app.command()
def cost(
    what: Annotated[str, typer.Argument(metavar="MODEL|RUN|DATASET", help="A model, run folder, recipe or data set.")],
    experiment: Annotated[str | None, typer.Argument(metavar="ID", help="Of the data set's grid.")] = None,
    model: Model = None,
    text: Annotated[int, typer.Option(min=1, help="Tokens of the prompt, for both towers.")] = 40,
    answer: Annotated[int, typer.Option(min=1, help="Tokens of the answer and of every candidate.")] = 8,
    candidates: Annotated[int, typer.Option(min=1, help="Candidates to rank.")] = 4,
    measure: Annotated[bool, typer.Option("--measure", help="Load the weights and time one answer here.")] = False,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Count parameters and FLOPs of a model, recipe or run; with --measure also time and memory of an answer."""
    from blipfit.commands import cost as costs
    from blipfit.model.cost import Lengths

    lengths = Lengths(text, text, answer, candidates)
    record = costs.describe(what, experiment, model, lengths, _device(device) if measure else None)
    _show(record, as_json, lambda: costs.shown(record))


@app.command()
def shrink(
    model: Annotated[str, typer.Option(help="Hub name, local folder, tiny-t5 or tiny-vicuna.")],
    hidden_size: Annotated[int | None, typer.Option(help="Width of the Q-Former.")] = None,
    heads: Annotated[int | None, typer.Option(help="Attention heads a layer.")] = None,
    intermediate_size: Annotated[int | None, typer.Option(help="Units of each feed-forward branch.")] = None,
    layers: Annotated[int | None, typer.Option(help="Layers.")] = None,
    queries: Annotated[int | None, typer.Option(help="Query tokens.")] = None,
    cross_every: Annotated[int | None, typer.Option(help="Cross-attention in every so many layers.")] = None,
    importance: Annotated[str, typer.Option(help="taylor, activation or magnitude.")] = "taylor",
    dataset: Annotated[str | None, typer.Option("--on", help="Data set to measure and repair on.")] = None,
    data: DataFolder = None,
    questions: Annotated[int, typer.Option(min=1, help="Training questions to measure and repair on.")] = 256,
    seed: Annotated[int, typer.Option(help="Of the draw of questions.")] = 0,
    to: Annotated[Path | None, typer.Option("--to", help="New folder for the checkpoint.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print sizes and FLOPs; needs no weights.")] = False,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Make a smaller Q-Former that inherits the bigger one's weights; what is not given stays as it is."""
    from blipfit.commands import shrink as shrinking

    sizes = {"hidden": hidden_size, "heads": heads, "intermediate": intermediate_size}
    sizes |= {"layers": layers, "queries": queries, "cross_every": cross_every}
    if dry_run:
        record = shrinking.plan(model, sizes)
    elif to is None:
        raise UserError("say where the smaller checkpoint goes: --to DIR, or only plan with --dry-run")
    else:
        record = shrinking.run(model, sizes, importance, dataset, data, questions, seed, to, _device(device))
    _show(record, as_json, lambda: shrinking.shown(record))


@app.command()
def retain(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The original: a model or a run folder.")],
    candidates: Annotated[list[str], typer.Argument(metavar="CANDIDATES…", help="Models or run folders.")],
    on: Annotated[str, typer.Option(help="Sets: icons,mme,rewardbench …; NAME=DIR gives the folder.")] = "icons",
    data: DataFolder = None,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    limit: Annotated[int | None, typer.Option(min=1, help="The first so many samples of every set.")] = None,
    at_least: Annotated[float | None, typer.Option(help="Exit with 1 where less is surely kept: 0.7.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Write retention against size as .png, .svg or .pdf.")] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Judge an original and candidates on the same samples: what they keep of its performance, and what they save."""
    from blipfit.commands import retain as retaining

    record = retaining.run(base, candidates, on, data, split, limit, at_least, _device(device))
    if figure is not None:
        retaining.figure(record, figure)
    _show(record, as_json, lambda: retaining.shown(record))
    if any(one["misses"] for one in record["candidates"]):
        raise typer.Exit(1)


@app.command()
def ranks(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Folders of finished AdaLoRA runs.")],
    as_json: Json = False,
) -> None:
    """Show which sublayers and layers kept AdaLoRA's ranks, of several runs side by side; draws RUN/ranks.png."""
    from blipfit.commands import ranks as report

    records = [report.examine(run) for run in runs]
    _show(records[0] if len(records) == 1 else records, as_json, lambda: report.shown(records))


@app.command()
def ablation(
    folders: Annotated[list[Path], typer.Argument(metavar="RESULTS/DATASET…", help="Folders of finished runs.")],
    as_json: Json = False,
) -> None:
    """Show what each sublayer, the rank and the language model do to the accuracy, from pairs of finished runs."""
    from blipfit.commands import ablation as report

    records = report.examine(folders)
    _show(records, as_json, lambda: report.table(records))


@app.command()
def ask(
    image: Annotated[Path, typer.Argument(help="A picture.")],
    question: Annotated[str, typer.Argument(help="What to ask about it.")],
    choices: Annotated[list[str] | None, typer.Option("--choice", help="Rank these instead; once a choice.")] = None,
    model: Model = None,
    adapter: Adapter = None,
    prompt: Annotated[str | None, typer.Option(help="vqa-v1, instruction-v1, …; the adapter's own if absent.")] = None,
    decoding: Annotated[str, typer.Option(help="short-answer, greedy, published, caption, sampling.")] = "short-answer",
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Ask a model about a picture."""
    from blipfit.commands import ask as using

    record = using.ask(using.loaded(model, adapter, device), image, question, choices or [], prompt, decoding)
    _show(record, as_json, lambda: using.answered(record))


@app.command()
def caption(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE…", help="Pictures.")],
    model: Model = None,
    adapter: Adapter = None,
    decoding: Annotated[str, typer.Option(help="caption, greedy, published, sampling.")] = "caption",
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Describe pictures in a sentence each."""
    from blipfit.commands import ask as using

    records = using.caption(using.loaded(model, adapter, device), images, decoding)
    _show(records, as_json, lambda: [f"{one['image']}: {one['caption']}" for one in records])


@app.command()
def search(
    folder: Annotated[Path, typer.Argument(help="Pictures, in it and below it.")],
    text: Annotated[str, typer.Argument(help="What they should show: a yellow star.")],
    top: Annotated[int, typer.Option(min=1, help="How many.")] = 9,
    sheet: Annotated[Path, typer.Option(help="Contact sheet to write.")] = Path("search.png"),
    model: Model = None,
    adapter: Adapter = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Find the pictures that a text describes best; what the model sees in them is kept for the next search."""
    from blipfit.commands import ask as using

    record = using.search(using.loaded(model, adapter, device), folder, text, top, sheet)
    _show(record, as_json, lambda: using.results(record))


@app.command()
def doctor(model: Model = None, data: DataFolder = None, as_json: Json = False) -> None:
    """Check this machine, and with --model or --data a checkpoint or a data folder; says the mend of what is wrong."""
    from blipfit.commands import doctor as health

    checks = health.examine(model, data)
    _show({"checks": checks}, as_json, lambda: health.table(checks))
    if any(check["state"] == "wrong" for check in checks):
        raise typer.Exit(1)


@app.command()
def demo(
    results: Annotated[Path, typer.Option("--results", help="Folder of the demo's data and runs.")] = Path(
        "results/demo"
    ),
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Watch a miniature InstructBLIP learn what it could not do. No download, no GPU, a few minutes."""
    from blipfit.commands import demo as demonstration

    record = demonstration.run_demo(results, _device(device))
    _show(record, as_json, lambda: demonstration.ending(record))


@app.command("pretrain-tiny")
def pretrain_tiny(
    folder: Annotated[Path, typer.Argument(help="Where the miniatures are written; what is there is continued.")],
    families: Annotated[str, typer.Option(help="t5, vicuna, or both with a comma.")] = "t5,vicuna",
    as_json: Json = False,
) -> None:
    """Make the embedded miniatures again, from nothing: tokenizers, tower and CLIP, Q-Former, language models."""
    from blipfit.commands import pretrain_tiny as miniatures

    record = miniatures.pretrain(folder, families)
    _show(record, as_json, lambda: miniatures.table(record))


def _device(name: str | None) -> Any:
    from blipfit.runtime import distributed

    return distributed.chosen(name)


def _show(record: Any, as_json: bool, drawn: Any) -> None:
    from blipfit.report import terminal

    terminal.show(record, as_json, drawn)


def main() -> NoReturn:
    """Entry point: a user's mistake is one sentence and exit code 2, a defect of ours keeps its traceback."""
    try:
        code = app(standalone_mode=False)
    except UserError as error:
        print(f"blipfit: {error}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        print("blipfit: stopped; the same command again continues where it was", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if error.filename is None:
            raise
        print(f"blipfit: {error.filename}: {error.strerror}; choose another place or make room", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        if hasattr(error, "format_message"):  # click's usage errors
            context = getattr(error, "ctx", None)
            hint = f" (`{context.command_path} --help` tells more)" if context else ""
            print(f"blipfit: {error.format_message()}{hint}", file=sys.stderr)
            sys.exit(2)
        raise
    sys.exit(code or 0)


if __name__ == "__main__":
    main()
