"""The report of one real run and of copies of its files with other recipes and numbers."""

import csv
import functools
import http.client
import io
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from blipfit import grid
from blipfit.commands import ablation, report
from blipfit.errors import UserError
from blipfit.report import published, terminal
from blipfit.run_folder import Run, read_json, read_lines, write_json, write_lines
from blipfit.training import loop
from report_results import copy_grid, copy_run, resolve

VOID = {"meta", "link", "br", "img", "wbr"}
SCRIPT = "<script>alert(1)</script>"


@dataclass
class Element:
    tag: str
    attributes: dict[str, str | None]
    parent: "Element | None"
    text: str = ""
    children: list["Element"] = field(default_factory=list)

    def ancestors(self):
        element = self.parent
        while element is not None:
            yield element
            element = element.parent


class Page(HTMLParser):
    """All elements of a page; fails if they are not nested correctly."""

    def __init__(self, html: str):
        super().__init__()
        self.elements: list[Element] = []
        self.open: list[Element] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        element = Element(tag, dict(attrs), self.open[-1] if self.open else None)
        self.elements.append(element)
        if element.parent:
            element.parent.children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop().tag == tag, (tag, self.getpos())

    def handle_data(self, data):
        for element in self.open:
            element.text += data

    def all(self, *tags: str) -> list[Element]:
        return [element for element in self.elements if element.tag in tags]


parse = functools.lru_cache(Page)


@pytest.fixture(scope="module")
def real_run(small, iconqa, tmp_path_factory) -> Run:
    """Experiment 31 on a small model, trained for one epoch."""
    changes = ["training.batch_size=2", "training.accumulation=1", "training.max_epochs=1", "data.images=off"]
    recipe = grid.recipe("iconqa", 31, str(small["t5"])).override(changes)
    (run,) = loop.train([recipe], iconqa, tmp_path_factory.mktemp("real") / "results", device="cpu")
    return run


@pytest.fixture(scope="module")
def results(real_run, tmp_path_factory) -> Path:
    """A results folder with parts of both grids, a baseline, an evaluation, a retention record and a failed run."""
    folder = tmp_path_factory.mktemp("report") / "results"
    copy_grid(real_run, folder, ["scienceqa"], [*range(1, 9), *range(13, 17), *range(33, 41)])
    copy_grid(real_run, folder, ["iconqa"], [15, 28])
    copy_run(real_run, folder, grid.recipe("scienceqa", "baseline"), percent=85.5)
    failed = Run.of(folder, grid.recipe("scienceqa", 60)).create()
    failed.recipe_file.write_text(grid.recipe("scienceqa", 60).to_yaml())
    failed.fail("the loss is not finite")
    write_json(Run(folder / "scienceqa" / "15").evaluation("mme-test").record_file, mme_record())
    write_json(folder / "retention.json", retention_record())
    return folder


def mme_record(benchmark: bool = True) -> dict:
    def metrics(score):
        subtasks = {"existence": {"score": score}, "code_reasoning": {"score": 50.0}}
        return {
            "judge": "mme",
            "benchmark": benchmark,
            "deviations": [] if benchmark else ["existence has 2 questions"],
            "perception": score,
            "cognition": 50.0,
            "subtasks": subtasks,
        }

    fields = {"on": "mme", "split": "test", "questions": 8, "model": "Salesforce/instructblip-flan-t5-xl"}
    difference = {"perception": {"difference": 10.0, "interval": None}}
    return {**fields, "run": "scienceqa/15", "base": metrics(170.0), "tuned": metrics(180.0), "difference": difference}


def retention_record() -> dict:
    def candidate(name, share, ratio):
        values = {"accuracy": 61.0, "raw": {"ratio": 0.9}, "corrected": {"ratio": ratio, "interval": [0.5, None]}}
        return {
            "name": name,
            "on": {"icons": values},
            "retention": ratio,
            "shares": {"qformer_parameters": share, "flops": share},
            "pareto": ratio is not None,
        }

    candidates = [candidate("small/half", 0.5, 0.8), candidate("small/tenth", 0.1, None)]
    return {"base": "tiny-t5", "split": "test", "on": {"icons": {}}, "at_least": None, "candidates": candidates}


@pytest.fixture(scope="module")
def html(results, iconqa) -> str:
    to = results.parent / "report.html"
    record = report.run([results], to, [iconqa])
    assert (record["finished"], len(record["unfinished"])) == (23, 1)
    text = to.read_text(encoding="utf-8")
    assert record["bytes"] == to.stat().st_size < 10e6
    return text


