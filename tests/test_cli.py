"""The command line as a user meets it: what it prints, where, and with which exit code."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from blipfit import __main__ as entry_point
from blipfit import data as blipfit_data
from blipfit import grid
from blipfit.data import icons
from blipfit.report import terminal

SHARED = Path(__file__).parents[1].parent / "shared"
needs_shared = pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="../shared/data is not here")


@pytest.fixture
def blipfit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command in this process: exit code, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["blipfit", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            entry_point.main()
        printed = capsys.readouterr()
        return ended.value.code, printed.out, printed.err  # type: ignore[return-value]

    return run


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small prepared data set."""
    folder = tmp_path_factory.mktemp("icons") / "data"
    icons.prepare(folder, train=32, val=8, test=8)
    return folder


def mistake(outcome: tuple[int, str, str]) -> str:
    """The sentence of a user's mistake: exit code 2, one line on stderr, nothing on stdout, no traceback."""
    code, out, err = outcome
    lines = err.strip().splitlines()
    assert (code, out, len(lines)) == (2, "", 1), outcome
    assert lines[0].startswith("blipfit: ")
    return lines[0]


def test_help_needs_no_torch() -> None:
    code = "import sys; from blipfit.cli import app; app(['--help'], standalone_mode=False)"
    code += "; assert 'torch' not in sys.modules"
    assert "grid" in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "iconqa", "65"],
        ["train", "iconqq", "15"],
        ["sweep", "iconqa,iconqq", "15"],
        ["sweep", "iconqa", "60-65"],
        ["show", "iconqa", "65"],
        ["cost", "iconqa", "65"],
        ["evaluate", "nowhere"],
        ["evaluate", "tiny-t5", "--on", "mmm"],
        ["retain", "tiny-t5", "smaller", "--on", "mmm"],
        ["shrink", "--model", "tiny-t5", "--on", "mmm"],
        ["features", "build", "--on", "mmm"],
        ["prepare", "mmm"],
    ],
    ids=" ".join,
)
def test_a_wrong_name_is_reported_without_torch(tmp_path: Path, arguments: list[str]) -> None:
    code = "import sys; sys.modules['torch'] = None; from blipfit.__main__ import main; main()"
    ended = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1), ended.stderr


def test_flags_have_no_type_in_the_help(blipfit) -> None:
    for command in ("train", "sweep", "prepare", "evaluate", "shrink", "cost"):
        lines = [line for line in blipfit(command, "--help")[1].splitlines() if "--help" not in line]
        assert not [line for line in lines if "bool" in line]


def test_a_recipe_file_is_shown(blipfit, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(grid.recipe("iconqa", 28, "tiny").to_yaml())
    assert (
        blipfit("show", tmp_path / "mine.yaml", "--json")[1]
        == blipfit("show", "iconqa", "28", "--model", "tiny", "--json")[1]
    )
    assert "names one experiment" in mistake(blipfit("show", tmp_path / "mine.yaml", "28"))


def test_drawn_benchmarks_say_that_they_are_drawn(blipfit, tmp_path: Path) -> None:
    _, out, _ = blipfit("prepare", "mme", "--from", "icons", "--questions", 2, "--to", tmp_path / "mme")
    assert "note: drawn from icons with seed 42" in out
    assert "part of the whole set" not in out
    assert "not the MME benchmark" in out


def test_grid_json(blipfit) -> None:
    code, out, err = blipfit("grid", "--json")
    records = json.loads(out)
    assert (code, err, len(records)) == (0, "", 64)
    assert list(records[0]) == ["id", "llm", "llm_lora", "qformer", "rank", "trainable_parameters"]
    counts = {record["id"]: record["trainable_parameters"] for record in records}
    assert (counts[28], counts[64], counts[15], counts[9]) == (3_728_128, 21_097_216, 2_339_584, 188_884_480)


def test_grid_and_show_for_people(blipfit) -> None:
    assert "21,097,216" in blipfit("grid")[1]
    code, out, err = blipfit("show", "scienceqa", "28")
    assert (code, err) == (0, "")
    assert "3,728,128 parameters are trained, 0.09 % of the 4,025,094,912 of the model with its adapter" in out
    assert "2 adapted layers have no effect" in out
    assert "│ adapter            │           │     2,125,824 │" in out
    assert "│ sum                │ 3,728,128 │ 4,025,094,912 │" in out


def test_show_json_is_a_recipe_to_start_from(blipfit, tmp_path: Path) -> None:
    record = json.loads(blipfit("show", "iconqa", "47", "--model", "tiny", "--json")[1])
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(record["recipe"]))
    from blipfit import recipe

    assert recipe.load(file) == grid.recipe("iconqa", 47, "tiny")


