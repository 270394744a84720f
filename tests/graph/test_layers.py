"""Facts about layers, checked against torch's own counter, against hand arithmetic, and on small made-up networks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

from mpsearch.errors import TaskError
from mpsearch.graph.facts import LayerInfo, ModelGraph
from mpsearch.graph.layers import KINDS, inspect_model


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def by_name(graph: ModelGraph) -> dict[str, LayerInfo]:
    return {layer.name: layer for layer in graph.layers}


def torch_macs(model: nn.Module, batch: Tensor) -> int:
    """Half of what torch's counter says of a batch, attention unfused so that it can see it."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            torch.no_grad(),
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            model.eval()(batch)
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
    return counter.get_total_flops() // 2


class Net(nn.Module):
    """A network made of named modules and a forward function."""

    def __init__(self, forward: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.body = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *args: Any) -> Any:
        return self.body(self, *args)


IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------------- multiply-accumulates


@pytest.mark.parametrize(
    ("family", "size"),
    [
        ("resnet18", 32),
        ("mobilenet_v2", 32),
        ("mobilenet_v3_small", 32),
        ("efficientnet_b0", 32),
        ("shufflenet_v2_x0_5", 32),
        ("swin_t", 32),
        pytest.param("convnext_tiny", 32, marks=pytest.mark.slow),
        pytest.param("vit_b_16", 32, marks=pytest.mark.slow),  # 86 million weights
    ],
)
def test_macs_equal_torchs_flop_counter_on_torchvision_families(family: str, size: int):
    options = {"image_size": size} if family.startswith("vit") else {}
    model = getattr(torchvision.models, family)(weights=None, **options)
    batch = torch.randn(2, 3, size, size)
    graph = inspect_model(model, batch)
    assert 2 * graph.macs == torch_macs(model, batch)
    assert all(layer.macs > 0 for layer in graph.layers)


@pytest.mark.slow
def test_macs_equal_torchs_flop_counter_on_a_full_size_transformer():
    model = torchvision.models.vit_b_16(weights=None)
    batch = torch.randn(1, 3, 224, 224)
    assert inspect_model(model, batch).macs == torch_macs(model, batch)


def test_resnet18_has_its_published_macs_parameters_and_batch_norms():
    model = torchvision.models.resnet18(weights=None)
    graph = inspect_model(model, torch.randn(1, 3, 224, 224))
    layers = by_name(graph)
    assert graph.macs == 1_814_073_344
    assert len(graph.quantizable) == len(graph.layers) == 21
    assert [graph.layers[0].name, graph.layers[-1].name] == ["conv1", "fc"]
    assert sum(layer.params for layer in graph.layers) == 11_689_512 - 9_600  # all but the BatchNorms' own
    assert layers["conv1"] == LayerInfo(
        name="conv1",
        kind="conv2d",
        weight_shape=(64, 3, 7, 7),
        input_shape=(3, 224, 224),
        output_shape=(64, 112, 112),
        macs=64 * 112 * 112 * 147,
        params=9408,
        fan_in=147,
        batch_norm="bn1",
        input_group="conv1",
        weight_group="conv1",
    )
    assert layers["layer2.0.downsample.0"].batch_norm == "layer2.0.downsample.1"
    assert layers["layer2.0.downsample.0"].input_group == "layer2.0.conv1"
    assert not layers["layer1.0.conv2"].signed_input
    assert layers["fc"].batch_norm is None