def test_every_number_is_in_a_result_file(html):
    numbers = parse(html).all("data")
    assert len(numbers) > 400
    for number in random.Random(7).sample(numbers, 200):
        attributes = number.attributes
        recorded = resolve(attributes["data-source"])
        assert float(attributes["value"]) == pytest.approx(recorded, rel=1e-12), attributes
        if "data-duration" in attributes:
            assert number.text == terminal.format_duration(recorded)
            continue
        value = (recorded - (resolve(attributes["data-minus"]) if "data-minus" in attributes else 0)) * float(
            attributes.get("data-factor", 1)
        )
        printed = float(number.text.replace("−", "-").replace(",", ""))
        assert printed == pytest.approx(value, abs=0.5001 * 10.0 ** -int(attributes["data-digits"])), attributes
    sources = {urlsplit(number.attributes["data-source"]).path.rpartition("/")[2] for number in numbers}
    assert sources >= {"result.json", "log.jsonl", "published.json", "evaluation.json", "retention.json"}
    assert any("data-minus" in number.attributes for number in numbers)


def test_figures_are_drawn_from_result_files(html):
    points = [element for element in parse(html).elements if "data-x-source" in element.attributes]
    assert len(points) == 23 + 1  # experiments, and the candidate with a retention
    for point in points:
        x, y = (resolve(point.attributes[name]) for name in ("data-x-source", "data-y-source"))
        (title,) = (child.text for child in point.children if child.tag == "title")
        assert f"{y:.1f}" in title or f"{100 * y:.1f}" in title
        assert f"{x:,}" in title or f"{100 * x:.1f}" in title


def test_the_page_is_one_file_without_references(html):
    for element in parse(html).elements:
        for name in ("src", "href", "action", "data", "srcset", "xlink:href"):
            target = element.attributes.get(name) or "#"
            assert target.startswith(("#", "data:")), (element.tag, target)
    assert not re.search(r"(?i)https?://|url\(|@import|fetch\((?!\"/version\")", html)
    assert "default-src 'none'" in html
    assert "connect-src" not in html