def test_train_then_skip_then_refuse(blipfit, drawn: Path, tmp_path: Path) -> None:
    command = ["train", "icons", "13", "29", "--model", "tiny", "--data", drawn, "--results", tmp_path]
    command += ["--set", "training.max_epochs=1", "--json"]
    code, out, err = blipfit(*command)
    results = json.loads(out)["results"]
    assert code == 0, err
    assert [record["experiment"] for record in results] == ["13", "29"]
    assert all(record["metrics"][split]["questions"] == 8 for record in results for split in ("val", "test"))
    assert "differs from the grid's recipe" in err
    assert "one in full" in err
    before = (tmp_path / "icons/13/result.json").read_bytes()
    code, again, err = blipfit(*command)
    assert code == 0
    assert json.loads(again)["results"] == results
    assert "finished already" in err
    assert "holds results of another recipe (training.max_epochs is 1 there and 2 here)" in mistake(
        blipfit(*command, "--set", "training.max_epochs=2")
    )
    assert (tmp_path / "icons/13/result.json").read_bytes() == before
    code, out, _ = blipfit("evaluate", tmp_path / "icons/13", "--data", drawn, "--base", "--json")
    judged = json.loads(out)
    assert judged["tuned"]["accuracy"] == results[0]["metrics"]["test"]["accuracy"] == judged["recorded"]
    assert judged["base"]["questions"] == 8
    adapter = tmp_path / "icons/13/adapter"
    shutil.rmtree(adapter)
    shutil.copytree(tmp_path / "icons/29/adapter", adapter)
    assert "is not the adapter" in mistake(blipfit("evaluate", tmp_path / "icons/13", "--data", drawn))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train", "scienceqa", "65"], "no experiment '65'; the grid has 1 to 64"),
        (["train", "scienceqb", "15"], "no data set 'scienceqb'"),
        (["train", "scienceqa"], "say which experiments"),
        (["train", "icons", "15", "--modell", "tiny"], "--model"),
        (["train", "icons", "15", "--set", "training.max_epoch=1"], "did you mean 'max_epochs'?"),
        (["train", "icons", "15", "--set", "training=1"], "is a section"),
        (["train", "icons", "15", "--set", "training.max_epochs=many"], "training.max_epochs"),
        (["train", "icons", "15", "--data", "nowhere"], "run `blipfit prepare icons --to nowhere`"),
        (["train", "iconqa", "15", "--data", "nowhere"], "run `blipfit prepare iconqa --from DIR --to nowhere`"),
        (["train", "missing.yaml"], "missing.yaml does not exist"),
        (["train", "icons", "15", "--device", "quantum"], "--device quantum"),
        (["evaluate", "nowhere"], "nowhere is not a run folder"),
        (["prepare", "scienceqa"], "--from DIR, or --from hub"),
        (["prepare", "scienceqa", "--from", "nowhere"], "nowhere"),
        (["prepare", "icons", "--from", "x"], "drawn"),
        (["show", "iconqa", "0"], "no experiment '0'"),
        (["show", "iconqa"], "say which experiments"),
        (["shrink", "--model", "tiny-t5", "--dry-run", "--on", "icon"], "did you mean 'icons'?"),
        (["shrink", "--model", "tiny-t5"], "--to DIR"),
        (["features", "build", "--on", "icon"], "did you mean 'icons'?"),
        (["nosuch"], "nosuch"),
    ],
)
def test_a_mistake_is_one_sentence(blipfit, tmp_path: Path, monkeypatch, arguments, sentence) -> None:
    monkeypatch.chdir(tmp_path)
    data = [] if arguments[0] != "train" or "--data" in arguments or arguments[1] != "icons" else ["--data", tmp_path]
    assert sentence in mistake(blipfit(*arguments, *data))
    assert list(tmp_path.iterdir()) == []