@pytest.mark.parametrize(
    ("layer", "sample", "macs", "fan_in"),
    [
        (nn.Conv1d(4, 6, 3, groups=2), (4, 9), 6 * 7 * 2 * 3, 6),
        (nn.Conv2d(4, 4, 3, groups=4, padding=1), (4, 5, 5), 4 * 25 * 9, 9),
        (nn.Conv2d(3, 5, 3, stride=2, dilation=2), (3, 9, 9), 5 * 9 * 27, 27),
        (nn.Conv3d(2, 3, 2), (2, 3, 3, 3), 3 * 8 * 16, 16),
        (nn.ConvTranspose1d(4, 6, 4, stride=2, groups=2), (4, 5), 5 * 4 * 3 * 4, 2 * 2),
        (nn.ConvTranspose2d(2, 3, 3, stride=2), (2, 4, 4), 16 * 2 * 3 * 9, 2 * 2 * 2),
        (nn.ConvTranspose2d(2, 3, 3, stride=2, dilation=2), (2, 4, 4), 16 * 2 * 3 * 9, 2 * 9),
        (nn.ConvTranspose3d(2, 1, 2), (2, 2, 2, 2), 8 * 2 * 8, 2 * 8),
        (nn.Linear(6, 7), (6,), 42, 6),
        (nn.Linear(6, 7), (5, 6), 5 * 42, 6),
    ],
)
def test_macs_shapes_and_fan_in_of_each_kind_equal_hand_arithmetic(
    layer: nn.Module, sample: tuple[int, ...], macs: int, fan_in: int
):
    info = inspect_model(nn.Sequential(layer), torch.randn(3, *sample)).layers[0]
    output = layer(torch.randn(3, *sample))
    assert (info.kind, info.macs, info.fan_in) == (KINDS[type(layer)], macs, fan_in)
    assert (info.input_shape, info.output_shape) == (sample, tuple(output.shape[1:]))
    assert info.weight_shape == tuple(layer.weight.shape)


@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("stride", [1, 2, 3, 4])
def test_fan_in_of_a_transposed_convolution_is_the_most_products_that_meet(stride: int, dilation: int):
    layer = nn.ConvTranspose1d(2, 3, 5, stride=stride, dilation=dilation, bias=False)
    nn.init.ones_(layer.weight)
    met = layer(torch.ones(1, 2, 40)).max().item()
    assert inspect_model(nn.Sequential(layer), torch.ones(1, 2, 40)).layers[0].fan_in == met


def test_attention_between_activations_is_counted_outside_the_layers():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
    graph = inspect_model(model, torch.randn(3, 5, 8))
    layers = by_name(graph)
    assert dict(graph.other_macs) == {"bmm": 2 * 5 * 5 * 8}
    for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
        assert layers[f"layers.0.self_attn.{projection}"].macs == 5 * 8 * 8
    assert layers["layers.0.linear1"].macs == 5 * 8 * 16
    assert layers["layers.0.self_attn.k_proj"].input_group == "layers.0.self_attn.q_proj"
    assert not graph.unhandled


def test_the_same_sample_costs_the_same_in_any_batch_and_wherever_the_batch_dimension_is():
    sequence_first = nn.Sequential(nn.Linear(6, 4))
    graph = inspect_model(sequence_first, torch.randn(7, 3, 6), batch_size=3)
    assert graph.layers[0].macs == 7 * 24
    assert graph.layers[0].input_shape == (7, 6)


def test_a_layer_that_sees_parts_of_a_sample_has_them_in_its_shape():
    model = Net(lambda net, x: net.fc(x.reshape(8, 2, 6)), fc=nn.Linear(6, 4))
    layer = inspect_model(model, torch.randn(2, 8, 6)).layers[0]
    assert (layer.input_shape, layer.output_shape, layer.macs) == ((4, 2, 6), (4, 2, 4), 8 * 24)


def test_work_done_once_per_batch_is_shared_and_never_rounded_to_nothing():
    table = torch.ones(1, 3)
    model = Net(lambda net, x: net.fc(x) + net.bias(table), fc=nn.Linear(6, 1), bias=nn.Linear(3, 1))
    assert by_name(inspect_model(model, ROWS[:1]))["bias"].macs == 3
    assert by_name(inspect_model(model, ROWS))["bias"].macs == 1


# ------------------------------------------------------------------------------------------------------- groups


def input_groups(model: nn.Module, batch: Any) -> dict[str, str]:
    return {layer.name: layer.input_group for layer in inspect_model(model, batch).layers}


