"""An export is run in its own runtime, and what does not answer as the network does is no export."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import jsonschema
import pytest
import torch
from torch import Tensor, nn

import mpsearch
from mpsearch.errors import VerificationError
from mpsearch.exporters import answers, onnx_qdq, verify
from mpsearch.exporters.targets import TARGETS
from mpsearch.exporters.verify import RUNTIMES, Runtime, Unverified, Verified
from mpsearch.graph.layers import inspect_model
from mpsearch.precision import LayerPrecision, PrecisionConfig

MISSING = "needs mpsearch[targets]; `make test-all` installs it"
PACKAGE = {"brevitas": "brevitas", "torchao": "torchao", "modelopt": "modelopt", "aimet": "aimet_torch"}


def network(weight: str = "uniform:4", activation: str = "uniform:4", **given: object) -> mpsearch.QuantizedNetwork:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 10)).eval(), torch.randn(64, 16)
    layers = inspect_model(model, x).layers
    config = PrecisionConfig({name: LayerPrecision.parse(weight, activation) for name in ("0", "2")})
    quantized = mpsearch.prepare(model, config, x, layers).eval()
    facts = {"example_input": x[:2], "samples": x, "float_model": model} | given
    return mpsearch.QuantizedNetwork(quantized, layers, "small", "noise", **facts)  # type: ignore[arg-type]


def convolutions() -> mpsearch.QuantizedNetwork:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU()).eval(), torch.randn(64, 1, 8, 8)
    layers = inspect_model(model, x).layers
    quantized = mpsearch.prepare(model, PrecisionConfig({"0": LayerPrecision.shorthand("w4a4")}), x, layers).eval()
    return mpsearch.QuantizedNetwork(quantized, layers, "small", "noise", example_input=x[:2], samples=x)


@pytest.mark.parametrize("to", [*RUNTIMES])
def test_every_target_is_verified_in_its_own_runtime(to: str, tmp_path: Path) -> None:
    needs = PACKAGE.get(to) or ("onnxruntime" if "onnx" in to else "torch")
    if find_spec(needs) is None or (to == "qonnx" and find_spec("qonnx") is None):
        pytest.skip(MISSING)
    exported = mpsearch.export(network(activation="float" if to == "torchao" else "uniform:4"), to, tmp_path / "out")
    verified = exported.verified
    assert isinstance(verified, Verified)
    assert (verified.samples, verified.same_answers) == (64, 64)
    assert verified.max_difference < (1e-12 if to == "native" else 1e-5)
    manifest = "precision.json" if to == "native" else "export.json"
    assert json.loads((exported.path / manifest).read_text())["verified"] == verified.to_json()
    assert str(verified).startswith(f"verified in {RUNTIMES[to].name} ")


class Halves(nn.Module):
    """A module of a class that no library has seen."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x / 2)


@pytest.mark.parametrize("to", [*RUNTIMES])
def test_a_module_of_a_class_of_its_own_is_no_hindrance(to: str, tmp_path: Path) -> None:
    needs = PACKAGE.get(to) or ("onnxruntime" if "onnx" in to else "torch")
    if find_spec(needs) is None or (to == "qonnx" and find_spec("qonnx") is None):
        pytest.skip(MISSING)
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 32), Halves(), nn.Linear(32, 10)).eval(), torch.randn(64, 16)
    layers = inspect_model(model, x).layers
    config = PrecisionConfig.uniform(["0", "2"], LayerPrecision.parse("uniform:4", "float"))
    quantized = mpsearch.prepare(model, config, x, layers).eval()
    facts = {"example_input": x[:2], "samples": x, "float_model": model}
    exported = mpsearch.export(
        mpsearch.QuantizedNetwork(quantized, layers, "s", "noise", **facts), to, tmp_path / "out"
    )
    assert isinstance(exported.verified, Verified)


@pytest.mark.parametrize("bits", [1, 2, 5, 8])
@pytest.mark.parametrize("to", [name for name, target in TARGETS.items() if "embedding" in target.holds.kinds])
def test_an_embedding_is_verified_wherever_it_is_held(to: str, bits: int, tmp_path: Path) -> None:
    needs = PACKAGE.get(to) or ("onnxruntime" if "onnx" in to else "torch")
    if find_spec(needs) is None or (to == "qonnx" and find_spec("qonnx") is None):
        pytest.skip(MISSING)
    torch.manual_seed(0)
    model, tokens = (
        nn.Sequential(nn.Embedding(20, 16, padding_idx=0), nn.Linear(16, 10)),
        torch.arange(60).view(20, 3) % 20,
    )
    layers = inspect_model(model.eval(), tokens).layers
    config = PrecisionConfig.uniform(["0", "1"], LayerPrecision.parse(f"uniform:{bits}", "uniform:8"))
    quantized = mpsearch.prepare(model, config, tokens, layers).eval()
    facts = {"example_input": tokens, "samples": tokens, "float_model": model}
    exported = mpsearch.export(
        mpsearch.QuantizedNetwork(quantized, layers, "small", "noise", **facts), to, tmp_path / "out"
    )
    assert isinstance(exported.verified, Verified)
    assert (exported.verified.same_answers, exported.conversions) == (20, ())
    assert exported.verified.max_difference < 1e-5


def test_a_verified_native_export_has_its_schema(tmp_path: Path) -> None:
    schema = json.loads(Path("mpsearch/schema/precision-config-1.json").read_text())
    for i, given in enumerate((network(), network(float_model=None))):
        path = mpsearch.export(given, "native", tmp_path / str(i)).path
        jsonschema.validate(json.loads((path / "precision.json").read_text()), schema)


