"""`blipfit report`: results as one HTML page, or the main table as Markdown, LaTeX, CSV or JSON."""

import dataclasses
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from blipfit import data as blipfit_data
from blipfit import run_folder
from blipfit.commands import ablation, ranks
from blipfit.errors import Interrupted, UserError
from blipfit.report import evaluations, examples, experiments, page, table_files, terminal
from blipfit.report.experiments import Collection, Experiment
from blipfit.report.numbers import Record
from blipfit.report.page import Contents, EffectTable, RankTable
from blipfit.report.watch import ReportServer

HTML = (".html", ".htm")


def start(paths: Sequence[Path], to: Path | None, data: Sequence[Path], port: int | None) -> dict[str, Any]:
    """Write the report, by default to `report.html`; with a `port`, serve it there until a signal arrives, and write it
    only if `to` is given.

    Raises UserError as `run` and `watch`.
    """
    record = run(paths, to or Path("report.html"), data) if port is None or to is not None else {}
    if port is not None:
        screen = terminal.console(stderr=True)
        watch(paths, port, data, announce=lambda sentence: screen.print(sentence, soft_wrap=True))
    return record


def run(paths: Sequence[Path], to: Path, data: Sequence[Path] = ()) -> dict[str, Any]:
    """Write the report, or the main table if `to` ends in .md, .tex, .csv or .json.

    `paths`: results folders, data set folders, run folders, and files with the output of `blipfit retain --json`.
    `data`: prepared data folders for the questions and pictures of the examples; without them the usual places are
    tried. Raises UserError if a path cannot be read, no experiment is finished, or the suffix of `to` is unknown.
    """
    check_suffix(to)
    contents = read_contents(paths)
    if to.suffix in HTML:
        text = page.render(add_examples(contents, data))
    else:
        text = table_files.WRITERS[to.suffix](contents.collections)
    run_folder.write_text(to, text)
    collections = contents.collections
    return {
        "to": str(to),
        "bytes": len(text.encode("utf-8")),
        "finished": sum(len(collection.finished) for collection in collections),
        "unfinished": {str(e.run.folder): e.reason for collection in collections for e in collection.unfinished},
        "datasets": [collection.dataset for collection in collections],
    }


def render(record: Mapping[str, Any]) -> list[str]:
    """Where the report is, and the experiments without a result; no lines if no report was written."""
    if not record:
        return []
    lines = [f"no result: {folder}: {reason}" for folder, reason in record["unfinished"].items()]
    count = terminal.format_count(record["finished"], "finished experiment")
    if not record["to"].endswith(HTML):
        return [*lines, f"table of {count}: {record['to']}"]
    return [*lines, f"report of {count}: open {record['to']} in a browser ({record['bytes'] / 1e6:.1f} MB)"]


def check_suffix(to: Path) -> None:
    """Raise UserError if a file's suffix is none that `run` can write."""
    known = (HTML[0], *table_files.WRITERS)
    if to.suffix not in (*HTML, *table_files.WRITERS):
        raise UserError(f"--to {to}: the ending says what is written; known: {', '.join(known)}")


def watch(paths: Sequence[Path], port: int, data: Sequence[Path], announce: Callable[[str], None]) -> None:
    """Serve the report on 127.0.0.1 until Ctrl-C; `announce` receives the address and the last sentence.

    Without a finished experiment the page says what is missing and waits. Raises UserError if the port is in use.
    """

    def render_page() -> str:
        try:
            return page.render(add_examples(read_contents(paths), data), watched=True)
        except (UserError, OSError) as error:  # OSError: a folder was deleted while it was read
            return page.render_waiting(str(error))

    server = ReportServer(port, render_page, paths)
    announce(f"report: {server.url}   (it reloads itself when results change; Ctrl-C ends this)")
    try:
        server.watch()
    except (Interrupted, KeyboardInterrupt) as error:
        if isinstance(error, Interrupted) and error.number != signal.SIGINT:
            raise
        announce("the report is no longer served; `blipfit report` writes it to a file")


