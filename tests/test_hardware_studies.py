"""Whole studies for hardware: what is tried can be run there, and a run needs no file beside its folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import mpsearch as command
from quick import QUICK

import mpsearch
from mpsearch.facts import read_facts
from mpsearch.hardware.profile import Allowed, load_profile
from mpsearch.record import RunFolder

pytestmark = pytest.mark.study

TINY = [*QUICK, "warm_start.method=none", "warm_start.ilp=true", "warm_start.combinations=2", "space=full"]


@pytest.mark.parametrize(
    ("hardware", "cost"),
    [
        ("mpic", {"cost.model": "table", "cost.limits": "{weight_bytes: 20 KiB}"}),
        pytest.param("w8a16-npu", {"cost.model": "bops"}, marks=pytest.mark.slow),
        pytest.param(
            "int8-fp16",
            {"cost.limits": "{weight_bytes: 40 KiB, activation_bytes: 150%, bops: 2}"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_every_config_of_a_study_runs_on_its_hardware(hardware: str, cost: dict[str, str], tmp_path: Path) -> None:
    settings = [*TINY, f"hardware={hardware}", *(f"{key}={value}" for key, value in cost.items())]
    result = mpsearch.run("digits", out=tmp_path / "run", trials=7, set=settings)
    folder = RunFolder.open(tmp_path / "run")
    facts, profile = read_facts(folder), load_profile(hardware)
    layers = {layer.name: layer for layer in facts.graph.quantizable}
    records = folder.records()
    assert len(records) == 7
    for record in records:
        for name, pair in record.config.items():
            assert Allowed(profile.pairs, profile.granularity, layers[name])(pair), (name, pair)
        assert facts.cost.within_limits(record.config)
        assert record.costs == facts.priced(record.config)
        assert "weight_bytes" in record.costs
    if hardware == "mpic":
        assert set(record.costs) > {"latency_cycles"}
        assert result.front.units["latency_cycles"] == "cycles"
        assert "% of latency_cycles" in "\n".join(result.front.answer)  # not of `table`, which is where it is from
        assert "minimize latency_cycles of" in (tmp_path / "run" / "report.html").read_text()
    assert (tmp_path / "run" / "hardware.yaml").is_file()
    text = "\n".join(result.front.answer)
    assert "the knee, in each cost" in text
    assert "w8a8" in text
    assert "% of MACs" in text
    assert json.loads(command("front", "run", "--json", cwd=tmp_path).stdout)["answer"] == list(result.front.answer)
    assert "weight_bytes" in command("front", "run", "--costs", cwd=tmp_path).stdout
    assert (tmp_path / "run" / "report.html").read_text().count("the knee, in each cost") == 1


def test_check_says_what_the_hardware_leaves_and_refuses_what_cannot_be(tmp_path: Path) -> None:
    settings = [argument for value in [*TINY, "hardware=w8a16-npu"] for argument in ("--set", value)]
    said = command("check", "digits", *settings, cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    assert "Hardware 'w8a16-npu' and the space 'full' together leave:" in said.stdout
    assert "uniform:8/channel x uniform:16/tensor" in said.stdout
    for wrong, words in {
        "hardware=w8a17-npu": "no hardware profile 'w8a17-npu'",
        "cost.reference=w4a4": "cost.reference is w4a4, which hardware 'w8a16-npu' does not run",
        "cost.limits={weight_bytes: 3 KiX}": "there is no unit 'KiX'",
        "cost.limits={latency_ms: 3}": "there is no such cost of this network on this hardware",
        "cost.model=table": "hardware 'w8a16-npu' has no cost",
        "cost.limits={weight_bytes: 3 B}": "the least there is is",
        "space=resnet_uniform": "matches none of the",
    }.items():
        refused = command("check", "digits", *settings, "--set", wrong, cwd=tmp_path)
        assert refused.returncode == 2, wrong
        assert words in refused.stderr, (wrong, refused.stderr)
