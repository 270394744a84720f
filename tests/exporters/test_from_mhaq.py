"""A network that MHAQ trained arrives with MHAQ's answers, compared with a double of its forward pass."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mpsearch as library
from mpsearch.documents import to_yaml
from mpsearch.errors import ExportError, MpsearchError, TaskError
from mpsearch.exporters.from_mhaq import read_mhaq
from mpsearch.exporters.verify import Verified
from mpsearch.metric import TOP1
from mpsearch.problem import reopen
from mpsearch.quant.prepare import quant_layers
from mpsearch.record import RunFolder, checkpoint_path
from mpsearch.search.front import pareto_front
from mpsearch.search.kept import trained_model
from mpsearch.study import load_study
from mpsearch.task.load import load_task
from tests.commands import mpsearch

pytestmark = pytest.mark.study

LAYERS = ["block1.conv1", "block1.conv2", "down.depthwise", "block2.conv1", "block2.conv2", "mix.depthwise", "conv2"]
IMAGES = 300


class Weight(nn.Conv2d):
    """l + s round((w - l) / s), l the smallest weight of a channel, or of all where there is one step."""

    log_wght_s: nn.Parameter
    quantizes_bias = False

    def forward(self, x: Tensor) -> Tensor:
        s = torch.exp2(self.log_wght_s)
        low = self.weight.amin((1, 2, 3), keepdim=True) if s.numel() > 1 else self.weight.amin()
        bias = self.bias
        if self.quantizes_bias and bias is not None:
            bias = torch.round((bias - low.ravel()) / s.ravel()) * s.ravel() + low.ravel()
        return self._conv_forward(x, torch.round((self.weight - low) / s) * s + low, bias)


class Input(nn.Module):
    """b + s round((clamp(x, b, b + Q - s) - b) / s)."""

    def __init__(self, log_s: float, log_q: float, b: float, disable: bool) -> None:
        super().__init__()
        self.disable = disable
        self.log_act_q = nn.Parameter(torch.tensor([log_q]))
        self.log_act_s = nn.Parameter(torch.tensor([log_s]))
        self.act_b = nn.Parameter(torch.tensor([b]))

    def forward(self, x: Tensor) -> Tensor:
        if self.disable:
            return x
        s, q = torch.exp2(self.log_act_s), torch.exp2(self.log_act_q)
        return torch.round((torch.clamp(x, self.act_b, self.act_b + q - s) - self.act_b) / s) * s + self.act_b


class Double(nn.Module):
    """The digits network as MHAQ keeps it: `model`, its layers in pairs, and beside it the teacher."""

    def __init__(self, per_channel: bool = True, float_inputs: bool = False, bias: bool = False) -> None:
        super().__init__()
        self.model = load_task(load_study("digits").task).float_model()
        self.tmodel = nn.ModuleDict({"model": load_task(load_study("digits").task).float_model()})
        for number, name in enumerate(LAYERS):
            conv: Any = self.model.get_submodule(name)
            conv.__class__ = Weight
            conv.quantizes_bias = bias
            if bias:
                conv.bias = nn.Parameter(torch.linspace(-0.1, 0.1, conv.out_channels))
            low, high = conv.weight.amin((1, 2, 3), keepdim=True), conv.weight.amax((1, 2, 3), keepdim=True)
            span = high - low if per_channel else (conv.weight.amax() - conv.weight.amin()).reshape(1)
            conv.log_wght_s = nn.Parameter(torch.log2(span / (7.0 + number)).detach())  # codes to 7, 8, ... 13
            conv.log_b_s = nn.Parameter(torch.tensor([-12.0]))
            conv.register_parameter("_noise_ratio", nn.Parameter(torch.ones(1), requires_grad=False))
            quantizer = Input(-2.5, -2.5 + [3.0, 3.7, 4.0][number % 3], [0.0, -0.03, 0.02][number % 3], float_inputs)
            pair = nn.Sequential(OrderedDict([("activations_quantizer", quantizer), ("0", conv)]))
            self.model.set_submodule(name, pair)
        self.eval()

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)  # type: ignore[no-any-return]


def checkpoint(double: nn.Module, path: Path, **changes: Tensor | None) -> Path:
    """What Lightning writes, as far as it is plain values; `changes` of its tensors, None: without it."""
    state: dict[str, Any] = dict(double.state_dict())
    for key, value in changes.items():
        state[key] = value
        if value is None:
            del state[key]
    torch.save({"epoch": 3, "state_dict": state, "callbacks": {}, "pytorch-lightning_version": "2.6.6"}, path)
    return path


def settings(path: Path, targets: dict[str, Any] | None = None, **changes: Any) -> Path:
    block = {
        "name": "GDNSQQuant",
        "qscheme": 1,
        "weight_bit": 4,
        "act_bit": 4,
        "excluded_layers": ["conv1", "linear"],
        **changes,
    }
    document: dict[str, Any] = {"quantization": block}
    if targets is not None:
        document["mpsearch"] = {"note": "ours", "layers": targets}
    path.write_text(to_yaml(document))
    return path


@pytest.fixture(scope="module")
def run(cache: object, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one trial, w8a8 untrained."""
    folder = tmp_path_factory.mktemp("import") / "run"
    changes = ["trial.steps=0", "trial.bn_batches=0", "warm_start.method=none", "warm_start.ilp=false"]
    changes += ["warm_start.combinations=0", "search.sampler=none", "engine.address=none"]
    library.run("digits", out=folder, trials=1, set=changes)
    return folder