def test_what_was_not_run_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def reason(to: str, given: mpsearch.QuantizedNetwork, name: str, check: bool = True) -> str:
        exported = mpsearch.export(given, to, tmp_path / name, verify=check)
        assert isinstance(exported.verified, Unverified)
        return exported.verified.reason

    assert "no samples" in reason("packed", network(example_input=None, samples=None), "a")
    assert "float_model" in reason("packed", network(float_model=None), "b")
    assert "trained before it is run" in reason("mhaq", convolutions(), "c")
    assert "not asked for" in reason("packed", network(), "d", check=False)
    monkeypatch.setitem(RUNTIMES, "packed", replace(RUNTIMES["packed"], package="no-such-package"))
    assert reason("packed", network(), "e") == "no-such-package is not installed: pip install no-such-package"


def _crashes(*_: object) -> nn.Module:
    os.kill(os.getpid(), signal.SIGSEGV)
    raise AssertionError


def _hangs(*_: object) -> nn.Module:
    time.sleep(60)
    raise AssertionError


def _refuses(*_: object) -> nn.Module:
    raise ValueError("no kernel for UINT2")


def _answers_otherwise(model: nn.Module, *_: object) -> nn.Module:
    return model  # the float network


def _says_nan(model: nn.Module, *_: object) -> nn.Module:
    class Nan(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = model(x)
            return torch.where(torch.arange(10) == 0, torch.nan, y)

    return Nan()


def _other_shape(model: nn.Module, *_: object) -> nn.Module:
    return nn.Sequential(model, nn.Flatten(0))


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (_crashes, "process ended with -11"),
        (_hangs, r"did not end within 0\.5 s"),
        (_refuses, "ValueError: no kernel for UINT2"),
        (_answers_otherwise, "answers otherwise than the network: the median difference"),
        (_says_nan, "finite in one of the two only 64"),
        (_other_shape, r"shapes \[\(640,\)\], the network \[\(64, 10\)\]"),
    ],
)
def test_a_runtime_that_fails_is_a_message_and_the_files_are_set_aside(
    load: object, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(RUNTIMES, "packed", Runtime("mpsearch", "mpsearch", load))  # type: ignore[arg-type]
    monkeypatch.setattr(verify.verify, "__defaults__", (None, 0.5 if load is _hangs else 60.0))
    for kept in ("out.failed", "out.failed2"):
        with pytest.raises(VerificationError, match=message) as error:
            mpsearch.export(network(), "packed", tmp_path / "out")
        assert str(tmp_path / kept) in str(error.value)
        assert {file.name for file in (tmp_path / kept).iterdir()} == {"export.json", "model.safetensors"}
        assert not (tmp_path / "out").exists()


def test_a_failed_native_export_leaves_other_files_of_its_folder_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(RUNTIMES, "native", Runtime("mpsearch", "mpsearch", _refuses))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(VerificationError, match="no kernel"):
        mpsearch.export(network(), "native", tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("fault", ["bias rounded to step_x * step_w", "no file of ONNX"])
def test_an_onnx_file_that_answers_otherwise_is_refused(
    fault: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    onnx = pytest.importorskip("onnx", reason=MISSING)
    pytest.importorskip("onnxruntime", reason=MISSING)
    given, write = network("uniform:4", "uniform:4"), onnx_qdq.write

    def spoiled(proto: object, folder: Path) -> dict[str, object]:
        if fault.startswith("bias"):  # as QGemm does it
            values = {c.name: c for c in proto.graph.initializer}  # type: ignore[attr-defined]
            layer = given.model.get_submodule("0")
            step = layer.input_quantizer.step * layer.weight_quantizer.step.flatten()
            rounded = (torch.round(layer.bias / step) * step).detach().numpy()
            assert abs(rounded - layer.bias.detach().numpy()).max() > 0
            values["0.bias"].CopyFrom(onnx.numpy_helper.from_array(rounded, "0.bias"))
        found = write(proto, folder)  # type: ignore[arg-type]
        if not fault.startswith("bias"):
            (folder / "model.onnx").write_bytes(b"x" * 100)
        return found

    monkeypatch.setattr(onnx_qdq, "write", spoiled)
    message = "answers otherwise" if fault.startswith("bias") else "onnxruntime fails on it: .*"
    with pytest.raises(VerificationError, match=message):
        mpsearch.export(given, "onnx", tmp_path / "out")


def test_noise_moves_a_float_network_by_noise_and_a_narrow_one_hardly_ever() -> None:
    for activation, median in (("float", 1e-7), ("uniform:2", 0.0)):
        given = network("uniform:2", activation)
        expected = answers.reference(given.model, given.samples)
        assert torch.equal(expected.outputs[0], given.model(given.samples))  # the noise is gone again
        assert expected.difference.shape == (answers.RERUNS, 64)
        assert median <= expected.difference.median() < verify.FLOOR


def test_the_command_exits_with_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from mpsearch.cli import base

    def app(**_: object) -> None:
        raise VerificationError("onnxruntime fails on it")

    monkeypatch.setattr(base, "app", app)
    with pytest.raises(SystemExit) as exit_:
        base.main()
    assert exit_.value.code == 1
    assert capsys.readouterr().err == "mpsearch: onnxruntime fails on it\n"


def test_noise_that_changes_how_much_is_answered_allows_no_difference() -> None:
    """As that of a detector, which finds a box more or less."""

    class Finds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.calls = nn.Linear(4, 4), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.linear(x)[: self.calls + 2]

    model, x = Finds().eval(), torch.randn(40, 4)
    expected = answers.reference(model, x)
    assert len(expected.outputs[0]) == 3
    assert expected.difference.max() == 0
