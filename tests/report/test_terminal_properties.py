"""Nothing that a command prints is obeyed by the terminal or read as markup by rich, wherever the text comes from."""

import json
import re
import sys
from typing import Any

from hypothesis import strategies as st
from rich.table import Table

from blipfit.report import terminal
from hostile_inputs import texts

CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
PLAIN = st.text(st.characters(codec="ascii", min_codepoint=33, max_codepoint=126), min_size=1, max_size=30)


def table(cells: list[str]) -> Table:
    """A table with these texts as title, column and cells."""
    result = Table(title=cells[0])
    for name in cells:
        result.add_column(name)
    result.add_row(*cells)
    return result


def test_printed_texts_have_no_controls(for_all, capsys):
    def check(cells: list[str]) -> None:
        terminal.print_record({}, False, lambda _: [*cells, table(cells)])
        terminal.console(stderr=True).print(cells[0], soft_wrap=True)
        terminal.print_error(cells[0])
        printed = capsys.readouterr()
        assert not CONTROL.search(printed.out + printed.err)
        (printed.out + printed.err).encode()

    for_all(60, check, st.lists(texts(), min_size=1, max_size=4))


def test_markup_is_printed_as_it_is(for_all, capsys):
    def check(text: str) -> None:
        terminal.print_record({}, False, lambda _: text)
        assert capsys.readouterr().out == f"{text}\n"

    for_all(
        60, check, PLAIN | st.sampled_from(["[/b]", "[bold]x[/bold]", ":smile:", "[link=x]y", "\\[b]", "[@click=f()]z"])
    )


def test_json_is_the_same_value_without_controls(for_all, capsys):
    def check(record: dict[str, Any]) -> None:
        terminal.print_record(record, True, str)
        printed = capsys.readouterr().out
        assert not CONTROL.search(printed)
        assert json.loads(printed) == record

    for_all(60, check, st.dictionaries(texts(), texts() | st.lists(texts(), max_size=2), max_size=3))


def test_an_error_is_one_short_line(for_all, capsys):
    def check(message: str) -> None:
        terminal.print_error(message)
        line = capsys.readouterr().err
        assert line.startswith("blipfit: ")
        assert line.count("\n") == 1
        assert len(line) < 1000

    for_all(100, check, texts())


def test_a_long_error_keeps_its_beginning_and_its_end(capsys):
    terminal.print_error("x.jsonl:3: " + "x" * 5000 + "; fix it")
    line = capsys.readouterr().err
    assert line.startswith("blipfit: x.jsonl:3: xxx")
    assert line.endswith("x; fix it\n")
    assert len(line) < 1000


def test_escapes_are_written_out(capsys):
    terminal.print_record({}, False, lambda _: "a\x1b[31mb\x9bc\ud800d\u202ee\r")
    assert capsys.readouterr().out == "a\\x1b[31mb\\x9bc\\ud800d\\u202ee\\r\n"
    terminal.print_error("two\nlines")
    assert capsys.readouterr().err == "blipfit: two\\nlines\n"


def test_a_terminal_gets_no_escape_either(monkeypatch):
    """Also where rich writes colors."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    screen = terminal.console()
    with screen.capture() as capture:
        screen.print(table(["\x1b]0;title\x07", "[red]x"]))
    assert "\x1b]0" not in capture.get()
    assert "[red]x" in capture.get()
