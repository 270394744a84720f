"""What the commands print: strings are data, which command no terminal, begin no line and are no markup or formula."""

from __future__ import annotations

import io
import logging
import re
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console
from rich.progress import Progress

import mpsearch.cli
from mpsearch.cli import base, printing
from mpsearch.cli.console import DataConsole, WordsColumn
from mpsearch.cli.printing import LineFormatter, make_table, print_csv, print_error, print_lines, print_table
from mpsearch.cli.text import visible
from mpsearch.errors import RunError

EVIL = "[/b] boom :smile: \x1b]0;PWN\x07\x1b[2J\x9b31m \u202eright\u2066\nmpsearch: fake\rline\u2028"
SHOWN = r"[/b] boom :smile: \x1b]0;PWN\x07\x1b[2J\x9b31m \u202eright\u2066\nmpsearch: fake\rline\u2028"


def console(width: int = 200, terminal: bool = False) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return DataConsole(file=out, width=width, force_terminal=terminal), out


def test_visible_leaves_what_is_printed_as_it_is() -> None:
    assert visible("10 °C ± 0.5\N{NO-BREAK SPACE}µJ, 名前, naïve ●") == "10 °C ± 0.5\N{NO-BREAK SPACE}µJ, 名前, naïve ●"
    assert visible("a\udcffb") == r"a\udcffb"  # a file name that is no UTF-8


def test_lines_and_cells_show_what_a_terminal_would_obey() -> None:
    printer, out = console()
    print_lines([EVIL], printer)
    assert out.getvalue() == f"{SHOWN}\n"
    table = make_table("name", f">{EVIL}")
    table.add_row(EVIL, "1")
    print_table(table, printer)
    assert out.getvalue().count(SHOWN) == 3
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x80-\x9f\u202e\u2028]", out.getvalue())


def test_a_progress_bar_reads_no_markup() -> None:
    printer, out = console(terminal=True)
    with Progress(WordsColumn("{task.description}"), console=printer) as progress:
        progress.add_task(EVIL)
    assert SHOWN in out.getvalue()
    assert "\x1b]0" not in out.getvalue()


def test_errors_and_logs_begin_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    print_error(EVIL)
    assert capsys.readouterr().err == "mpsearch: " + SHOWN.replace(r"\n", "\n  ") + "\n"
    print_error("study cannot be used:\n  name: missing")
    assert capsys.readouterr().err == "mpsearch: study cannot be used:\n  name: missing\n"
    record = logging.LogRecord("x", logging.INFO, "", 0, "a %s", ("b\nmpsearch: c\x1b[2J",), None)
    assert LineFormatter("mpsearch: %(message)s").format(record) == "mpsearch: a b\n  mpsearch: c\\x1b[2J"


def test_an_error_that_names_a_file_cannot_forge_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**_: object) -> None:
        raise RunError(f"no {EVIL}")

    def break_(**_: object) -> None:
        raise ValueError(EVIL)

    for raised, code in ((fail, 2), (break_, 1)):
        monkeypatch.setattr(base, "app", raised)
        with pytest.raises(SystemExit) as ended:
            base.main()
        assert ended.value.code == code
        lines = capsys.readouterr().err.splitlines()
        assert "  mpsearch: fake\\rline\\u2028" in lines
        assert "mpsearch: fake" not in {line[:14] for line in lines}


def test_csv_has_no_formulas(capsys: pytest.CaptureFixture[str]) -> None:
    texts = {
        "=HYPERLINK(1)": "'=HYPERLINK(1)",
        "@x": "'@x",
        "a\x1b\tb": r"a\x1b\tb",
        "-": "'-",
        "-2+cmd|x!A": "'-2+cmd|x!A",
    }
    for gain in ("+0.50 (-0.10 to +1.10)", "-0.52 (-1.10 to +0.14) at 1.01x of trial 29"):
        texts[gain] = gain
    print_csv(pd.DataFrame({"origin": [*texts], "score": -1.5}))
    assert capsys.readouterr().out.splitlines() == ["origin,score", *(f"{text},-1.5" for text in texts.values())]


def test_a_table_that_does_not_fit_keeps_its_words() -> None:
    printed = {}
    for width in (20, 50, 200):
        table = make_table("layer", ">activation bits", "about")
        table.add_row("block1.depthwise", "8.0", "some words that may be wrapped")
        printer, out = console(width)
        print_table(table, printer)
        printed[width] = out.getvalue().replace("─", "")
    for words in ("block1.depthwise", "activation bits", "some words that may be wrapped"):
        assert words in printed[20]  # which the terminal wraps
    assert max(map(len, printed[50].splitlines())) <= 50
    assert sorted(printed[50].split()) == sorted(printed[200].split())


def test_commands_print_through_the_one_place() -> None:
    texts = {path.name: path.read_text(encoding="utf-8") for path in Path(mpsearch.cli.__file__).parent.glob("*.py")}
    del texts[Path(printing.__file__).name], texts["console.py"], texts["text.py"]
    for forbidden in (r"(?<![\w.])print\(", r"\bConsole\(", r"\bTextColumn\b", r"logging\.Formatter", "markup"):
        assert [name for name, text in texts.items() if re.search(forbidden, text)] == [], forbidden
