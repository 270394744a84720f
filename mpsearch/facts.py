"""The facts of a study's problem: what is known of it once its task was loaded, as a value that needs no task.

A run writes them into its folder (`problem.json`) when it starts. Whoever only looks at a run (`report`, `dashboard`)
reads them there: no network is built, no data is read, and nothing that the study names is imported. This module needs
no torch.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mpsearch.cost.device import written_model
from mpsearch.cost.model import COST_MODELS, Bound, CostModel, RelativeCost
from mpsearch.documents import explain
from mpsearch.errors import CostError, MpsearchError, PrecisionError, RunError
from mpsearch.graph.facts import LayerInfo, ModelGraph
from mpsearch.metric import Metric
from mpsearch.precision import FLOAT, LayerPrecision, Precision, PrecisionConfig
from mpsearch.record import RunFolder, TrialRecord
from mpsearch.space.choices import GRANULARITY, TENSORS, TensorName, listing
from mpsearch.space.space import SearchSpace, Slot
from mpsearch.study import LATENCY, StudySpec, comparable, read_spec
from mpsearch.units import SHARE, Amount, show


@dataclass(frozen=True, kw_only=True)
class ProblemFacts:
    """A study with the layers of its network, the configs that there are, and what they cost."""

    spec: StudySpec
    task_name: str  # of model and data
    metric: Metric  # what scores are
    graph: ModelGraph
    space: SearchSpace
    cost: RelativeCost  # the one that is minimized, with the study's limits
    cheapest: float  # relative cost of the cheapest config
    dearest: float
    float_digest: str  # of the float network's weights: 16 hex digits
    float_scores: Mapping[str, float] = field(default_factory=dict)  # by split, where they have been measured
    notes: tuple[str, ...] = ()  # what looked wrong about the task when the run started
    began: Mapping[str, Any] = field(default_factory=dict)  # `comparable` of the study that the run began with
    costs: Mapping[str, RelativeCost] = field(default_factory=dict)  # every cost that is recorded, by name

    def priced(self, config: PrecisionConfig) -> dict[str, float]:
        """What a config costs under every cost model, each in its unit, by name."""
        return {name: cost.absolute(config).total for name, cost in self.costs.items()}

    @property
    def layers(self) -> tuple[str, ...]:
        """The quantizable layers in execution order."""
        return self.space.layers

    def summary(self) -> list[str]:
        """What is optimized, in words and units."""
        spec, costs = self.spec, self.cost
        quantizable, unhandled = self.graph.quantizable, self.graph.unhandled
        macs, minimized = self.graph.macs, cost_key(spec.cost.model, self.costs)
        lines = [
            f"{self.metric.goal} on the validation split and minimize {minimized} of {self.task_name}.",
            f"Cost 1 is {show(costs.reference.total, costs.reference.unit)} a sample: the network at "
            f"{spec.cost.reference} everywhere. Configs of the space '{self.space.name}' cost {self.cheapest:.3g} to "
            f"{self.dearest:.3g}"
            + (f"; only those up to {spec.cost.budget:g} are tried." if spec.cost.budget else "."),
            *([f"Limits that every config keeps: {'; '.join(map(str, costs.limits))}."] if costs.limits else []),
            f"{counted(len(quantizable), 'layer')}, {macs / 1e6:.3g} million MACs a sample; "
            f"{counted(len(self.space.free), 'free choice')}, {counted(self.space.size, 'config')}; "
            f"the uniform ladder of {len(self.space.ladder())} is the baseline.",
        ]
        lines += self._hardware()
        if unhandled:
            names = ", ".join(layer.name for layer in unhandled[:5]) + (", ..." if len(unhandled) > 5 else "")
            lines.append(
                f"{len(unhandled)} layers stay float and are priced as float: {names} (see `mpsearch inspect`)."
            )
        if other := sum(self.graph.other_macs.values()):
            lines.append(f"{other / macs:.1%} of the MACs are outside layers (attention products, say) and not priced.")
        if self.float_scores:
            scores = ", ".join(f"{split} {self.metric.show(score)}" for split, score in self.float_scores.items())
            lines.append(f"The float network: {scores}.")
        return lines

    def _hardware(self) -> list[str]:
        """What the hardware leaves of the space, in words; nothing where it leaves all."""
        options = self.space.options
        same: dict[tuple[LayerPrecision, ...], list[str]] = {}
        for name in self.space.pairs:
            same.setdefault(options[name], []).append(name)
        lines = []
        for pairs, names in same.items():
            which = f"'{names[0]}'" if len(names) == 1 else f"{len(names)} layers ('{names[0]}' first)"
            lines.append(f"  {which} may have {len(pairs)} pairs: {listing(pairs)}.")
        tied = [slot for slot in self.space.slots if len(slot.layers) > 1]
        lines += [
            f"  {len(slot.layers)} layers share one {slot.tensor} precision: {listing(slot.layers)}."
            for slot in tied[:6]
        ]
        if len(tied) > 6:
            lines.append(f"  And {len(tied) - 6} groups of layers more share a precision.")
        if not lines or self.spec.hardware == "generic":
            return []
        name = Path(self.spec.hardware).stem
        return [f"Hardware '{name}' and the space '{self.space.name}' together leave:", *lines]

    def _written(self, cost: RelativeCost) -> _Prices:
        """What a model that knows some pairs alone has for this network: looking at a run imports and reads nothing."""
        known = [LayerPrecision.shorthand(self.spec.cost.reference), LayerPrecision(FLOAT, FLOAT)]
        layers: dict[str, dict[str, float]] = {}
        for layer in self.graph.layers:
            pairs = dict.fromkeys([*self.space.options.get(layer.name, ()), *known])
            priced = ((pair, cost.price(layer.name, pair)) for pair in pairs)
            layers[layer.name] = {str(pair): value for pair, value in priced if value is not None}
        return _Prices(unit=cost.reference.unit, layers=layers, change=cost.model.change, fixed=cost.model.fixed)

    def to_json(self) -> str:
        """The text of `problem.json`, from which `from_json` makes equal facts of the same study."""
        document = _Document(
            schema="mpsearch/problem/1",
            task=self.task_name,
            metric=self.metric.name,
            graph=self.graph,
            space=self.space.name,
            slots=tuple(_Slot.of(slot) for slot in self.space.slots),
            pairs=tuple((name, tuple(sorted(map(str, pairs)))) for name, pairs in self.space.pairs.items()),
            cheapest=self.cheapest,
            dearest=self.dearest,
            float_digest=self.float_digest,
            float_scores=dict(self.float_scores),
            notes=self.notes,
            study=dict(self.began) or comparable(self.spec),
            prices={name: self._written(cost) for name, cost in self.costs.items() if cost.rows_only},
        )
        return document.model_dump_json(by_alias=True, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, spec: StudySpec, metric: Metric) -> ProblemFacts:
        """Read what `to_json` wrote for this study, whose scores are of `metric`.

        Raises:
            RunError: the text is something else; the message says what is wrong with it.
            CostError: the study's cost model does not fit the layers.
        """
        try:
            document = _Document.model_validate_json(text, strict=True)
            slots = tuple(slot.built() for slot in document.slots)
        except ValidationError as error:
            raise RunError(explain(error, _Document, "problem")) from None
        except PrecisionError as error:
            raise RunError(f"  slots: {error}") from None
        if strange := [layer for layer in document.graph.layers if not layer.sound]:
            raise RunError(f"  graph: layer '{strange[0].name}' has a kind, shapes or counts that no layer has")
        if not all(0 <= macs < 2**63 for macs in document.graph.other_macs.values()):
            raise RunError("  graph.other_macs: they are no counts")
        if not all(map(metric.possible, document.float_scores.values())):
            raise RunError(f"  float_scores: they are beyond what {metric.name} can be")
        names = tuple(layer.name for layer in document.graph.quantizable)
        decided = sorted((name, slot.tensor) for slot in slots for name in slot.layers)
        if decided != sorted((name, tensor) for name in names for tensor in TENSORS):
            raise RunError("  slots: they are not those of its layers: every tensor of every layer is in exactly one")
        others = {name: written_model(p.unit, p.layers, p.change, p.fixed) for name, p in document.prices.items()}
        cost, costs = price_study(spec, document.graph.layers, others)
        return ProblemFacts(
            spec=spec,
            task_name=document.task,
            metric=metric,
            graph=document.graph,
            space=SearchSpace(document.space, names, slots, pairs={n: _pairs(texts) for n, texts in document.pairs}),
            cost=cost,
            costs=costs,
            cheapest=document.cheapest,
            dearest=document.dearest,
            float_digest=document.float_digest,
            float_scores=document.float_scores,
            notes=document.notes,
            began=document.study,
        )


def with_costs(records: Sequence[TrialRecord], facts: ProblemFacts) -> list[TrialRecord]:
    """The records, those of earlier versions with every cost: priced now, where their config is of this network."""
    filled = []
    for record in records:
        if not record.costs and record.cost is not None:
            with contextlib.suppress(CostError):
                record = replace(record, costs=facts.priced(record.config))
        filled.append(record)
    return filled


def cost_key(name: str, costs: Mapping[str, object]) -> str:
    """What records call a cost that a study names: the hardware's is `latency_us` or `latency_cycles`."""
    return next((key for key in costs if key.startswith("latency_")), name) if name in LATENCY else name


