"""What the soak would say if something had been lost: runs that are damaged on purpose."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "search"))

import drive

from benchmarks.soak import NOTHING, NOTHING_MORE, Killer, audit, whole
from mpsearch.record import RunFolder, checkpoint_path
from mpsearch.state_dict import save_tensors

pytestmark = pytest.mark.study


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A whole run by rungs, with weights, and the log that a command would have written."""
    import torch

    drive.drive(tmp_path / "run", trials=8, rungs=(100, 200, 300))
    folder = RunFolder.open(tmp_path / "run")
    folder.checkpoints.mkdir(exist_ok=True)
    lines = []
    for record in folder.records():
        save_tensors({"weight": torch.ones(2)}, checkpoint_path(folder.checkpoints, record.number))
        for rung in range(max(1, len(record.rungs))):
            lines.append(f"INFO: trial {record.number}, rung {rung} starts on node here")
            lines.append(f"INFO: trial {record.number}, rung {rung} ({record.origin}) is complete: 0.5 at cost 1")
    folder.log_txt.write_text("\n".join(lines) + "\n")
    return folder


def wrong(folder: RunFolder, again: int = 0) -> set[str]:
    row = audit(folder, again)
    return {name for name in (*NOTHING, *NOTHING_MORE) if row.get(name)}


def test_whole_run_passes(folder: RunFolder) -> None:
    row = dict.fromkeys((*NOTHING, *NOTHING_MORE), 0) | audit(folder, 0)
    assert row["trials"] == 8
    assert row["trainings_ended"] == row["trainings_begun"] > 8  # some trained to a longer rung
    assert whole(row | {"exit_codes_at_the_end": [143, 0]})
    assert not whole(row | {"exit_codes_at_the_end": [143, 1]})
    assert not whole(row | {"exit_codes_at_the_end": [143, 0], "lost_lines": 1})


def test_trial_that_ended_twice_is_seen(folder: RunFolder) -> None:
    last = folder.trials_jsonl.read_text().splitlines()[-1]
    with folder.trials_jsonl.open("a") as file:
        file.write(last + "\n")
    assert wrong(folder) == {"ended_twice"}


def test_trial_that_is_gone_is_seen(folder: RunFolder) -> None:
    lines = folder.trials_jsonl.read_text().splitlines(keepends=True)
    kept = [line for line in lines if '"number": 2,' not in line]
    assert len(kept) < len(lines)
    folder.trials_jsonl.write_text("".join(kept))
    assert wrong(folder) == {"numbers_missing", "not_in_view"}


def test_trials_that_were_started_again_are_seen(folder: RunFolder) -> None:
    with folder.log_txt.open("a") as file:
        file.write("INFO: trial 3, rung 0 starts on node here\n")
    assert wrong(folder, again=1) == {"started_after_end"}
    folder.log_txt.write_text("INFO: trial 3, rung 0 starts on node here\n" + folder.log_txt.read_text())
    assert wrong(folder, again=2) == {"started_after_end"}
    assert wrong(folder, again=1) == {"started_after_end", "begun_in_vain"}


def test_weights_that_are_damaged_are_seen(folder: RunFolder) -> None:
    for path in folder.checkpoints.glob("trial-*.safetensors"):
        path.write_bytes(path.read_bytes()[:20])
    assert wrong(folder) == {"weights_missing"}


def test_lines_that_are_lost_between_kills_are_counted_and_torn_ones_are_not(tmp_path: Path) -> None:
    killer = Killer(tmp_path / "run", "digits", [], random.Random(0))
    (tmp_path / "run").mkdir()
    record = tmp_path / "run" / "trials.jsonl"
    for text, lost in ((b"a\nb\nc", 0), (b"a\nb\n", 0), (b"a\nb\nd\n", 0), (b"a\nd\n", 1), (b"a\nd\ne\n", 1)):
        record.write_bytes(text)
        killer.remember()
        assert killer.lost_lines == lost, text