def conv(inputs: int = 3, outputs: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def test_layers_fed_by_the_same_tensor_are_one_input_group():
    model = Net(lambda net, x: net.a(x) + net.b(x) + net.c(x + 1), a=conv(), b=conv(), c=conv())
    assert input_groups(model, IMAGES) == {"a": "a", "b": "a", "c": "c"}


def test_an_in_place_relu_between_two_readers_parts_them():
    def forward(net: Any, x: Tensor) -> Tensor:
        y = x + 0
        first = net.a(y)
        return first + net.b(F.relu_(y))

    model = Net(forward, a=conv(), b=conv())
    assert input_groups(model, IMAGES) == {"a": "a", "b": "b"}
    assert {layer.name: layer.signed_input for layer in inspect_model(model, IMAGES).layers} == {"a": True, "b": False}


def test_flattening_keeps_the_group_and_taking_a_part_leaves_it():
    def forward(net: Any, x: Tensor) -> Tensor:
        left, right = x.flatten(1).chunk(2, dim=1)
        return net.whole(x.flatten(1)) + net.again(x.view(4, 6)) + net.left(left) + net.right(right)

    parts = {name: nn.Linear(inputs, 2) for name, inputs in [("whole", 6), ("again", 6), ("left", 3), ("right", 3)]}
    assert input_groups(Net(forward, **parts), ROWS.view(4, 2, 3)) == {
        "whole": "whole",
        "again": "whole",
        "left": "left",
        "right": "right",
    }


def test_tensors_that_reuse_freed_memory_are_not_mistaken_for_each_other():
    def forward(net: Any, x: Tensor) -> Tensor:
        total = x.new_zeros(())
        for layer in (net.a, net.b, net.c):
            fresh = x + 1  # the allocator gives every one of these the same address
            total = total + layer(fresh).sum()
            del fresh
        return total

    model = Net(forward, a=nn.Linear(6, 2), b=nn.Linear(6, 2), c=nn.Linear(6, 2))
    assert input_groups(model, ROWS) == {"a": "a", "b": "b", "c": "c"}


def test_the_memory_of_activations_is_not_kept():
    freed: list[bool] = []

    def forward(net: Any, x: Tensor) -> Tensor:
        big = x + 1
        storage = torch.multiprocessing.reductions.StorageWeakRef(big.untyped_storage())
        out = net.a(big)
        del big
        freed.append(storage.expired())
        return out

    inspect_model(Net(forward, a=nn.Linear(6, 2)), ROWS)
    assert freed == [True]


def test_a_module_called_twice_is_one_layer_that_joins_the_groups_of_both_inputs():
    def forward(net: Any, x: Tensor) -> Tensor:
        y = x * 2
        return net.a(x) + net.shared(x) + net.shared(y) + net.b(y)

    model = Net(forward, a=nn.Linear(6, 6), shared=nn.Linear(6, 6), b=nn.Linear(6, 6))
    graph = inspect_model(model, ROWS)
    assert {layer.name: layer.input_group for layer in graph.layers} == {"a": "a", "shared": "a", "b": "a"}
    assert by_name(graph)["shared"].calls == 2
    assert by_name(graph)["shared"].macs == 2 * 36
    assert len(graph.layers) == 3


def test_tied_weights_are_one_weight_group():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    assert {layer.name: layer.weight_group for layer in inspect_model(model, ROWS).layers} == {
        "0": "0",
        "2": "0",
        "3": "3",
    }


def test_a_module_under_two_names_is_one_layer():
    shared = nn.Linear(6, 6)
    graph = inspect_model(nn.Sequential(shared, nn.ReLU(), shared), ROWS)
    assert [(layer.name, layer.calls) for layer in graph.layers] == [("0", 2)]


def test_a_layer_that_stays_float_binds_no_other():
    def forward(net: Any, x: Tensor) -> Tensor:
        return net.odd(x) + net.odd(x * 2) + net.a(x) + net.b(x * 2)

    class Odd(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    model = Net(forward, odd=Odd(6, 6), a=nn.Linear(6, 6), b=nn.Linear(6, 6))
    assert input_groups(model, ROWS) == {"odd": "odd", "a": "a", "b": "b"}


# -------------------------------------------------------------------------------------- BatchNorm, sign, order


def test_the_batch_norm_that_directly_follows_is_named():
    model = nn.Sequential(conv(), nn.BatchNorm2d(3), nn.ReLU(), conv(), nn.ReLU(), nn.BatchNorm2d(3))
    layers = by_name(inspect_model(model, IMAGES))
    assert (layers["0"].batch_norm, layers["3"].batch_norm) == ("1", None)


def test_a_batch_norm_is_not_followed_where_something_else_reads_the_output_too():
    def forward(net: Any, x: Tensor) -> Tensor:
        stem = net.stem(x)
        return net.bn(stem) + stem  # a pre-activation ResNet's first shortcut

    assert inspect_model(Net(forward, stem=conv(), bn=nn.BatchNorm2d(3)), IMAGES).layers[0].batch_norm is None


def test_a_layer_called_twice_is_followed_by_no_batch_norm():
    model = Net(lambda net, x: net.bn(net.a(x)) + net.bn(net.a(2 * x)), a=conv(), bn=nn.BatchNorm2d(3))
    assert inspect_model(model, IMAGES).layers[0].batch_norm is None


@pytest.mark.parametrize(("offset", "signed"), [(0.0, False), (-0.5, True)])
def test_signedness_is_that_of_the_observed_input(offset: float, signed: bool):
    assert inspect_model(nn.Sequential(nn.Linear(6, 2)), ROWS.abs() + offset).layers[0].signed_input is signed


def test_one_signed_call_makes_the_input_signed():
    model = Net(lambda net, x: net.a(-x) + net.a(x), a=nn.Linear(6, 6))
    assert inspect_model(model, ROWS.abs()).layers[0].signed_input


def test_layers_are_listed_in_execution_order_not_in_that_of_definition():
    model = Net(lambda net, x: net.first(net.second(x)), first=nn.Linear(6, 6), second=nn.Linear(6, 6))
    assert [layer.name for layer in inspect_model(model, ROWS).layers] == ["second", "first"]


@pytest.mark.parametrize(("sign", "expected"), [(1, "up"), (-1, "down")])
def test_control_flow_on_data_is_followed(sign: int, expected: str):
    def forward(net: Any, x: Tensor) -> Tensor:
        return net.up(x) if x.sum() > 0 else net.down(x)

    graph = inspect_model(Net(forward, up=nn.Linear(6, 2), down=nn.Linear(6, 2)), sign * ROWS.abs())
    assert [layer.name for layer in graph.quantizable] == [expected]
    assert "does not run it" in str(graph.unhandled[0].reason)


@pytest.mark.parametrize(
    "wrap", [lambda x: (x, 2 * x), lambda x: [x, 2 * x], lambda x: {"a": x, "more": [{"b": 2 * x}]}]
)
def test_inputs_of_any_nesting_are_taken(wrap: Callable[[Tensor], Any]):
    def forward(net: Any, first: Any, second: Any = None) -> Tensor:
        if isinstance(first, dict):
            first, second = first["a"], first["more"][0]["b"]
        elif second is None:
            first, second = first
        return net.a(first) + net.b(second)

    graph = inspect_model(Net(forward, a=nn.Linear(6, 2), b=nn.Linear(6, 2)), wrap(ROWS), batch_size=4)
    assert [layer.macs for layer in graph.layers] == [12, 12]


# ------------------------------------------------------------------------------------------------------ reasons


def weight_normed() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))


