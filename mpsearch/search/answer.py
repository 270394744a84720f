"""The answer of a search in words: what a config gains in every cost, and which layers have how many bits."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from mpsearch.errors import CostError
from mpsearch.facts import ProblemFacts, cost_key
from mpsearch.precision import FLOAT, LayerPrecision, Precision, PrecisionConfig
from mpsearch.units import show

MOST_LINES = 12
"""Groups of layers that are named; the rest, which multiply least, are summed up."""


def gains_in_words(config: PrecisionConfig, facts: ProblemFacts) -> list[str]:
    """A line a cost: what the config costs, and how that compares with the reference and with float.

    A cost that is not known of one of these, as a table of a device may not be, is compared with the others alone.
    """
    rivals = [
        (facts.spec.cost.reference, facts.space.everywhere(LayerPrecision.shorthand(facts.spec.cost.reference))),
        ("float", PrecisionConfig.uniform(config, LayerPrecision(FLOAT, FLOAT))),
    ]
    lines = []
    for name, cost in facts.costs.items():
        try:
            total = cost.absolute(config).total
        except CostError:
            continue
        compared = []
        for rival, its_config in rivals:
            try:
                its_total = cost.reference.total if rival != "float" else cost.absolute(its_config).total
            except CostError:
                continue
            compared.append(f"{_ratio(total, its_total)} {rival} ({show(its_total, cost.reference.unit)})")
        lines.append(f"{name}: {show(total, cost.reference.unit)}" + (f", {', '.join(compared)}" if compared else ""))
    return lines


def layers_in_words(config: PrecisionConfig, facts: ProblemFacts) -> list[str]:
    """Which layers have how many bits, in the network's order, neighbours of one precision together.

    Each with its share of the MACs and of the cost that is minimized. Of many groups those with the fewest MACs are
    summed up in the last line.
    """
    layers = {layer.name: layer for layer in facts.graph.quantizable}
    cost = facts.cost.absolute(config)
    macs, minimized = facts.graph.macs or 1, cost_key(facts.spec.cost.model, facts.costs)
    groups: list[tuple[str, int, float]] = []
    for precision, run in groupby((name for name in layers if name in config), key=config.__getitem__):
        names = list(run)
        named = names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]} ({len(names)} layers)"
        of_group = sum(layers[name].macs for name in names)
        share = sum(cost.per_layer.get(name, 0.0) for name in names) / cost.total
        text = f"{named}: {bits_in_words(precision)}, {of_group / macs:.0%} of MACs"
        groups.append((text, of_group, share))
    shown = sorted(sorted(range(len(groups)), key=lambda i: -groups[i][1])[:MOST_LINES])
    lines = [f"{groups[i][0]}, {groups[i][2]:.0%} of {minimized}" for i in shown]
    if rest := [group for i, group in enumerate(groups) if i not in set(shown)]:
        lines.append(
            f"{len(rest)} groups more: {sum(g[1] for g in rest) / macs:.0%} of MACs, "
            f"{sum(g[2] for g in rest):.0%} of {minimized}"
        )
    return lines


def bits_in_words(pair: LayerPrecision) -> str:
    """The bits of weight and input of a layer.

    >>> bits_in_words(LayerPrecision.parse("shift:4", "uniform:8"))
    '4 bit shift weights, 8 bit inputs'
    """
    if pair.weight == pair.activation:
        return _in_words(pair.weight)
    return f"{_in_words(pair.weight)} weights, {_in_words(pair.activation)} inputs"


def _in_words(precision: Precision) -> str:
    if not precision.has_scale:
        return str(precision)
    return f"{precision.bits} bit" + ("" if precision.quantizer == "uniform" else f" {precision.quantizer}")


def _ratio(total: float, other: float) -> str:
    if not total > 0 or total == other:
        return "as much as" if total == other else "nothing beside"
    return f"{other / total:.3g}x less than" if total < other else f"{total / other:.3g}x more than"


def answer(title: str, config: PrecisionConfig, facts: ProblemFacts) -> Sequence[str]:
    """What a config gains and which layers have how many bits, under a title."""
    return [
        f"{title}, in each cost:",
        *(f"  {line}" for line in gains_in_words(config, facts)),
        "Its layers:",
        *(f"  {line}" for line in layers_in_words(config, facts)),
    ]
