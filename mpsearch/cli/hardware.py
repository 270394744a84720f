"""Commands about hardware: measure, hardware list, hardware show."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from mpsearch import api
from mpsearch.cli.base import Json, Set, Study, app, outside_runs
from mpsearch.cli.printing import make_console, make_table, print_json, print_lines, print_table
from mpsearch.observer import Observer

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
    print_table(table)


@hardware.command()
def show(
    hardware: Annotated[str, typer.Argument(help="A shipped profile by name, or the path of a YAML file.")],
) -> None:
    """Print a hardware profile, with the source of its numbers."""
    print_lines(api.hardware.hardware_show(hardware).text.rstrip().split("\n"))


@hardware.command("import-vela")
def import_vela(
    study: Study,
    file: Annotated[Path, typer.Argument(help="NETWORK_per-layer.csv, as `vela --verbose-performance` writes it.")],
    clock_mhz: Annotated[float, typer.Option("--clock-mhz", help="Clock of the NPU, MHz: Vela counts cycles.")],
    pair: Annotated[str, typer.Option("--pair", help="Precisions of the network that Vela compiled.")] = "w8a8",
    out: Annotated[
        Path, typer.Option("-o", "--out", help="CSV to write; rows of other pairs stay.", callback=outside_runs)
    ] = Path("table.csv"),
    set_: Set = None,
) -> None:
    """Write what Vela estimates of a study's network on an Ethos-U NPU as rows of a table."""
    rows = api.hardware.hardware_import_vela(study, file, clock_mhz, pair, out, set_ or ())
    of_pair = f"{len(rows)} rows written to {out}"
    print_lines([f"{of_pair}; use them by `hardware: {out.with_suffix('.yaml')}` and `cost: {{model: table}}`"])


@app.command()
def measure(
    study: Study,
    runtime: Annotated[
        str,
        typer.Option("--runtime", help="Runtime: onnxruntime or openvino (float, W8A8), or torch (float, bfloat16)."),
    ] = "onnxruntime",
    out: Annotated[
        Path, typer.Option("-o", "--out", help="CSV to write; a profile is written beside it.", callback=outside_runs)
    ] = Path("table.csv"),
    threads: Annotated[int, typer.Option("--threads", min=1, help="Number of threads of the runtime.")] = 1,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Measure what each layer takes on this machine, at each pair that a runtime has kernels for, and check the sum."""

    class Told(Observer):
        def on_stage(self, stage: str, done: int, of: int) -> None:
            print_lines([f"[{done}/{of}] {stage}"], make_console(stderr=True))

    measured = api.hardware.measure(study, runtime, out, threads, set_ or (), Told())
    if json_:
        print_json(measured.to_json())
        return
    table = make_table("layer", "shapes", "kernel", "pair", ">median, us", ">MAD, us", ">rounds")
    for row in measured.rows.to_dict("records"):
        groups = f", {row['groups']} groups" if row["groups"] not in ("", "1") else ""
        kernel = f"{row['kernel']} / {row['stride']}{groups}"
        table.add_row(
            row["op"] + (" + " + row["fused_with"] if row["fused_with"] else ""),
            f"{row['in_shape']} to {row['out_shape']}" if row["in_shape"] else "",
            kernel if row["kernel"] else "",
            f"{row['weight']} x {row['activation']}",
            f"{row['median_us']:.4g}",
            f"{row['mad_us']:.2g}",
            str(row["n"]),
        )
    console = make_console()
    print_table(table, console)
    lines = [f"No kernels here: {', '.join(measured.left_out)}."] if measured.left_out else []
    for check in measured.checks.to_dict("records"):
        if check["error"] is None or math.isnan(check["error"]):
            lines.append(f"{check['network']}: not compared, as {check['reason']}")
        else:
            lines.append(
                f"{check['network']}: the whole network takes {check['whole_us']:.4g} us, the sum of its rows is "
                f"{check['sum_us']:.4g} us ({check['error']:+.1%})"
            )
    profile = measured.path.with_suffix(".yaml")
    print_lines([*lines, f"written to {measured.path}; use it by `hardware: {profile}`"], console)
