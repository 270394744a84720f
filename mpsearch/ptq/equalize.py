"""Cross-layer equalization and high-bias absorption (Nagel et al., arXiv 1906.04721, §4.1; white paper §3.2-3.3).

For layers W1, b1 and W2 with ReLU between them and any s > 0 per channel, with S = diag(s),

    W2 relu(W1 x + b1) = (W2 S) relu(S^-1 W1 x + S^-1 b1),    s_i = sqrt(r1_i r2_i) / r2_i,

and with this s both ranges of channel i, r1_i = max|W1[i]| and r2_i = max|W2[:, i]|, become sqrt(r1_i r2_i). A layer
that is in two chains (the depthwise one of three) is met twice, so the chains are gone through until nothing changes;
in a depthwise triple each channel's ranges all become the cube root of their product.

High biases: c_i = max(0, beta_i - 3 gamma_i) is moved behind the ReLU, b1 - c and b2 + W2 c, which changes nothing as
long as the channel stays above c: for a normal channel 99.87 % of the time.

We differ in two points. Absorption is left out where the second layer pads with zeros, because W2 c is then wrong along
the border. ReLU6 does not commute with scaling: as in the first paper it is replaced by ReLU (the function changes
where it clipped), where it is a module used once; other chains through a ReLU6 are left alone, with a note.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from mpsearch.graph import agreement
from mpsearch.ptq.flow import Chain, Normal, blocks, times, trace
from mpsearch.ptq.fold import FloatNet, bias_of, replace_module

SWEEPS = 100
"""Sweeps over all chains at most; a change of each factor below TOLERANCE ends them earlier."""
TOLERANCE = 1e-3
APPROXIMATION = 0.1
"""How far, as a share of their norm, the answers may move where equalization is an approximation."""


def equalize(net: FloatNet, replace_relu6: bool = True, calibration_input: Any | None = None) -> FloatNet:
    """A copy of the network whose chains are equalized and whose high biases are absorbed.

    With data it is checked that scaling changes nothing, and chains for which this does not hold are left alone. What
    is an approximation (ReLU instead of ReLU6, absorption) may move the answers by `APPROXIMATION`, and is said; what
    moves them further is not done.
    """
    if calibration_input is None:
        return _equalize(net, replace_relu6, True, None)
    before = agreement.outputs(net.model, calibration_input)
    plans = [(replace_relu6, True), (replace_relu6, False), (False, True), (False, False)]
    for relu6, absorbs in dict.fromkeys(plans):
        done = _equalize(net, relu6, absorbs, calibration_input)
        change = agreement.relative(agreement.outputs(done.model, calibration_input), before)
        if change <= APPROXIMATION:
            break
    given_up = [
        *(["ReLU6 stays"] if replace_relu6 and not relu6 and done.notes != net.notes else []),
        *(["high biases are not absorbed"] if not absorbs else []),
    ]
    said = []
    if given_up:
        said.append(f"in equalization {' and '.join(given_up)}: the network would answer otherwise")
    if change > 1e-3:
        said.append(f"equalization moves the answers by {change:.1%} of their norm: ReLU6 became ReLU, or a bias moved")
    return replace(done, notes=(*done.notes, *said))


@torch.no_grad()
def _equalize(net: FloatNet, replace_relu6: bool, absorbs: bool, calibration_input: Any | None) -> FloatNet:
    model = copy.deepcopy(net.model)
    flow = trace(model)
    if flow is None:
        note = "no cross-layer equalization: torch.fx cannot trace the model"
        return replace(net, notes=(*net.notes, note))
    chains, notes = [], list(net.notes)
    for chain in flow.chains():
        if chain.relu6 and (not replace_relu6 or "" in chain.relu6):
            notes.append(f"{chain.first} and {chain.second} are not equalized: ReLU6 between them cannot be replaced")
        else:
            chains.append(chain)
    relu6 = tuple(name for chain in chains for name in chain.relu6)
    for name in relu6:
        replace_module(model, model.get_submodule(name), nn.ReLU())
    outputs = dict(net.outputs)
    if calibration_input is not None and chains:
        chains_that_hold = _checked(model, chains, calibration_input)
        notes += [
            f"{chain.first} and {chain.second} are not equalized: the network then answers otherwise"
            for chain in chains
            if chain not in chains_that_hold
        ]
        chains = chains_that_hold
    for chain, factors in _equalized(model, chains):
        if chain.first in outputs:
            output = outputs[chain.first]
            outputs[chain.first] = Normal(output.mean / factors, output.std / factors)
    for chain in chains:
        if absorbs and chain.first in outputs and _absorbs(chain, model.get_submodule(chain.second)):
            first, second = model.get_submodule(chain.first), model.get_submodule(chain.second)
            outputs[chain.first] = absorb_high_bias(first, second, outputs[chain.first])
    return FloatNet(model, outputs, net.folded, net.relu6 + relu6, tuple(notes))


@torch.no_grad()
def equalize_pair(first: nn.Module, second: nn.Module) -> Tensor:
    """Equalize two layers in place; the factors s `(channels,)`: 1 for a channel that is all zero on one side."""
    w1, w2 = blocks(first), blocks(second)
    r1, r2 = w1.abs().amax(dim=(2, 3)).flatten(), w2.abs().amax(dim=(1, 3)).flatten()
    s = torch.where((r1 > 0) & (r2 > 0), (r1 / r2).sqrt(), torch.ones_like(r1))  # = sqrt(r1 r2) / r2
    w1.div_(s.view(w1.shape[0], -1, 1, 1))
    w2.mul_(s.view(w2.shape[0], 1, -1, 1))
    if first.bias is not None:
        cast(Tensor, first.bias).div_(s)
    return s


@torch.no_grad()
def absorb_high_bias(first: nn.Module, second: nn.Module, output: Normal) -> Normal:
    """Move c = max(0, beta - 3 gamma) from the bias of `first` into that of `second`, in place.

    Args:
        first: a layer whose output, distributed as `output`, goes through a ReLU into `second`.
        second: a layer that does not pad.
        output: mean beta and deviation gamma of each channel.

    Returns:
        The new distribution of the output of `first`.
    """
    c = (output.mean - 3 * output.std).clamp_min(0)
    bias_of(first).sub_(c)
    bias_of(second).add_(times(blocks(second).sum(dim=3), c))
    return Normal(output.mean - c, output.std)


def _checked(model: nn.Module, chains: list[Chain], calibration_input: Any) -> list[Chain]:
    """The chains whose equalization leaves the function as it is."""
    reference = agreement.outputs(model, calibration_input)

    def same(some: Sequence[Chain]) -> bool:
        scaled = copy.deepcopy(model)
        _equalized(scaled, list(some))
        return agreement.holds(scaled, calibration_input, reference)

    return agreement.largest_subset(chains, same)


def _equalized(model: nn.Module, chains: list[Chain]) -> list[tuple[Chain, Tensor]]:
    """Equalize all chains in place until nothing changes; each chain with the product of its factors."""
    products: dict[Chain, Tensor] = {}
    for _ in range(SWEEPS):
        largest = 0.0
        for chain in chains:
            s = equalize_pair(model.get_submodule(chain.first), model.get_submodule(chain.second))
            products[chain] = products.get(chain, torch.ones_like(s)) * s
            largest = max(largest, float((s - 1).abs().max()))
        if largest < TOLERANCE:
            break
    return list(products.items())


def _absorbs(chain: Chain, second: nn.Module) -> bool:
    """Whether a constant can be moved through: a ReLU and nothing that averages, and no zeros at the border."""
    padding = getattr(second, "padding", 0)
    pads = padding != "valid" if isinstance(padding, str) else bool(torch.tensor(padding).any())
    transposed = isinstance(second, nn.modules.conv._ConvTransposeNd)  # sums fewer taps at the border
    acts = {"relu", "relu6"} & set(chain.between)
    return bool(acts) and set(chain.between) <= {"relu", "relu6", "same"} and not pads and not transposed