def pruned() -> nn.Module:
    return prune.l1_unstructured(nn.Linear(6, 6), "weight", 0.5)


def spectral() -> nn.Module:
    return nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class PaddedConv(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(F.pad(input, (1, 0, 1, 0)), weight, bias)


@pytest.mark.parametrize(
    ("make", "batch", "macs", "reason"),
    [
        (weight_normed, ROWS, 36, "computed anew"),
        (pruned, ROWS, 36, "computed anew"),
        (lambda: Scaled(6, 6), ROWS, 36, "Scaled has a forward of its own"),
        (lambda: PaddedConv(3, 2, 1), IMAGES, 9 * 9 * 6, "PaddedConv has a forward of its own"),
        (lambda: nn.LSTM(6, 5, batch_first=True), ROWS.view(2, 2, 6), 2 * 4 * 5 * 11, "no quantized form of LSTM"),
        (lambda: nn.GRU(6, 5, batch_first=True), ROWS.view(2, 2, 6), 2 * 3 * 5 * 11, "no quantized form of GRU"),
        (lambda: nn.Linear(6, 6).to(torch.complex64), ROWS.to(torch.complex64), 36, "complex64"),
    ],
)
def test_a_layer_that_cannot_be_quantized_is_named_with_reason_and_macs(
    make: Callable[[], nn.Module], batch: Tensor, macs: int, reason: str
):
    odd = make()

    def forward(net: Any, x: Tensor) -> Any:
        net.odd(x)
        return net.plain(x.real if x.is_complex() else x)

    plain = nn.Linear(batch.shape[-1], 2)
    graph = inspect_model(Net(forward, odd=odd, plain=plain), batch)
    assert [layer.name for layer in graph.quantizable] == ["plain"]
    (named,) = graph.unhandled
    assert (named.name, named.macs) == ("odd", macs)
    assert reason in str(named.reason)


def test_spectral_norm_is_named_and_all_that_it_multiplies_is_counted():
    graph = inspect_model(nn.Sequential(spectral(), nn.Linear(6, 2)), ROWS[:1])
    (named,) = graph.unhandled
    assert "computed anew" in str(named.reason)
    assert named.macs == 36 + 36 + 6  # the layer's product, the norm's matrix-vector product, its inner product


def test_a_bilinear_layer_that_torchs_counter_leaves_out_is_counted():
    model = Net(lambda net, x: net.out(net.both(x, x)), both=nn.Bilinear(6, 6, 5), out=nn.Linear(5, 2))
    assert by_name(inspect_model(model, ROWS))["both"].macs == 6 * 6 * 5


def test_a_weight_used_without_calling_its_layer_is_named_with_its_macs():
    def forward(net: Any, x: Tensor) -> Tensor:
        return net.b(F.linear(x, net.a.weight, net.a.bias.clone()))

    model = Net(forward, a=nn.Linear(6, 5), b=nn.Linear(5, 2))
    layer = by_name(inspect_model(model, ROWS))["a"]
    assert (layer.macs, layer.input_shape, layer.output_shape) == (30, (6,), (5,))
    assert "without calling it" in str(layer.reason)


def test_an_embedding_tied_to_the_classifier_is_named_with_the_classifiers_macs():
    def forward(net: Any, tokens: Tensor) -> Tensor:
        return F.linear(net.mid(net.table(tokens)), net.table.weight)

    model = Net(forward, table=nn.Embedding(10, 6), mid=nn.Linear(6, 6))
    layer = by_name(inspect_model(model, torch.tensor([[1, 2, 3]])))["table"]
    assert (layer.kind, layer.weight_shape, layer.macs) == ("embedding", (10, 6), 3 * 60)
    assert "without calling it" in str(layer.reason)


# ------------------------------------------------------------------------------------- what is refused, and how


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.DataParallel(nn.Sequential(nn.Linear(6, 2))), "wrapped in DataParallel: give the plain model"),
        (nn.Sequential(nn.LazyLinear(2)), "'0.weight' is lazy"),
        (nn.Sequential(nn.Linear(6, 2, device="meta")), "'0.weight' is on the meta device"),
        (nn.Sequential(nn.ReLU()), "no layer that can be quantized"),
        (nn.Linear(6, 2), "wrap it in nn.Sequential"),
        (nn.Sequential(nn.Linear(7, 2)), "fails on its example input: RuntimeError"),
    ],
)
def test_a_model_that_cannot_be_inspected_is_refused_with_what_to_do(model: nn.Module, message: str):
    with pytest.raises(TaskError, match=message):
        inspect_model(model, ROWS)


