"""QONNX and QDQ exports are executed by qonnx and by onnxruntime, and answer as the network does."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mpsearch
from mpsearch.errors import ExportError
from mpsearch.exporters import onnx_qdq
from mpsearch.exporters.packed import unpack_bits, values_of
from mpsearch.exporters.verify import Verified
from mpsearch.graph.facts import ModelGraph
from mpsearch.graph.layers import inspect_model
from mpsearch.precision import LayerPrecision, PrecisionConfig
from mpsearch.quant.prepare import quant_layers

MISSING = "needs mpsearch[targets]; `make test-all` installs it"
onnx = pytest.importorskip("onnx", reason=MISSING)
pytest.importorskip("onnxscript", reason=MISSING)
ort = pytest.importorskip("onnxruntime", reason=MISSING)
qonnx_exec = pytest.importorskip("qonnx.core.onnx_exec", reason=MISSING)
modelwrapper = pytest.importorskip("qonnx.core.modelwrapper", reason=MISSING)

WIDTHS = [f"uniform:{bits}" for bits in range(1, 9)]
MILD = ["shift:4", "apot:4", "shift:5", "apot:5"]  # fewer bits without training answer by a hair's breadth


def run_qonnx(path: Path, x: Tensor) -> np.ndarray:
    model = modelwrapper.ModelWrapper(str(path))
    name = model.graph.input[0].name
    model.set_tensor_shape(name, list(x.shape))
    (y,) = qonnx_exec.execute_onnx(model, {name: x.numpy()}).values()
    return np.asarray(y)


def run_onnxruntime(path: Path, x: Tensor) -> np.ndarray:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


RUN: dict[str, Callable[[Path, Tensor], np.ndarray]] = {"qonnx": run_qonnx, "onnx": run_onnxruntime}


@pytest.mark.slow
@pytest.mark.parametrize("to", RUN)
@pytest.mark.parametrize(
    ("weights", "activations"), [(WIDTHS, WIDTHS[::-1]), (MILD, WIDTHS[4:])], ids=["uniform", "shift-apot"]
)
def test_thousand_digits_get_the_same_answers(
    to: str,
    weights: list[str],
    activations: list[str],
    quantize,
    digits: tuple[nn.Module, Tensor, ModelGraph],
    tmp_path: Path,
) -> None:
    network = quantize(weights, activations)
    images = digits[1]
    path = mpsearch.export(network, to, tmp_path / "out").path / "model.onnx"
    ours, theirs = network.model(images).detach().numpy(), RUN[to](path, images)
    assert (ours.argmax(1) == theirs.argmax(1)).all()
    # Their convolutions sum in another order: the last bit, and now and then the rounding of an activation.
    assert np.median(np.abs(ours - theirs)) < 1e-6


def small(weight: str, activation: str, *sequence: int) -> tuple[mpsearch.QuantizedNetwork, Tensor]:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 8)).eval(), torch.randn(64, *sequence, 16)
    layers = inspect_model(model, x).layers
    config = PrecisionConfig({"0": LayerPrecision.parse(weight, activation)})
    quantized = mpsearch.prepare(model, config, x, layers).eval()
    return mpsearch.QuantizedNetwork(quantized, layers, "small", "noise", example_input=x[:2]), x


@pytest.mark.parametrize("to", RUN)
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width_is_exact_in_a_single_layer(to: str, bits: int, tmp_path: Path) -> None:
    network, x = small(f"uniform:{bits}", f"uniform:{9 - bits}")
    path = mpsearch.export(network, to, tmp_path / "out").path / "model.onnx"
    np.testing.assert_allclose(RUN[to](path, x), network.model(x).detach().numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("bits", "kind", "opset"), [(1, "INT2", 25), (2, "INT2", 25), (3, "INT4", 21), (8, "INT8", 18)]
)
@pytest.mark.parametrize("activation", ["float", "uniform:4"])
def test_qdq_stores_weights_in_the_narrowest_container_and_says_the_true_widths(
    activation: str, bits: int, kind: str, opset: int, tmp_path: Path
) -> None:
    network, _ = small(f"uniform:{bits}", activation)
    folder = mpsearch.export(network, "onnx", tmp_path / "out").path
    proto, manifest = onnx.load(folder / "model.onnx"), json.loads((folder / "export.json").read_text())
    codes = next(c for c in proto.graph.initializer if c.name.endswith("weight_codes"))
    assert codes.data_type == getattr(onnx.TensorProto, kind)
    assert len(codes.raw_data) == 8 * 16 * onnx_qdq.container(bits) // 8
    assert {entry.domain: entry.version for entry in proto.opset_import}[""] == opset
    odd = {"0 weight": {"bits": bits, "container": onnx_qdq.container(bits)}} if bits in (1, 3) else {}
    odd |= {"0 activation": {"bits": 4, "container": 8}} if activation != "float" else {}
    assert manifest["in_wider_containers"] == odd
    assert json.loads(metadata(proto)["mpsearch.config"])["0"]["weight"]["bits"] == bits


class Twice(nn.Module):
    """One layer that is called twice, on tensors of unlike ranges."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(64, 64), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(torch.relu(self.layer(torch.relu(self.layer(x)) * 0.5)))
        return y


class AsksForItsBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y if x.shape[0] > 3 else 2 * y


class AsksForValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y if float(x.sum()) > 0 else -y


class Attends(nn.Module):
    """Attention with a table of relative positions: its last reshape is a view of what the fused kernel gives."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.table = nn.Parameter(torch.randn(36, 2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        bias = self.table[torch.arange(36)].view(6, 6, 2).permute(2, 0, 1)[None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        z: Tensor = self.out(y.transpose(1, 2).reshape(*x.shape[:2], -1))
        return z


class Cache:
    """What a network gives back beside its tensors, of a class that nobody has told torch about."""


class GivesMore(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> dict[str, object]:
        return {"cache": Cache(), "logits": self.layer(x), "loss": None}


def prepared(model: nn.Module, x: Tensor, weight: str, activation: str, examples: int = 2) -> mpsearch.QuantizedNetwork:
    layers = inspect_model(model.eval(), x).layers
    config = PrecisionConfig(
        {layer.name: LayerPrecision.parse(weight, activation) for layer in layers if layer.reason is None}
    )
    quantized = mpsearch.prepare(model, config, x, layers).eval()
    return mpsearch.QuantizedNetwork(quantized, layers, type(model).__name__, "noise", example_input=x[:examples])


def test_a_layer_used_twice_is_stored_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 64)
    network = prepared(Twice(), x, "uniform:4", "uniform:4")
    path = mpsearch.export(network, "onnx", tmp_path / "out").path / "model.onnx"
    sizes = [c.dims for c in onnx.load(path).graph.initializer if c.name.endswith("_codes")]
    assert sorted(map(list, sizes)) == [[8, 64], [64, 64]]
    np.testing.assert_allclose(run_onnxruntime(path, x), network.model(x).detach().numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("model", [Attends, GivesMore])
@pytest.mark.parametrize("to", RUN)
def test_what_torch_cannot_trace_as_it_stands_is_exported_all_the_same(
    to: str, model: type[nn.Module], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 6, 8)
    exported = mpsearch.export(prepared(model().eval(), x, "uniform:8", "uniform:8"), to, tmp_path / "out")
    assert isinstance(exported.verified, Verified)


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_an_input_padded_behind_its_quantizer_gets_the_same_answers(mode: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 8, 6, 6)
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, padding_mode=mode), nn.Flatten(), nn.Linear(288, 8))
    network = prepared(model, x, "uniform:4", "uniform:8")
    path = mpsearch.export(network, "onnx", tmp_path / "out").path / "model.onnx"
    np.testing.assert_allclose(run_onnxruntime(path, x), network.model(x).detach().numpy(), rtol=0, atol=1e-5)


def test_an_example_of_one_sample_leaves_the_batch_open(tmp_path: Path) -> None:
    x = torch.randn(64, 64)
    network = prepared(Twice(), x, "uniform:8", "uniform:8", examples=1)
    folder = mpsearch.export(network, "onnx", tmp_path / "out").path
    assert json.loads((folder / "export.json").read_text())["batch"] == "batch"
    assert run_onnxruntime(folder / "model.onnx", x).shape == (64, 8)


def test_a_network_that_asks_for_its_batch_is_exported_at_that_size(tmp_path: Path) -> None:
    x = torch.randn(4, 8)
    network = prepared(AsksForItsBatch(), x, "uniform:4", "uniform:8", examples=4)
    folder = mpsearch.export(network, "onnx", tmp_path / "out").path
    assert json.loads((folder / "export.json").read_text())["batch"] == 4
    ours, theirs = network.model(x).detach().numpy(), run_onnxruntime(folder / "model.onnx", x)
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-6)


@pytest.mark.parametrize("to", RUN)
def test_a_failed_trace_is_one_line_and_prints_nothing(
    to: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    network = prepared(AsksForValues(), torch.randn(4, 8), "uniform:4", "uniform:8")
    where = r"line \d+, in forward return y if float\(x.sum"
    with pytest.raises(ExportError, match=rf"cannot export AsksForValues: .*data-dependent.*{where}"):
        mpsearch.export(network, to, tmp_path / "out")
    assert capfd.readouterr() == ("", "")


def test_a_failed_trace_names_the_module_that_fails(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.ReLU(), AsksForValues()), nn.Linear(8, 8))
    network = prepared(model, torch.randn(4, 8), "uniform:4", "uniform:8")
    with pytest.raises(ExportError, match=r"cannot export Sequential, in '1\.1' \(AsksForValues\): .*data-dependent"):
        mpsearch.export(network, "onnx", tmp_path / "out")


@pytest.mark.parametrize("to", RUN)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.bfloat16])
def test_networks_of_other_types_than_float32_are_refused_by_name(to: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8)).to(dtype), torch.randn(4, 8, dtype=dtype)
    network = prepared(model, x, "uniform:4", "uniform:8")
    with pytest.raises(ExportError, match=rf"'0.weight' of Sequential is {dtype}, .*float32.*\.float\(\)"):
        mpsearch.export(network, to, tmp_path / "out")


def test_a_file_holds_no_path_of_the_machine_that_wrote_it(tmp_path: Path) -> None:
    folder = mpsearch.export(small("uniform:4", "uniform:4")[0], "onnx", tmp_path / "out").path
    assert b".py" not in (folder / "model.onnx").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("weight", ["uniform:4", "uniform:2"])
def test_narrow_inputs_behind_relu6_get_the_same_answers(weight: str, tmp_path: Path) -> None:
    from torchvision.models import mobilenet_v2

    torch.manual_seed(0)
    x = torch.rand(32, 3, 64, 64)
    network = prepared(mobilenet_v2(num_classes=10), x, weight, "uniform:4")
    path = mpsearch.export(network, "onnx", tmp_path / "out").path / "model.onnx"
    with torch.no_grad():
        ours, theirs = network.model(x).numpy(), run_onnxruntime(path, x)
    # 52 layers of 4-bit inputs: a handful of flips, each of which may make more.
    assert (ours.argmax(1) == theirs.argmax(1)).mean() >= 30 / 32
    assert np.median(np.abs(ours - theirs)) < 1e-3 * ours.std()


def test_qonnx_names_its_operators(tmp_path: Path) -> None:
    for weight, operator in (("uniform:1", "BipolarQuant"), ("uniform:3", "IntQuant")):
        folder = mpsearch.export(small(weight, "float")[0], "qonnx", tmp_path / operator).path
        nodes = onnx.load(folder / "model.onnx").graph.node
        assert [n.op_type for n in nodes if n.domain == "qonnx.custom_op.general"] == [operator]


@pytest.mark.parametrize("weight", ["shift:4", "apot:5/tensor"])
def test_shift_codes_in_the_metadata_are_the_constant(weight: str, tmp_path: Path) -> None:
    network, _ = small(weight, "float")
    proto = onnx.load(mpsearch.export(network, "onnx", tmp_path / "out").path / "model.onnx")
    codes = json.loads(metadata(proto)["mpsearch.codes.0"])
    precision = network.config["0"].weight
    packed = torch.tensor(list(base64.b64decode(codes["packed"])), dtype=torch.uint8)
    values = values_of(unpack_bits(packed, precision.bits, 16 * 8).to(torch.int16), precision).view(codes["shape"])
    constants = [onnx.numpy_helper.to_array(constant) for constant in proto.graph.initializer]
    expected = torch.tensor(codes["step"])[:, None] * values
    assert torch.equal(expected, quant_layers(network.model)["0"].quantized_weight())
    assert any((c.shape == (8, 16) and np.array_equal(c, expected)) or np.array_equal(c.T, expected) for c in constants)


def metadata(proto: object) -> dict[str, str]:
    return {entry.key: entry.value for entry in proto.metadata_props}  # type: ignore[attr-defined]


def test_shift_activations_and_strange_zero_points_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"0 \(linear\) activation shift:4/tensor: uniform:4/tensor would hold it"):
        mpsearch.export(small("uniform:4", "shift:4")[0], "onnx", tmp_path / "a")
    network, _ = small("uniform:4", "uniform:4")
    quant_layers(network.model)["0"].input_quantizer.beta.data.fill_(1.0)  # type: ignore[union-attr]
    with pytest.raises(ExportError, match="layer '0': the zero point of its input is -"):
        mpsearch.export(network, "onnx", tmp_path / "b")
    network = mpsearch.QuantizedNetwork(network.model, network.layers, "small", "noise")
    with pytest.raises(ExportError, match="give QuantizedNetwork an example_input"):
        mpsearch.export(network, "qonnx", tmp_path / "c")


def test_attention_of_five_axes_is_traced_with_four(tmp_path: Path) -> None:
    """Networks with windows attend over (batch, windows, heads, tokens, features)."""

    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            n, windows, tokens, _ = x.shape
            q, k, v = self.qkv(x).reshape(n, windows, tokens, 3, 2, 4).permute(3, 0, 1, 4, 2, 5).unbind(0)
            y = nn.functional.scaled_dot_product_attention(q, k, v, None, 0.0)  # by position, as some networks do
            return self.out(y.transpose(2, 3).reshape(n, windows, tokens, 8))

    torch.manual_seed(0)
    model, x = Windows().eval(), torch.randn(4, 3, 5, 8)
    layers = mpsearch.inspect_model(model, x).layers
    config = PrecisionConfig.uniform(["qkv", "out"], LayerPrecision.shorthand("w8a8"))
    prepared = mpsearch.prepare(model, config, x, layers).eval()
    network = mpsearch.QuantizedNetwork(prepared, layers, "windows", "noise", example_input=x)
    before = nn.functional.scaled_dot_product_attention
    verified = mpsearch.export(network, "onnx", tmp_path / "out").verified
    assert isinstance(verified, Verified)
    assert nn.functional.scaled_dot_product_attention is before