def test_the_page_is_valid_and_labeled(html):
    parsed = parse(html)
    ids = Counter(e.attributes["id"] for e in parsed.elements if "id" in e.attributes)
    assert max(ids.values()) == 1
    for element in parsed.elements:
        for name in ("aria-labelledby", "aria-describedby"):
            assert all(part in ids for part in (element.attributes.get(name) or "").split())
        target = element.attributes.get("href") or ""
        assert not target.startswith("#") or target[1:] in ids, target
    for figure in parsed.all("figure"):
        (drawing,) = (child for child in figure.children if child.tag == "svg")
        assert drawing.attributes["role"] == "img"
        assert drawing.attributes["aria-labelledby"]
    for table in parsed.all("table"):
        assert table.children[0].tag == "caption"
        assert table.children[0].text
    assert all("scope" in cell.attributes for cell in parsed.all("th"))
    assert all(image.attributes.get("alt") for image in parsed.all("img"))
    assert all(any(a.tag == "label" for a in select.ancestors()) for select in parsed.all("select"))
    levels = [int(heading.tag[1]) for heading in parsed.all("h1", "h2", "h3", "h4")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert len(parsed.all("main")) == 1
    assert len(parsed.all("nav")) == 1


def cells(html: str, caption: str) -> list[list[str]]:
    """The rows of the table with this caption, as texts without doubled blanks."""
    parsed = parse(html)
    (table,) = (t for t in parsed.all("table") if caption in t.children[0].text)
    rows = [element for element in parsed.all("tr") if any(a is table for a in element.ancestors())]
    return [[" ".join(cell.text.split()) for cell in row.children] for row in rows]


def test_published_values_stand_beside_ours_by_the_stated_rule(html, results):
    rows = cells(html, "scienceqa, Flan-T5: test accuracy")
    assert [row[0] for row in rows[1:4]] == ["QF full · LLM ffn", "QF full · LLM attn", "QF full · LLM attn+ffn"]
    assert rows[3][1:] == ["–published 87.41", "–published 87.36", "–published 88.20", "–published 87.90"]
    marked = 0
    for number, row, rank in [(n, (n - 1) // 4, (n - 1) % 4) for n in (*range(1, 9), *range(13, 17))]:
        test = read_json(results / "scienceqa" / str(number) / "result.json")["metrics"]["test"]
        reference = published.accuracy("scienceqa", str(number)).value
        low, high = test["interval"]
        text = rows[1 + row][1 + rank].replace("−", "-")
        assert text.startswith(f"{test['accuracy']:.1f} [{low:.1f}–{high:.1f}]published {reference:.2f}")
        assert f"difference {test['accuracy'] - reference:+.1f}" in text
        assert ("beyond noise" in text) == (not low <= reference <= high)
        marked += "beyond noise" in text
    assert marked > 0
    assert "A difference is marked" in html
    (baseline,) = (row for row in cells(html, "Test scores of baselines") if row[1] == "baseline")
    assert "published 85.52difference" in baseline[-1]


def test_no_difference_to_another_model_or_a_part_of_the_questions(real_run, tmp_path):
    copy_run(real_run, tmp_path, grid.recipe("scienceqa", 13, "tiny"))
    copy_run(real_run, tmp_path, grid.recipe("scienceqa", 14).override(["data.limit=20"]))
    report.run([tmp_path], tmp_path / "a.html")
    text = (tmp_path / "a.html").read_text()
    assert "published <data" in text
    assert "data-minus" not in text
    assert "of another model than the published one" in text


def test_other_settings_are_named_beside_a_difference(real_run, tmp_path):
    run = copy_run(real_run, tmp_path, grid.recipe("scienceqa", 13).override(["training.seed=1"]))
    changes = {"training.seed": [42, 1], "training.batch_size": [16, 8], "training.accumulation": [1, 2]}
    write_json(run.result_file, {**run.result(), "differs_from_published": changes})
    report.run([tmp_path], tmp_path / "a.html")
    assert "† trained with other settings than published: 13 (training.seed)." in (tmp_path / "a.html").read_text()


def test_effects_are_those_of_ablation(html, results):
    (record,) = ablation.run([results / "scienceqa"])
    effects = [effect for effect in record["effects"] if effect["pairs"]]
    rows = [row for row in cells(html, "scienceqa: mean difference") if len(row) == 6][1:]
    assert [row[0] for row in rows] == [effect["what"] for effect in effects]
    assert [row[2].replace("−", "-") for row in rows] == [f"{effect['mean']:+.2f}" for effect in effects]
    assert [int(row[4]) for row in rows] == [effect["pairs"] for effect in effects]


def test_failed_and_missing_experiments_are_listed(html, results):
    assert cells(html, "Experiments without a result")[1] == [
        str(results / "scienceqa" / "60"),
        "failed: the loss is not finite",
    ]
    assert "iconqa: 62 of the grid's 64 experiments have no run folder: 1–14, 16–27, 29–64." in html


def test_mme_and_retention(html, results, tmp_path):
    (header, existence, *_) = cells(html, "MME: score")
    base = "Salesforce/instructblip-flan-t5-xl, base, 8 questions"
    assert header[1:] == [base, "scienceqa/15, 8 questions", "LaVIN, published"]
    assert existence == ["existence", "170.00", "180.00", "185.00"]
    assert cells(html, "Retention of tiny-t5")[1:] == [
        ["small/half", "icons", "61.0", "90.0", "80.0", "50.0", "50.0", "yes"],
        ["small/tenth", "icons", "61.0", "90.0", "–", "10.0", "10.0", "no"],
    ]
    shutil.copytree(results / "scienceqa" / "15", tmp_path / "r" / "scienceqa" / "15")
    write_json(Run(tmp_path / "r" / "scienceqa" / "15").evaluation("mme-test").record_file, mme_record(False))
    report.run([tmp_path / "r"], tmp_path / "a.html")
    text = (tmp_path / "a.html").read_text()
    assert "LaVIN, published" not in text
    assert "not the MME benchmark: existence has 2 questions" in text


def test_a_retention_record_alone(tmp_path):
    write_json(tmp_path / "r.json", retention_record())
    assert report.run([tmp_path / "r.json"], tmp_path / "a.html")["finished"] == 0
    headings = [heading.text for heading in Page((tmp_path / "a.html").read_text()).all("h2")]
    assert headings == ["Retention and cost"]
    write_json(tmp_path / "other.json", {"a": 1})
    with pytest.raises(UserError, match=r"not the output of `blipfit retain --json`"):
        report.run([tmp_path / "other.json"], tmp_path / "a.html")


def test_examples_have_questions_and_pictures(html, iconqa):
    parsed = parse(html)
    examples = [element for element in parsed.all("li") if element.attributes.get("class") == "example"]
    iconqa_examples = [e for e in examples if any(child.tag == "img" for child in e.children)]
    questions = json.loads((iconqa / "annotations" / "test.json").read_text())
    assert len(iconqa_examples) == len(questions)
    assert {q["question"] for q in questions} == {e.children[1].children[0].children[0].text for e in iconqa_examples}
    assert all(len(image.attributes["src"]) < 20_000 for image in parsed.all("img"))
    assert "without questions and pictures: none of data/scienceqa" in html  # its data folder is not here


def test_data_with_other_questions_give_no_pictures(real_run, iconqa, tmp_path):
    shutil.copytree(iconqa, tmp_path / "data")
    file = tmp_path / "data" / "annotations" / "test.json"
    file.write_text(file.read_text().replace("Which", "What"))
    report.run([real_run.folder], tmp_path / "a.html", [tmp_path / "data"])
    text = (tmp_path / "a.html").read_text()
    assert "<img" not in text
    assert "holds other questions than the runs" in text


def test_texts_of_files_are_no_html(real_run, iconqa, tmp_path):
    recipe = grid.recipe("iconqa", 31).override(["experiment=<script>alert(1)<b>"])
    run = copy_run(real_run, tmp_path / "results", recipe)
    lines = [{**line, "prediction": SCRIPT, "answer": f"(a) {SCRIPT}"} for line in read_lines(run.predictions_file)]
    write_lines(run.predictions_file, lines)
    result = run.result() | {"prompt_example": f"{SCRIPT}\x1b[31m\ud83d", "device": SCRIPT}
    result.pop("questions_sha256")
    run.result_file.write_text(json.dumps(result))
    failed = copy_run(real_run, tmp_path / "results", grid.recipe("iconqa", 32))
    failed.result_file.unlink()
    failed.fail(f"'\"><img src=x onerror=alert(1)>{SCRIPT}")
    shutil.copytree(iconqa, tmp_path / "data")
    file = tmp_path / "data" / "annotations" / "test.json"
    entries = json.loads(file.read_text())
    for entry in entries:
        entry["question"] = f"Which {SCRIPT}?"
        entry["choices"] = [SCRIPT, "other"]
        entry["answer"] = 0
    file.write_text(json.dumps(entries))
    report.run([tmp_path / "results"], tmp_path / "a.html", [tmp_path / "data"])
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    parsed = Page(text)
    assert len(parsed.all("script")) == 1
    assert all(
        "src" not in image.attributes or image.attributes["src"].startswith("data:") for image in parsed.all("img")
    )
    assert not [name for element in parsed.elements for name in element.attributes if name.startswith("on")]
    body = " ".join(element.text for element in parsed.all("main"))
    for expected in (f"Which {SCRIPT}?", f"answer: (a) {SCRIPT}", "<script>alert(1)<b>", "\\x1b[31m\\ud83d", "onerror"):
        assert expected in body, expected


def test_tables_in_all_forms_agree(results, tmp_path):
    texts = {}
    for suffix in ("md", "tex", "csv", "json"):
        report.run([results], tmp_path / f"table.{suffix}")
        texts[suffix] = (tmp_path / f"table.{suffix}").read_text(encoding="utf-8")
    rows = json.loads(texts["json"])["rows"]
    read = list(csv.DictReader(io.StringIO(texts["csv"])))
    assert len(rows) == 23
    assert read == [{name: "" if value is None else str(value) for name, value in row.items()} for row in rows]
    for row in rows:
        test = read_json(results / row["dataset"] / row["experiment"] / "result.json")["metrics"]["test"]
        assert row["score"] == round(test["accuracy"], 1)
        assert (row["low"], row["high"]) == tuple(round(end, 1) for end in test["interval"])
        assert row["difference"] == pytest.approx(row["score"] - row["published"], abs=0.06)
        cell = f"{row['score']:.1f} [{row['low']:.1f}–{row['high']:.1f}]" + f" {row['outside']}".rstrip()
        if row["experiment"] != "baseline":
            cell += f", {row['published']:.2f}"
        assert cell in texts["md"]
        latex = cell.replace("[", "{[}").replace("]", "{]}").replace("–", "--")
        latex = latex.replace("▲", "$\\blacktriangle$").replace("▼", "$\\blacktriangledown$")
        assert latex in texts["tex"]
    assert texts["tex"].count("\\begin{tabular}") == texts["md"].count("| placement |") == 4


@pytest.mark.parametrize("name", ["report.pdf", "report", "report.HTML5"])
def test_an_unknown_ending_lists_the_known_ones(results, tmp_path, name):
    with pytest.raises(UserError, match=r"known: \.html, \.md, \.tex, \.csv, \.json"):
        report.run([results], tmp_path / name)


def test_without_a_finished_experiment(real_run, tmp_path):
    with pytest.raises(UserError, match=r"not a folder; give results folders"):
        report.run([tmp_path / "absent"], tmp_path / "a.html")
    with pytest.raises(UserError, match=r"holds no run; train one first"):
        report.run([tmp_path], tmp_path / "a.html")
    run = copy_run(real_run, tmp_path, grid.recipe("iconqa", 31))
    run.result_file.unlink()
    run.fail("out of memory")
    with pytest.raises(UserError, match=r"no experiment is finished .*failed: out of memory.*train. or .blipfit sweep"):
        report.run([tmp_path], tmp_path / "a.html")
    assert not (tmp_path / "a.html").exists()


def test_results_of_version_0_1_and_results_with_missing_fields(real_run, tmp_path, iconqa):
    old = copy_run(real_run, tmp_path / "results", grid.recipe("iconqa", 13))
    result = old.result()
    for name in ("questions_sha256", "images_sha256", "base_sha256", "texts", "differs_from_published"):
        result.pop(name, None)
    recipe = result["recipe"]
    recipe["judging"] = recipe.pop("evaluation")
    del recipe["performance"]
    write_json(old.result_file, result)
    bare = copy_run(real_run, tmp_path / "results", grid.recipe("iconqa", 14))
    write_json(bare.result_file, {"metrics": {"test": {"accuracy": 50}}, "adapter_sha256": "", "recipe": {"x": 1}})
    for file in (bare.log_file, bare.predictions_file, bare.recipe_file):
        file.unlink()
    cut = copy_run(real_run, tmp_path / "results", grid.recipe("iconqa", 15))
    cut.log_file.write_text(cut.log_file.read_text()[:-20])
    cut.predictions_file.write_text(cut.predictions_file.read_text()[:-20])
    damaged = copy_run(real_run, tmp_path / "results", grid.recipe("iconqa", 16))
    damaged.result_file.write_text("{")
    record = report.run([tmp_path / "results"], tmp_path / "a.html", [iconqa])
    assert record["finished"] == 3
    assert list(record["unfinished"]) == [str(damaged.folder)]
    rows = {row[0]: row for row in cells((tmp_path / "a.html").read_text(), "iconqa: finished experiments")}
    assert rows["14"][4:6] == ["50.0", "–"]
    assert rows["13"][1:3] == ["QF ffn", "1"]
    for suffix in ("md", "tex", "csv", "json"):
        report.run([tmp_path / "results"], tmp_path / f"a.{suffix}")


def test_one_experiment_only(real_run, tmp_path):
    record = report.run([real_run.folder], tmp_path / "a.html")
    assert record["finished"] == 1
    text = (tmp_path / "a.html").read_text()
    assert 'href="#effects"' not in text
    assert "open" in report.render(record)[-1]


def test_the_command_imports_no_torch(results, tmp_path):
    code = "import sys; from blipfit.cli import app; app(sys.argv[1:], standalone_mode=False)"
    code += "; assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)"
    command = [sys.executable, "-c", code, "report", str(results), "--to", str(tmp_path / "a.html")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert "report of 23 finished experiments: open" in printed
    assert (tmp_path / "a.html").stat().st_size > 100_000


def test_watch_serves_and_reloads_until_ctrl_c(real_run, tmp_path):
    run = copy_run(real_run, tmp_path / "results", grid.recipe("iconqa", 15))
    finished = run.result_file.read_text()
    run.result_file.unlink()
    command = [sys.executable, "-m", "blipfit", "report", "results", "--watch", "--port", "0"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    server = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        port = int(re.search(r"http://127\.0\.0\.1:(\d+)/", server.stderr.readline())[1])

        def get(path: str, host: str = "localhost") -> tuple[int, str]:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            connection.request("GET", path, headers={"Host": f"{host}:{port}"})
            response = connection.getresponse()
            return response.status, response.read().decode()

        assert "no experiment is finished" in get("/")[1]
        version = get("/version")[1]
        assert get("/", host="example.org")[0] == 403
        assert get("/etc/passwd")[0] == 404
        run.result_file.write_text(finished)
        for _ in range(600):
            if get("/version")[1] != version:
                break
            time.sleep(0.05)
        assert "iconqa: finished experiments" in get("/")[1]
        assert "connect-src 'self'" in get("/")[1]
    finally:
        server.send_signal(signal.SIGINT)
        _, printed = server.communicate(timeout=60)
    assert server.returncode == 0
    assert printed.strip().splitlines() == ["the report is no longer served; `blipfit report` writes it to a file"]


def test_a_port_in_use_is_an_error(real_run, tmp_path):
    from blipfit.report.watch import HOST, ReportServer

    server = ReportServer(0, lambda: "", [])
    try:
        with pytest.raises(UserError, match=r"port \d+ cannot be used .*--port"):
            report.watch([real_run.folder], server.server_address[1], [], print)
        assert server.url.startswith(f"http://{HOST}:")
    finally:
        server.server_close()