def read_contents(paths: Sequence[Path]) -> Contents:
    """Read all results. Raises UserError if a path cannot be read or no experiment is finished."""
    folders = [path for path in paths if not path.is_file()]
    retentions = [_read_retention(path) for path in paths if path.is_file()]
    collections = experiments.read_collections(folders) if folders else []
    if not any(collection.finished for collection in collections) and not retentions:
        reasons = [f"{e.run.folder}: {e.reason}" for collection in collections for e in collection.unfinished]
        raise UserError(
            f"no experiment is finished in {', '.join(map(str, paths))} ({'; '.join(reasons[:3])}); run the same "
            "`blipfit train` or `blipfit sweep` again to continue"
        )
    for folder in folders:
        retentions += _find_retentions(folder)
    return Contents(
        collections,
        experiments.read_model_evaluations([*folders, *(collection.folder.parent for collection in collections)]),
        retentions,
        [table for collection in collections if (table := _effect_table(collection))],
        [ranked for collection in collections for e in collection.finished if (ranked := _rank_table(e))],
    )


def add_examples(contents: Contents, data: Sequence[Path]) -> Contents:
    """The contents with examples; `data` are prepared data folders, by default `data/DATASET` and those beside results.

    Raises UserError if a folder of `data` holds no data set.
    """
    folders: dict[str, list[Path]] = {}
    for folder in data:
        folders.setdefault(blipfit_data.detect(folder), []).append(folder)
    sets = []
    for collection in contents.collections:
        name, results = collection.dataset, collection.folder.parent
        usual = [Path("data") / name, results / "data", results.parent / "data" / name]
        if example_set := examples.make_example_set(collection, folders.get(name, usual)):
            sets.append(example_set)
    return dataclasses.replace(contents, examples=sets)


def _read_retention(file: Path) -> Record:
    content = run_folder.read_json(file)
    if not evaluations.is_retention_record(content):
        raise UserError(f"{file} is not the output of `blipfit retain --json`; give results folders or such a file")
    return Record(str(file), content)


def _find_retentions(folder: Path) -> list[Record]:
    """Files with the output of `blipfit retain --json` in a results folder."""
    records = []
    for file in sorted(folder.glob("*.json")):
        try:
            content = run_folder.read_json(file)
        except UserError:
            continue
        if evaluations.is_retention_record(content):
            records.append(Record(str(file), content))
    return records


def _effect_table(collection: Collection) -> EffectTable | None:
    """The effects over the pairs of finished experiments; None without any pair."""
    scored = [
        ablation.divide_recipe(experiment.recipe, score.value)
        for experiment in collection.finished
        if experiment.recipe is not None and not experiment.is_generation and (score := experiment.score())
    ]
    records = [pairs.record(effect) for effect, pairs in ablation.find_effects(scored).items() if pairs.differences]
    kinds = {kind: [record for record in records if record["kind"] == kind] for kind in ablation.KINDS}
    groups = [(ablation.KINDS[kind], of_kind) for kind, of_kind in kinds.items() if of_kind]
    return EffectTable(collection, groups) if groups else None


def _rank_table(experiment: Experiment) -> RankTable | None:
    """AdaLoRA's ranks of a run; None if it has none or they are damaged."""
    file = experiment.run.ranks_file
    if not file.is_file():
        return None
    try:
        history = run_folder.read_json(file)
        record, last = Record(str(file), history), len(history["ranks"]) - 1
        columns = {layer: column for column, layer in enumerate(history["layers"])}
        rows = [
            (
                kind,
                {
                    block: number
                    for block, column in blocks.items()
                    if (number := record.number("ranks", last, column, digits=0))
                },
            )
            for kind, blocks in ranks.ranks_by_block(columns).items()
        ]
        sublayers = ranks.sublayers(history)
        start_rank = int(history["start_rank"])
    except (UserError, KeyError, TypeError, IndexError, ValueError, AssertionError):
        return None
    blocks = sorted({block for _, by_block in rows for block in by_block})
    return RankTable(experiment, blocks, rows, sublayers, start_rank)
