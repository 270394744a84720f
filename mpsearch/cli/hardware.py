"""Commands about hardware profiles: hardware list, hardware show."""

from __future__ import annotations

from typing import Annotated

import typer

from mpsearch import api
from mpsearch.cli.base import Json, app
from mpsearch.cli.printing import make_console, make_table, print_json, print_lines

hardware = typer.Typer(no_args_is_help=True, help="Hardware profiles: which pairs of precisions a device runs.")
app.add_typer(hardware, name="hardware")


@hardware.command("list")
def list_(json_: Json = False) -> None:
    """List the hardware profiles that ship with mpsearch."""
    profiles = api.hardware.hardware_list()
    if json_:
        print_json([profile.to_json() for profile in profiles])
        return
    table = make_table("hardware", ">measured rows", "about")
    for profile in profiles:
        table.add_row(profile.name, str(profile.rows or ""), profile.about)
    make_console().print(table)


@hardware.command()
def show(
    hardware: Annotated[str, typer.Argument(help="A shipped profile by name, or the path of a YAML file.")],
) -> None:
    """Print a hardware profile, with the source of its numbers."""
    print_lines([api.hardware.hardware_show(hardware).text.rstrip()])