def test_a_compiled_model_is_refused_with_what_to_give():
    model = nn.Sequential(nn.Linear(6, 2))
    with pytest.raises(TaskError, match=r"wrapped in OptimizedModule: give the plain model, its \._orig_mod"):
        inspect_model(torch.compile(model), ROWS)
    model.compile()
    with pytest.raises(TaskError, match="compiled in place"):
        inspect_model(model, ROWS)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused_by_name(bad: float):
    model = nn.Sequential(nn.Linear(6, 2), nn.Linear(2, 2))
    model[1].weight.data[1, 0] = bad
    with pytest.raises(TaskError, match=r"'1\.weight' has NaN or infinite"):
        inspect_model(model, ROWS)


def test_a_nan_in_batch_norm_statistics_is_refused_and_an_attention_mask_of_infinities_is_not():
    model = nn.Sequential(nn.Linear(6, 2), nn.BatchNorm1d(2))
    model.register_buffer("mask", torch.tensor([float("-inf")]))
    inspect_model(model, ROWS)
    model[1].running_var[0] = float("nan")
    with pytest.raises(TaskError, match=r"'1\.running_var'"):
        inspect_model(model, ROWS)


def test_an_input_without_tensors_is_refused():
    with pytest.raises(TaskError, match="holds no tensor"):
        inspect_model(nn.Sequential(nn.Linear(6, 2)), {"x": "not a tensor"})


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_and_torch_are_left_as_they_were(fails: bool):
    def forward(net: Any, x: Tensor) -> Tensor:
        if fails:
            net.fc(x)
            raise ValueError("on purpose")
        return net.bn(net.fc(x))

    model = Net(forward, fc=nn.Linear(6, 2), bn=nn.BatchNorm1d(2), lstm=nn.LSTM(2, 2))
    model.train()
    model.bn.eval()
    before = copy.deepcopy(model.state_dict())
    mkldnn = torch.backends.mkldnn.enabled
    if fails:
        with pytest.raises(TaskError, match="ValueError: on purpose"):
            inspect_model(model, ROWS)
    else:
        inspect_model(model, ROWS)
    assert [module.training for module in (model, model.fc, model.bn)] == [True, True, False]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.is_grad_enabled()
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mkldnn.enabled == mkldnn


