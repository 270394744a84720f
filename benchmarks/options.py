"""Options that benchmarks have in common, so that one name means one thing in all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

Item = TypeVar("Item")

RESULTS = Path(__file__).parent / "results"


def commas(item: Callable[[str], Item]) -> Callable[[str | Sequence[Item]], tuple[Item, ...]]:
    """A parser of `a,b,c`; a default comes as the values themselves."""

    def items(text: str | Sequence[Item]) -> tuple[Item, ...]:
        return tuple(item(part.strip()) for part in text.split(",") if part) if isinstance(text, str) else tuple(text)

    return items


def several(item: Callable[[str], Any], help: str) -> Any:
    """An option of values separated by commas."""
    return typer.Option(parser=commas(item), metavar=f"{item.__name__.upper()},...", help=help)


Study = Annotated[str, typer.Option(help="study: the name of a shipped one, or the path of a study file")]
Set = Annotated[list[str] | None, typer.Option("--set", help="KEY.PATH=VALUE over the study file; may be repeated")]
Seeds = Annotated[Sequence[int], several(int, "random seeds, separated by commas")]
Threads = Annotated[int, typer.Option(help="number of threads of PyTorch", min=1)]
Model = Annotated[str, typer.Option(help="model, of random weights, by its name in a study file")]
Shape = Annotated[Sequence[int], several(int, "shape of an image: channels, height, width")]
Results = Annotated[Path, typer.Option(help="file of rows (JSON lines); what has a row there is not measured again")]
PrintOnly = Annotated[bool, typer.Option("--print", help="print the rows of the results file and measure nothing")]