def price_study(
    spec: StudySpec, layers: Sequence[LayerInfo], others: Mapping[str, CostModel] | None = None
) -> tuple[RelativeCost, dict[str, RelativeCost]]:
    """The cost that a study minimizes, with its limits, and every cost that can be recorded of the network, by name.

    Args:
        spec: the study.
        layers: of its network.
        others: models that are no formula, by what records call them (`cost_key`).

    Raises:
        CostError: the network costs nothing under the study's model, or a limit has the unit of another cost.
    """
    models: dict[str, str | CostModel] = {**{name: name for name in COST_MODELS}, **(others or {})}
    main_key = cost_key(spec.cost.model, models)
    if main_key not in models:
        raise CostError(
            f"cost.model is {spec.cost.model}, and hardware '{spec.hardware}' has no cost: give its profile a `cost` "
            "with a table or macs_per_cycle, or take other hardware"
        )
    main = RelativeCost(layers, models[main_key], spec.cost.reference)
    asked = {cost_key(name, models) for name in spec.cost.limits}
    costs: dict[str, RelativeCost] = {}
    for name, model in models.items():
        try:
            costs[name] = main if name == main_key else RelativeCost(layers, model, spec.cost.reference)
        except CostError:  # a network of products alone has no bytes of weights, a table no row for the reference
            if name in asked and name in (others or {}):
                raise
    main.limits = tuple(
        _bound(name, cost_key(name, costs), amount, costs) for name, amount in spec.cost.amounts.items()
    )
    return main, costs