def test_inspection_sees_eval_mode_whatever_mode_the_model_is_in():
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 2)).train()
    assert inspect_model(model, ROWS).macs == 48
    training = Net(
        lambda net, x: net.aux(x) if net.training else net.main(x), main=nn.Linear(6, 2), aux=nn.Linear(6, 3)
    )
    assert [layer.name for layer in inspect_model(training.train(), ROWS).quantizable] == ["main"]


# --------------------------------------------------------------------------------- whose matrix, and what is unknown


@pytest.mark.parametrize(
    "decode",
    [
        lambda net, h: F.linear(h, net.enc.weight.t(), net.bias),
        lambda net, h: F.linear(h, net.enc.weight.t().contiguous(), net.bias),
        lambda net, h: torch.addmm(net.bias, h, net.enc.weight),
        lambda net, h: h @ net.enc.weight + net.bias,
    ],
)
def test_a_product_belongs_to_the_owner_of_its_matrix_not_of_what_is_added(decode: Callable[..., Tensor]):
    """A6: a decoder that is tied to its encoder."""
    model = Net(lambda net, x: decode(net, net.mid(net.enc(x))), enc=nn.Linear(6, 5), mid=nn.Linear(5, 5))
    model.bias = nn.Parameter(torch.randn(6))
    graph = inspect_model(model, ROWS)
    assert {layer.name: layer.macs for layer in graph.layers} == {"enc": 2 * 30, "mid": 25}
    assert "without calling it" in str(by_name(graph)["enc"].reason)
    assert not graph.other_macs


def test_learned_queries_enter_a_layer():
    """B5."""
    model = Net(
        lambda net, x: net.lin(net.q.expand(len(x), -1, -1)).sum(1) + net.x(x), lin=nn.Linear(6, 4), x=nn.Linear(6, 4)
    )
    model.q = nn.Parameter(torch.randn(1, 3, 6))
    graph = inspect_model(model, ROWS)
    assert {layer.name: layer.macs for layer in graph.quantizable} == {"lin": 72, "x": 24}
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_constant_weight_stays_float_with_that_reason_and_a_frozen_network_does_not():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2))
    model[1].weight.requires_grad_(False)
    (constant,) = inspect_model(model, ROWS).unhandled
    assert (constant.name, "constant" in str(constant.reason)) == ("1", True)
    assert len(inspect_model(model.requires_grad_(False), ROWS).quantizable) == 2


def test_an_input_that_is_dead_in_all_samples_is_noted():
    """B15."""
    model = Net(lambda net, x: net.a(x) + net.b(F.relu(-x.abs())), a=nn.Linear(6, 2), b=nn.Linear(6, 2))
    rows = ROWS.clone()
    rows[:, 2:4] = 0
    whole, part = sorted(inspect_model(model, rows).notes, key=len, reverse=False)
    assert "input of b is zero in all 4 samples" in whole
    assert "2 channels of the model's input are zero in all 4 samples that a read" in part
    assert inspect_model(Net(lambda net, x: net.a(x), a=nn.Linear(6, 2)), ROWS).notes == ()


def test_signs_are_those_of_all_samples():
    """B1: negative in the last sample alone."""
    rows = torch.cat([ROWS.abs().repeat(64, 1), -ROWS[:1]])
    assert inspect_model(nn.Sequential(nn.Linear(6, 2)), rows).layers[0].signed_input


def test_macs_are_those_of_one_image_where_images_come_as_a_list_with_their_targets() -> None:
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)

        def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Tensor:
            return self.conv(torch.stack(images))

    images, targets = [torch.ones(3, 8, 8)] * 5, [{"boxes": torch.ones(2, 4)}] * 5
    for batch in ((images, targets), ((images,), {"targets": targets})):
        (layer,) = inspect_model(Detector(), batch).layers
        assert layer.macs == 4 * 3 * 9 * 64
