"""The sketch of the front below a run's progress bar."""

from __future__ import annotations

import io

from pictured import RECORDS
from rich.console import Console
from rich.progress import TextColumn

from mpsearch.metric import TOP1
from mpsearch.report.terminal import FrontProgress, sketch


def test_sketch_has_cost_to_the_right_and_accuracy_upwards() -> None:
    text = sketch(RECORDS, TOP1, width=13, height=6)
    assert text is not None
    assert text.plain.splitlines() == [
        " 90.00 % │            ■",
        "         │    ●        ",
        "         │        ·    ",
        "         │    □        ",
        "         │             ",
        " 40.00 % │●            ",
        "         └─────────────",
        "          0.125cost, log scale1",
    ]


def test_nothing_is_sketched_before_trials_can_be_compared() -> None:
    assert sketch([], TOP1) is None
    assert sketch(RECORDS[:1], TOP1) is None
    assert sketch(RECORDS[4:5], TOP1) is None


def test_progress_shows_the_sketch_below_its_bars() -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    with FrontProgress(TextColumn("{task.description}"), console=console) as progress:
        progress.add_task("digits")
        progress.sketch = sketch(RECORDS, TOP1)
        progress.refresh()
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert printed.index("digits") < printed.index("90.00 %")
    assert "●" in printed