def _bound(asked: str, name: str, amount: Amount, costs: Mapping[str, RelativeCost]) -> Bound:
    if name not in costs:
        raise CostError(
            f"cost.limits.{asked}: there is no such cost of this network on this hardware: leave the limit out, or "
            "give the hardware profile a `cost`"
        )
    reference = costs[name].reference
    if amount.unit == SHARE:
        return Bound(name, costs[name], amount.value, show(amount.value * reference.total, reference.unit))
    if amount.unit != reference.unit:
        raise CostError(
            f"cost.limits.{name} is {amount}, but {name} is counted in {reference.unit}: give the bound in that, or in "
            "% of the reference's"
        )
    return Bound(name, costs[name], amount.value / reference.total, str(amount))


def read_facts(folder: RunFolder) -> ProblemFacts:
    """The facts of a run, from its folder alone.

    Raises:
        RunError: the folder has none, or they cannot be read.
        StudyError: its study is none.
    """
    spec = read_spec(folder)
    text = folder.read_file(folder.problem_json)
    rewrite = (
        f"write it once with `mpsearch resume {folder.path} --trials {max(1, len(folder.records()))}`, which runs no "
        "trial again but loads the model and the data that the study names"
    )
    if text is None:
        raise RunError(
            f"{folder.path} has no {folder.problem_json.name}, which runs of this mpsearch write when they start: "
            f"{rewrite}"
        )
    try:
        return ProblemFacts.from_json(text, spec, folder.metric)
    except MpsearchError as error:
        raise RunError(f"{folder.problem_json} cannot be used:\n{error}\n{rewrite}") from None


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class _Slot(_Section):
    tensor: TensorName
    layers: tuple[str, ...] = Field(min_length=1)
    choices: tuple[str, ...] = Field(min_length=1)

    @classmethod
    def of(cls, slot: Slot) -> _Slot:
        return cls(tensor=slot.tensor, layers=slot.layers, choices=tuple(map(str, slot.choices)))

    def built(self) -> Slot:
        choices = tuple(Precision.parse(text, GRANULARITY[self.tensor]) for text in self.choices)
        return Slot(self.tensor, self.layers, choices)


Price = Annotated[float, Field(ge=0, lt=1e30)]


class _Prices(_Section):
    """The costs of a model that knows some pairs alone, in its unit."""

    unit: str
    layers: dict[str, dict[str, Price]]
    change: Price
    fixed: Price


class _Document(_Section):
    """`problem.json`; what the study says (the cost model, say) is in `study.yaml`, and not here again."""

    schema_: Literal["mpsearch/problem/1"] = Field(alias="schema")
    task: str
    metric: str  # its name; `run.json` has what it is
    graph: ModelGraph
    space: str  # its name
    slots: tuple[_Slot, ...]
    pairs: tuple[tuple[str, tuple[str, ...]], ...] = ()  # of the layers that may not have all of theirs
    cheapest: float = Field(gt=0, lt=1e30)
    dearest: float = Field(gt=0, lt=1e30)
    float_digest: str
    float_scores: dict[str, float]
    notes: tuple[str, ...]
    study: dict[str, Any] = Field(default_factory=dict)  # older runs do not say
    prices: dict[str, _Prices] = Field(default_factory=dict)


def _pairs(texts: Sequence[str]) -> frozenset[LayerPrecision]:
    sides = (text.partition(" x ") for text in texts)
    return frozenset(LayerPrecision.parse(weight, activation) for weight, _, activation in sides)


def counted(count: int, what: str) -> str:
    """So many of something, in words.

    >>> counted(1, "config"), counted(1234, "config")
    ('1 config', '1,234 configs')
    """
    return f"{scientific(count)} {what}{'' if count == 1 else 's'}"


def scientific(count: int) -> str:
    """A count that may be astronomical, for people: 1,234 or about 10^57.

    >>> scientific(7**20)
    'about 10^16.9'
    """
    return f"{count:,}" if count < 10**7 else f"about 10^{math.log10(count):.1f}"