def test_an_absent_model_claims_no_folder(blipfit, drawn: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    outcome = blipfit("train", "icons", "15", "--model", "owner/absent", "--data", drawn, "--results", tmp_path / "r")
    assert "`owner/absent` is not in the local cache" in mistake(outcome)
    assert not (tmp_path / "r").exists()


def test_an_image_that_breaks_before_training(blipfit, tmp_path: Path) -> None:
    icons.prepare(tmp_path / "data", train=16, val=4, test=4)
    broken = next((tmp_path / "data/train").rglob("image.png"))
    broken.write_bytes(broken.read_bytes()[:60])
    arguments = ["train", "icons", "13", "--model", "tiny", "--data", tmp_path / "data", "--results", tmp_path / "r"]
    code, out, err = blipfit(*arguments, "--set", "training.max_epochs=1")
    assert (code, out) == (2, "")
    assert str(broken) in err.splitlines()[-1]
    assert not (tmp_path / "r/icons/13/result.json").exists()


@needs_shared
def test_prepare_counts(blipfit, tmp_path: Path) -> None:
    report = json.loads(
        blipfit("prepare", "scienceqa", "--from", SHARED / "data/scienceqa", "--to", tmp_path / "s", "--json")[1]
    )
    assert report["counts"] == {"train": 120, "val": 40, "test": 40}
    out = blipfit("prepare", "iconqa", "--from", SHARED / "data/iconqa", "--to", tmp_path / "i")[1]
    assert "24 train / 8 val / 8 test" in out


def test_prepare_draws_what_is_asked_for(blipfit, tmp_path: Path) -> None:
    def prepared(*arguments: object) -> dict:
        return json.loads(blipfit("prepare", *arguments, "--json")[1])

    taught = tmp_path / "taught"
    report = prepared("icons", "--to", taught, "--questions", 30, "--skills", "taught", "--seed", 7)
    assert report["counts"]["train"] == 30
    rows = json.loads((taught / "annotations/train.json").read_text())
    assert {row["skill"] for row in rows} <= set(icons.PRETRAINED)
    assert json.loads((taught / "icons.json").read_text())["seed"] == 7
    prepared("icons", "--to", tmp_path / "odd", "--questions", 5, "--skills", "odd, pattern")
    rows = json.loads((tmp_path / "odd/annotations/train.json").read_text())
    assert {row["skill"] for row in rows} == {"odd", "pattern"}
    report = prepared("mme", "--from", "icons", "--questions", 3, "--seed", 7, "--to", tmp_path / "m")
    assert report["counts"] == {"test": 4 * 3 * 2}
    assert prepared("mme", "--from", "icons", "--questions", 3, "--seed", 7, "--to", tmp_path / "m") == report
    code, _, err = blipfit("prepare", "mme", "--from", "icons", "--questions", 2, "--to", tmp_path / "m")
    assert code == 2
    assert "holds something else" in err


def test_no_group_of_skills_is_called_like_a_skill() -> None:
    assert not {"held-out", "taught", "every"} & set(icons.SKILLS)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["scienceqa", "--from", "hub", "--questions", "5"], "scienceqa is read as it is"),
        (["iconqa", "--from", "hub", "--seed", "5"], "iconqa is read as it is"),
        (["mme", "--from", "icons", "--skills", "odd"], "--skills are those of icons"),
        (["icons", "--skills", "ood"], "icons have no skill 'ood'; write held-out, taught, every, or of"),
        (["mme", "--seed", "5", "--from", "hub"], "as mme is with --from icons"),
    ],
)
def test_what_is_not_drawn_so_is_refused(blipfit, tmp_path: Path, arguments: list[str], why: str) -> None:
    code, out, err = blipfit("prepare", *arguments, "--to", tmp_path / "x")
    assert (code, out) == (2, "")
    assert why in err.splitlines()[-1]
    assert not (tmp_path / "x").exists()


def test_doctor(blipfit, drawn: Path) -> None:
    code, out, _ = blipfit("doctor", "--data", drawn, "--json")
    checks = {check["check"]: check for check in json.loads(out)["checks"]}
    assert code == 0
    assert checks["miniature tiny-t5"]["state"] == "ok"
    assert "32 train / 8 val / 8 test" in checks[f"data {drawn}"]["found"]
    code, out, _ = blipfit("doctor", "--data", drawn.parent)
    assert code == 1
    assert "wrong" in out


@needs_shared
def test_score_mme_gives_the_official_numbers(blipfit) -> None:
    record = json.loads(blipfit("score", "mme", SHARED / "data/mme/LaVIN", "--json")[1])
    assert (record["perception"], record["cognition"]) == (963.61, 249.64)
    assert "963.61" in blipfit("score", "mme", SHARED / "data/mme/LaVIN")[1]


