"""What mpsearch uses of libraries that is not public: each test says what is lost where a new version lacks it."""

from __future__ import annotations

import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.samplers import NSGAIISampler
from optuna.trial import create_trial
from torch import nn

import mpsearch
from mpsearch.compiler import graphs_compiled
from mpsearch.private import ray_watchdog
from mpsearch.private.optuna import generation_key, storage_of, study_id, trial_id
from mpsearch.private.optuna_dashboard import replace_trial_note
from mpsearch.private.ray import files_in, handler_of_sigterm_kept, mute_workers
from mpsearch.private.torch import (
    COMPILED,
    BatchNormNd,
    ConvNd,
    ConvTransposeNd,
    TorchDispatchMode,
    carry_versions,
    one_onnx_registry,
    padding_for_pad,
    tree_leaves,
    tree_map,
    tree_map_only,
    without_compiled_prefix,
)

SLEEP = "import sys, time; print(flush=True); time.sleep(60)"


@pytest.mark.parametrize("killed", [True, False])
def test_ray_watchdog_ends_what_a_killed_driver_left_and_nothing_that_is_younger(tmp_path: Path, killed: bool):
    def start(*arguments: object, log: Any = None) -> subprocess.Popen[bytes]:
        command = [sys.executable, *map(str, arguments)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)

    (tmp_path / "driver.json").write_text(json.dumps({"pid": os.getpid()}))
    with (tmp_path / "agent.log").open("wb") as log:  # Ray's agents say nowhere else to what they belong
        agent = start("-c", SLEEP, log=log)
    processes = [start("-c", SLEEP, tmp_path), agent, start("-c", SLEEP, tmp_path.with_name("another"))]
    watchdog = start(ray_watchdog.__file__, tmp_path, 3)
    try:
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()
        assert watchdog.stdin is not None
        if not killed:
            watchdog.stdin.write(b"in good order")
        watchdog.stdin.close()
        time.sleep(1.0)
        processes.append(start("-c", SLEEP, tmp_path))  # of the next driver of the run
        assert watchdog.wait(60) == 0
        ended = -signal.SIGKILL if killed else None
        assert [process.poll() for process in processes] == [ended, ended, None, None]
        assert tmp_path.exists() != killed
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_optuna_nsga2_takes_its_parents_from_trials_with_the_generation_key():
    study = optuna.create_study(directions=["maximize"], sampler=NSGAIISampler(population_size=2, seed=0))
    space = {"x": optuna.distributions.FloatDistribution(0, 1)}
    study.add_trials(
        create_trial(value=1, params={"x": 0.5}, distributions=space, system_attrs={generation_key(): 0})
        for _ in range(2)
    )
    study.ask(space)
    broken = "NSGA-II no longer knows a generation by this key: the sampler nsga2 starts anew at random each time"
    assert study.trials[-1].system_attrs.get(generation_key()) == 1, broken


def test_optuna_study_gives_its_storage_and_ids():
    study = optuna.create_study()
    study.add_trial(create_trial(value=1.0))
    broken = "storage or ids are elsewhere: the dashboard serves nothing and writes no notes"
    assert storage_of(study).get_study_name_from_id(study_id(study)) == study.study_name, broken
    assert storage_of(study).get_trial(trial_id(study.trials[0])).value == 1.0, broken


def test_optuna_dashboard_takes_notes_of_trials_that_have_ended():
    dashboard = pytest.importorskip("optuna_dashboard")
    study = optuna.create_study()
    study.add_trial(create_trial(value=1.0))
    trial = study.get_trials()[0]
    for text in ("**Trial 1** a", "**Trial 1** b"):
        replace_trial_note(study, trial, text, ours="**Trial")
        broken = "notes of trials are stored in another way: the dashboard shows none of ours"
        assert (
            dashboard._note.get_note_from_system_attrs(storage_of(study).get_study_system_attrs(study_id(study)), 0)[
                "body"
            ]
            == text
        ), broken
    replace_trial_note(study, trial, "somebody else's", ours="**Trial")
    replace_trial_note(study, trial, "**Trial 1** c", ours="**Trial")
    held = dashboard._note.get_note_from_system_attrs(storage_of(study).get_study_system_attrs(study_id(study)), 0)
    assert held["body"] == "somebody else's", "what a person has written is overwritten"