def compared(run: Path, number: int, double: Double) -> tuple[int, float]:
    """How many of `IMAGES` images get the same answer, and the largest difference of a logit.

    In MHAQ's order of memory: in another, convolutions sum in another order, as a processor has it, and a value on the
    edge between two codes falls either way.
    """
    folder = RunFolder.open(run)
    problem = reopen(folder)
    model, _ = trained_model(problem, folder, next(r for r in folder.records() if r.number == number))
    x = problem.task.calibration_input(IMAGES)
    model = model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    x = x.contiguous()
    with torch.no_grad():
        ours, theirs = model(x), double(x)
    return int((ours.argmax(1) == theirs.argmax(1)).sum()), float((ours - theirs).abs().max())


@pytest.mark.parametrize(
    ("form", "changes"),
    [
        ({}, {}),
        ({"per_channel": False}, {"qscheme": 0}),
        ({"float_inputs": True}, {"act_bit": -1}),
    ],
    ids=["channel", "tensor", "float inputs"],
)
def test_an_import_gives_mhaqs_answers(run: Path, form: Any, changes: Any, tmp_path: Path) -> None:
    double = Double(**form)
    imported = library.import_config(
        run, checkpoint(double, tmp_path / "a.ckpt"), settings(tmp_path / "a.yaml", **changes)
    )
    assert imported.trial is not None
    same, difference = compared(run, imported.trial.number, double)
    assert same == IMAGES
    assert difference < 1e-4
    score = reopen(RunFolder.open(run)).task.evaluate(double, "val")
    assert imported.trial.score == pytest.approx(score, abs=0.01)
    assert imported.trial.origin == "import"
    assert set(imported.left_float) == {n for n in imported.config if n not in LAYERS} | (
        set(LAYERS) if form.get("float_inputs") else set()
    )


def test_bits_are_those_of_the_widest_code_in_use_and_steps_ends_and_tops_are_kept(run: Path, tmp_path: Path) -> None:
    double = Double()
    trial = library.import_config(run, checkpoint(double, tmp_path / "a.ckpt"), settings(tmp_path / "a.yaml")).trial
    assert trial is not None
    bits = {name: (trial.config[name].weight.bits, trial.config[name].activation.bits) for name in LAYERS}
    assert bits["block1.conv1"] == (3, 3)  # codes to 7; 2^3 - 1
    assert bits["block1.conv2"] == (4, 4)  # codes to 8; 2^3.7 - 1 = 12.0
    assert bits["down.depthwise"] == (4, 4)
    folder = RunFolder.open(run)
    model, _ = trained_model(reopen(folder), folder, trial)
    layer, pair = quant_layers(model)["block1.conv2"], double.model.get_submodule("block1.conv2")
    low = pair[1].weight.amin((1, 2, 3), keepdim=True)  # type: ignore[index]
    assert torch.equal(layer.weight_quantizer.beta, low)  # type: ignore[arg-type]
    assert torch.equal(layer.weight_quantizer.step, torch.exp2(pair[1].log_wght_s))  # type: ignore[index]
    assert layer.input_quantizer.beta.item() == pytest.approx(-0.03)  # type: ignore[union-attr]
    assert int(layer.input_quantizer.top) == 12  # type: ignore[arg-type]
    assert quant_layers(model)["block1.conv1"].input_quantizer.top is None  # from 0 on, all codes: a uniform grid