def test_evaluate_a_model_and_a_run_on_other_sets(blipfit, drawn: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(blipfit_data.DRAWN_COUNTS, "rewardbench", 40)
    assert "rewardbench: " in blipfit("prepare", "rewardbench", "--from", "icons", "--to", "pairs")[1]
    train = ["train", "icons", "13", "--model", "tiny", "--data", drawn, "--set", "training.max_epochs=1", "--json"]
    assert blipfit(*train)[0] == 0
    on = ["--on", f"icons={drawn},rewardbench=pairs", "--limit", 4, "--decoding", "short-answer"]
    code, out, err = blipfit("evaluate", "results/icons/13", *on, "--json")
    ours, pairs = json.loads(out)
    assert code == 0, err
    assert (ours["on"], ours["questions"], pairs["clip"]) == ("icons", 4, "tiny-clip")
    assert {"base", "tuned", "difference"} <= pairs.keys()
    written = tmp_path / "results/icons/13/evaluations/rewardbench-test-first-4"
    assert json.loads((written / "evaluation.json").read_text())["adapter_sha256"] == pairs["adapter_sha256"]
    code, out, err = blipfit("evaluate", "tiny-t5", *on)
    assert code == 0, err
    assert "pairwise accuracy, mean" in out
    assert "with adapter" not in out
    assert (tmp_path / "results/evaluations/tiny-t5/rewardbench-test-first-4/evaluation.json").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["evaluate", "tiny-t5", "--on", "icons,icons"], "names a data set twice"),
        (["evaluate", "tiny-t5", "--on", "icons,mme", "--data", "x"], "write --on icons=DIR,mme=DIR"),
        (["evaluate", "tiny-t5", "--on", "icon"], "did you mean 'icons'?"),
        (["evaluate", "tiny-t5", "--on", "icons=x", "--split", "all"], "--split all is for rewardbench"),
        (["evaluate", "tiny-t6", "--on", "icons=x"], "unknown model 'tiny-t6'"),
        (["evaluate", "tiny-t5", "--on", "icons=nowhere"], "nowhere does not exist"),
        (["score", "mme", "nowhere"], "nowhere is not a folder"),
        (["score", "rouge", "nowhere"], "unknown benchmark 'rouge'; known: mme"),
        (["prepare", "iconqa", "--from", "icons"], "iconqa cannot be drawn from icons"),
    ],
)
def test_a_mistake_of_judging_is_one_sentence(blipfit, tmp_path: Path, monkeypatch, arguments, sentence) -> None:
    monkeypatch.chdir(tmp_path)
    assert sentence in mistake(blipfit(*arguments))
    assert not list(tmp_path.rglob("*.json"))


def test_ask_caption_and_search(blipfit, drawn: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BLIPFIT_CACHE", str(tmp_path / "cache"))
    pictures = sorted(drawn.rglob("image.png"))[:2]
    code, out, err = blipfit("ask", pictures[0], "How many shapes are there?", "--model", "tiny", "--json")
    assert (code, json.loads(out)["image"]) == (0, str(pictures[0])), err
    assert blipfit("ask", pictures[0], "Which?", "--choice", "a", "--choice", "b", "--model", "tiny")[1].count("%") == 2
    records = json.loads(blipfit("caption", *pictures, "--model", "tiny-vicuna", "--json")[1])
    assert [record["image"] for record in records] == list(map(str, pictures))
    code, out, err = blipfit("search", drawn / "val", "a yellow star", "--top", 3, "--model", "tiny", "--json")
    assert (code, len(json.loads(out)["found"])) == (0, 3), err
    assert "8 images to compute once" in err
    code, out, err = blipfit("search", drawn / "val", "a yellow star", "--top", 3, "--model", "tiny")
    assert (code, err) == (0, "")
    assert (tmp_path / "search.png").exists()
    assert "search.png" in out
    assert [name.count("/") for name in terminal.distinct_names(pictures)] == [1, 1]
    assert "missing" in mistake(blipfit("ask", "none.png", "What?", "--model", "tiny"))


def test_ablation_and_ranks_of_runs(blipfit, drawn, tmp_path) -> None:
    own = ("--model", "tiny", "--data", drawn, "--results", tmp_path, "--json")
    own += ("--set", "training.max_epochs=1", "--set", "training.batch_size=8", "--set", "data.limit=16")
    assert blipfit("train", "icons", "14", "18", *own)[0] == 0
    code, out, _ = blipfit("ablation", tmp_path / "icons", "--json")
    (record,) = json.loads(out)
    assert (code, record["dataset"], record["experiments"]) == (0, "icons", 2)
    found = {(e["kind"], e["what"]): e["runs"][0][:2] for e in record["effects"] if e["pairs"]}
    assert found == {("instead", "qformer ffn"): ["18", "14"], ("instead", "qformer self_attn"): ["14", "18"]}
    code, out, _ = blipfit("ablation", tmp_path / "icons")
    assert (code, "instead of another sublayer" in out) == (0, True)
    assert "give the folder of a data set's runs" in mistake(blipfit("ablation", tmp_path))
    assert "was trained with lora" in mistake(blipfit("ranks", tmp_path / "icons" / "14", tmp_path / "icons" / "18"))