def test_ray_still_has_what_we_set():
    import ray

    def arguments(function: Any) -> set[str]:
        return set(inspect.signature(function).parameters)

    # `ray.init` passes unknown keywords on; what it knows is in its signature or read from them by name.
    assert set(files_in(Path("a"))) <= arguments(ray.init) or "_temp_dir" in inspect.getsource(ray.init), (
        "a cluster keeps its sockets in /tmp/ray: left behind by killed drivers, and shared by all runs"
    )
    assert "_plasma_directory" in inspect.getsource(ray.init), "Ray does not start without /dev/shm"
    worker = ray._private.worker
    assert hasattr(worker, "_worker_logs_enabled"), "the output of workers appears between our progress lines"


def test_ray_modules_are_set_and_put_back():
    import ray

    worker, before = ray._private.worker, ray._private.worker._worker_logs_enabled
    try:
        mute_workers(ray)
        assert worker._worker_logs_enabled is False
    finally:
        worker._worker_logs_enabled = before


def test_torch_base_classes_cover_every_dimension():
    for d in (1, 2, 3):
        assert issubclass(getattr(nn, f"BatchNorm{d}d"), BatchNormNd), "BatchNorm is not re-estimated"
        assert issubclass(getattr(nn, f"ConvTranspose{d}d"), ConvTransposeNd), "AIMET scales lie on the wrong axis"
        assert issubclass(getattr(nn, f"Conv{d}d"), ConvNd), "the cost of grouped convolutions is that of dense ones"
    assert issubclass(nn.SyncBatchNorm, BatchNormNd), "BatchNorm is not re-estimated"
    assert not issubclass(nn.Conv2d, ConvTransposeNd)
    assert not issubclass(nn.LayerNorm, BatchNormNd)


def test_torch_compiled_module_keeps_the_original_under_its_name():
    compiled = torch.compile(nn.Linear(1, 1))
    broken = "exports of compiled modules have names that nobody else knows"
    assert isinstance(getattr(compiled, COMPILED), nn.Linear), broken
    assert [without_compiled_prefix(name) for name in compiled.state_dict()] == ["weight", "bias"], broken


def test_torch_state_dict_carries_versions():
    norm = nn.BatchNorm1d(1)
    state: Any = dict(norm.state_dict())

    class Plain(dict[str, Any]):
        pass

    state = Plain(state)
    del state["num_batches_tracked"]
    versions: list[Any] = []
    norm.register_load_state_dict_pre_hook(lambda _m, _s, _p, local, *_: versions.append(local.get("version")))
    carry_versions(state, norm.state_dict())
    norm.load_state_dict(state, strict=False)
    assert versions == [2], "loaded weights count as of an old version, and some modules convert them wrongly"


@pytest.mark.parametrize("padding", [0, 2, (1, 2), "same"])
def test_torch_convolution_gives_its_padding_as_pad_takes_it(padding: Any):
    layer, x = nn.Conv2d(1, 1, (3, 2), padding=padding), torch.rand(1, 1, 8, 8)
    padded = nn.functional.pad(x, padding_for_pad(layer))
    unpadded = nn.functional.conv2d(padded, layer.weight, layer.bias)
    assert torch.allclose(unpadded, layer(x)), "AdaRound sees other patches than the convolution"


def test_ray_and_optuna_are_touched_in_private_only():
    package = Path(mpsearch.__file__).parent
    pattern = re.compile(r"ray\._private|_get_generation_key|study\._\w+|trial\._trial_id|optuna_dashboard import _")
    found = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if path.parent.name != "private" and pattern.search(path.read_text(encoding="utf-8"))
    }
    assert not found