def test_a_quantized_bias_is_a_float_bias_of_those_values(tmp_path: Path) -> None:
    class OneLayer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 4, 3)

    torch.manual_seed(0)
    model = OneLayer()
    conv: Any = nn.Conv2d(2, 4, 3)
    conv.__class__, conv.quantizes_bias = Weight, True
    conv.log_wght_s = nn.Parameter(torch.full((4, 1, 1, 1), -3.0))
    pair = nn.Sequential(OrderedDict([("activations_quantizer", Input(-2.0, 2.0, 0.0, False)), ("0", conv)]))
    double = nn.ModuleDict({"model": nn.ModuleDict({"conv": pair})})
    yaml = settings(tmp_path / "a.yaml", quantize_bias=True, excluded_layers=[], weight_bit=8)
    network = read_mhaq(checkpoint(double, tmp_path / "a.ckpt"), yaml, model, ["conv"])
    zero = torch.zeros(1, 2, 3, 3)
    torch.testing.assert_close(network.weights["conv.bias"], pair(zero).flatten(), rtol=0, atol=0)


def test_an_import_is_put_in_once_keeps_its_weights_when_dominated_and_is_exported(run: Path, tmp_path: Path) -> None:
    double = Double()
    with torch.no_grad():
        double.model.linear.weight.mul_(-1)  # answers badly: the w8a8 trial has more accuracy
    file, yaml = checkpoint(double, tmp_path / "bad.ckpt"), settings(tmp_path / "a.yaml")
    first, again = (library.import_config(run, file, yaml) for _ in range(2))
    assert first.trial is not None
    assert first.trial == again.trial
    better = library.import_config(run, checkpoint(Double(), tmp_path / "good.ckpt"), yaml).trial
    assert better is not None
    assert better.number != first.trial.number  # the same bits, another network
    folder = RunFolder.open(run)
    assert first.trial not in pareto_front(folder.records(), TOP1).trials
    assert checkpoint_path(folder.checkpoints, first.trial.number).exists()
    for to in ("native", "packed"):
        done = mpsearch("export", run, "--pick", f"trial:{first.trial.number}", "--to", to, "-o", to, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "verified in" in done.stdout


def test_an_import_is_verified_in_onnxruntime(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    from mpsearch.exporters.run import export_run

    trial = library.import_config(run, checkpoint(Double(), tmp_path / "a.ckpt"), settings(tmp_path / "a.yaml")).trial
    assert trial is not None
    exported, *_ = export_run(run, f"trial:{trial.number}", "onnx", tmp_path / "onnx")
    assert isinstance(exported.verified, Verified)
    assert exported.verified.same_answers == exported.verified.samples


def test_the_command_reads_per_layer_targets_and_says_what_misses_them(run: Path, tmp_path: Path) -> None:
    checkpoint(Double(), tmp_path / "a.ckpt")
    targets = {name: {"weight_bit": 4, "act_bit": 4} for name in LAYERS}
    targets["conv2"]["weight_bit"] = 3
    settings(tmp_path / "a.yaml", targets, weight_bit=2)
    done = mpsearch("import", run, "a.ckpt", "--config", "a.yaml", "--no-score", "-o", "c.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "not converged: conv2 weight 4 of 3 bits" in done.stdout
    assert "weight or activation left float: conv1, " in done.stdout
    assert json.loads((tmp_path / "c.json").read_text())["layers"]["conv2"]["weight"]["bits"] == 4


class Code:
    """What a pickle could run."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, ...]]:
        return print, ("run",)


TARGETS = {name: {"weight_bit": 4, "act_bit": 4} for name in LAYERS}
STEP = "model.conv2.0.log_wght_s"
RANGE = "model.conv2.activations_quantizer.log_act_q"


@pytest.mark.parametrize(
    ("tensors", "yaml", "said"),
    [
        (
            {"model.linear.weight": None},
            {},
            r"another network: 1 of its \d+ tensors are missing \('linear.weight' first",
        ),
        ({"model.extra.weight": torch.ones(1)}, {}, r"1 are unexpected \('extra.weight' first\)"),
        (
            {"model.linear.weight": torch.ones(3, 32)},
            {},
            r"linear.weight has the shape \(3, 32\) instead of \(10, 32\)",
        ),
        ({"model.linear.bias": torch.full((10,), torch.nan)}, {}, "NaN or infinite values in linear.bias"),
        ({"model.other.0.log_wght_s": torch.ones(1)}, {}, "quantizes 'other', which is no quantizable layer"),
        ({RANGE: None}, {}, f"lacks {RANGE}"),
        ({RANGE: torch.ones(2)}, {}, f"{RANGE} of the checkpoint has 2 numbers, expected 1"),
        ({RANGE: torch.full((1,), torch.inf)}, {}, "not all finite"),
        ({STEP: torch.ones(1)}, {}, f"{STEP} of the checkpoint has 1 numbers, expected 32: does qscheme fit"),
        ({STEP: torch.full((32, 1, 1, 1), -12.0)}, {}, "more than 8 bits: conv2 weight 1"),
        ({RANGE: torch.tensor([9.5])}, {}, "more than 8 bits: conv2 activation 12; train until"),
        ({}, {"qscheme": 2}, "qscheme is 2, expected 0"),
        ({}, {"fuse_batchnorm": True}, "fuse_batchnorm: true"),
        ({}, {"excluded_layers": ["conv2"]}, "excludes 'conv2', which the checkpoint quantizes"),
        ({}, {"excluded_layers": "conv2"}, "expected a list of layer names"),
        ({}, {"weight_bit": "4"}, "expected weight_bit and act_bit, whole numbers"),
        ({}, {"targets": TARGETS | {"linear": TARGETS["conv2"]}}, "does not quantize, 'linear' first"),
        ({}, {"targets": {"conv2": TARGETS["conv2"]}}, "no target for 6 layers that the checkpoint quantizes"),
        ({}, {"targets": {"conv2": 4}}, "layer 'conv2' has 4: expected weight_bit and act_bit"),
        ({}, {"targets": [4]}, r"mpsearch.layers is \[4\], expected layer ->"),
    ],
)
def test_what_does_not_fit_is_said(tensors: Any, yaml: Any, said: str, tmp_path: Path) -> None:
    file, config = checkpoint(Double(), tmp_path / "a.ckpt", **tensors), settings(tmp_path / "a.yaml", **yaml)
    model = load_task(load_study("digits").task).float_model()
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    with pytest.raises(ExportError, match=said):
        read_mhaq(file, config, model, layers)


def test_files_of_another_kind_are_refused_and_no_code_is_run(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(tmp_path / "a.yaml")
    double = Double()
    torch.save(double.tmodel["model"].state_dict(), tmp_path / "bare.pt")
    torch.save(
        {"state_dict": {f"model.{k}": v for k, v in double.tmodel["model"].state_dict().items()}}, tmp_path / "f"
    )
    torch.save({"state_dict": double.state_dict(), "hparams": Code()}, tmp_path / "code.ckpt")
    (tmp_path / "text.yaml").write_text("quantization: 4\n")

    def refused(kind: type[MpsearchError], said: str, source: str, yaml: Path | None = config) -> None:
        with pytest.raises(kind, match=said):
            library.import_config(run, tmp_path / source, yaml)

    refused(ExportError, r"none of Lightning's \(no state_dict with keys model", "bare.pt")
    refused(ExportError, "holds no quantized layer", "f")
    refused(TaskError, "refused: it holds `(builtins.)?print`", "code.ckpt")
    refused(TaskError, "no checkpoint", "nowhere.ckpt")
    checkpoint(double, tmp_path / "a.ckpt")
    refused(ExportError, "has no block 'quantization'", "a.ckpt", tmp_path / "text.yaml")
    refused(ExportError, "for a checkpoint of MHAQ give its YAML too, --config", "a.ckpt", None)
    assert capsys.readouterr().out == ""
    assert double.training is False


def test_a_double_of_the_double_is_the_formula() -> None:
    """The double itself, on numbers that can be followed: b = -0.5, s = 0.5, Q = 2, so top is 3."""
    quantizer = Input(-1.0, 1.0, -0.5, False)
    x = torch.tensor([-3.0, -0.3, 0.2, 9.0])
    assert quantizer(x).tolist() == [-0.5, -0.5, 0.0, 1.0]
    conv: Any = nn.Conv2d(1, 1, 1, bias=False)
    conv.__class__, conv.log_wght_s = Weight, nn.Parameter(torch.tensor([-1.0]))
    assert F.relu(conv(torch.ones(1, 1, 1, 1))).item() == pytest.approx(max(0.0, conv.weight.item()))