def test_torch_walks_nested_inputs_and_outputs():
    nested = ({"a": torch.zeros(2)}, [torch.ones(2), None, 3])
    broken = "nested tensors are walked otherwise: networks of several inputs or outputs are not exported to ONNX"
    assert [type(leaf) for leaf in tree_leaves(nested)] == [torch.Tensor, torch.Tensor, type(None), int], broken
    assert tree_map(type, nested) == ({"a": torch.Tensor}, [torch.Tensor, type(None), int]), broken
    assert tree_map_only(torch.Tensor, torch.sum, nested) == ({"a": 0}, [2, None, 3]), broken


def test_torch_tells_a_dispatch_mode_of_each_operator_in_a_trace_too():
    class Names(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    with Names() as seen, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(lambda x: x * float(x.sum()), (torch.ones(2),), check_trace=False)
    broken = "operators are told otherwise: decisions on values in a traced detector are not found"
    assert {"aten.sum.default", "aten._local_scalar_dense.default"} <= set(seen.names), broken


def test_torch_makes_its_table_of_onnx_operators_once_for_all_exports():
    pytest.importorskip("onnxscript", reason="needs mpsearch[targets]; `make test-all` installs it")
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    before = vars(ONNXRegistry)["from_torchlib"]
    with one_onnx_registry():
        first = ONNXRegistry().from_torchlib(opset_version=21)
    with one_onnx_registry():
        assert ONNXRegistry().from_torchlib(opset_version=21) is first
        other = ONNXRegistry().from_torchlib(opset_version=25)
    assert (first.opset_version, other.opset_version) == (21, 25)
    assert vars(ONNXRegistry)["from_torchlib"] is before


@pytest.mark.compile
def test_torch_counts_the_graphs_that_it_compiles() -> None:
    before = graphs_compiled()
    double = torch.compile(lambda x: 2 * x, backend="eager")
    double(torch.ones(3))
    assert graphs_compiled() == before + 1
    double(torch.ones(3))
    assert graphs_compiled() == before + 1


def test_ray_replaces_the_handler_of_sigterm_and_is_kept_from_it() -> None:
    import ray
    from ray._private import utils

    assert "_private.utils.set_sigterm_handler(" in inspect.getsource(ray.init), "Ray sets it otherwise, or not"
    before, theirs = signal.getsignal(signal.SIGTERM), utils.set_sigterm_handler
    with handler_of_sigterm_kept():
        utils.set_sigterm_handler(lambda *_: None)
        assert signal.getsignal(signal.SIGTERM) == before  # a signal while Ray starts ends as one before and after
        signal.signal(signal.SIGTERM, lambda *_: None)  # as Ray's C++ does
    assert signal.getsignal(signal.SIGTERM) == before
    assert utils.set_sigterm_handler is theirs


def test_libraries_with_private_parts_have_upper_bounds() -> None:
    import tomllib

    root = Path(mpsearch.__file__).parent
    project = tomllib.loads((root.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [text for texts in project["optional-dependencies"].values() for text in texts]
    libraries = {re.split(r"[\[<>=~! ]", text)[0] for text in (*project["dependencies"], *extras)}
    for path in (root / "private").glob("*.py"):
        module = path.stem.replace("_", "-")
        fitting = [name for name in libraries if module == name or module.startswith(f"{name}-")]
        if path.stem == "__init__":
            continue
        assert fitting, f"{path.name} is named after no dependency"
        library = max(fitting, key=len)
        named = [text for text in (*project["dependencies"], *extras) if re.match(rf"{library}(\[\w+\])?[<>=]", text)]
        assert [text for text in named if "<" not in text] == [], f"{library} has private parts in use"


def test_torch_weak_dictionary_tells_tensors_apart_and_lets_them_go() -> None:
    from mpsearch.private.torch import WeakTensorKeyDictionary

    x, equal = torch.ones(3), torch.ones(3)
    known: Any = WeakTensorKeyDictionary({x: None})  # type: ignore[no-untyped-call]
    assert x in known
    assert equal not in known
    del x
    assert len(known) == 0
