"""Records as tables: what the figures draw and the report prints."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import groupby
from typing import Any

import pandas as pd

from mpsearch.cost.model import RelativeCost
from mpsearch.graph.facts import LayerInfo
from mpsearch.metric import Metric
from mpsearch.precision import LayerPrecision, Precision, PrecisionConfig
from mpsearch.record import FinalRecord, PrescreenRecord, TrialRecord
from mpsearch.search.front import ScoreRange, hypervolume_over_time, objectives, pareto_front
from mpsearch.space.space import Slot

_MARKS = {"uniform": "", "shift": "s", "apot": "p", "float16": "f", "bfloat16": "b"}
MARKS_EXPLAINED = (
    "4: uniform, 4 bits · 4s: shift (power of two) · 4p: APoT (sum of powers of two) · f: float · "
    "16f, 16b: float16, bfloat16"
)


def trials_table(records: Sequence[TrialRecord], metric: Metric) -> pd.DataFrame:
    """A row per trial, in the order of `records`.

    Columns: number, origin, state, score (in the metric's unit), relative_cost, weight_bits and activation_bits
    (`PrecisionConfig.mean_bits`), on_front, knee, reason, steps (of training, behind the score).
    """
    front = pareto_front(records, metric)
    knee = front.knee if front.trials else None
    rows = [
        (
            trial.number,
            trial.origin,
            trial.state,
            trial.score,
            trial.cost,
            *trial.config.mean_bits,
            any(trial is member for member in front),  # by identity: numbers may repeat outside a study
            trial is knee,
            trial.reason,
            trial.steps,
        )
        for trial in records
    ]
    columns = "number origin state score relative_cost weight_bits activation_bits on_front knee reason steps"
    return pd.DataFrame(rows, columns=columns.split()).astype(
        {"score": float, "relative_cost": float, "on_front": bool, "knee": bool}
    )


def front_table(records: Sequence[TrialRecord], metric: Metric) -> pd.DataFrame:
    """The rows of `trials_table` that are on the front, by rising cost."""
    trials = trials_table(records, metric)
    return trials[trials.on_front].sort_values("relative_cost", ignore_index=True)


def bits_table(records: Sequence[TrialRecord], layers: Sequence[str], metric: Metric) -> pd.DataFrame:
    """A row per front trial (by rising cost) and layer (in the order of `layers`; those not in the config left out).

    Columns: position (on the front, 0 the cheapest), number, relative_cost, knee, layer, weight_bits, weight_mark,
    activation_bits, activation_mark, where a mark is the short form explained by `MARKS_EXPLAINED`.
    """
    front = pareto_front(records, metric)
    knee = front.knee if front.trials else None
    rows = [
        (
            position,
            trial.number,
            trial.cost,
            trial is knee,
            layer,
            trial.config[layer].weight.bits,
            mark(trial.config[layer].weight),
            trial.config[layer].activation.bits,
            mark(trial.config[layer].activation),
        )
        for position, trial in enumerate(front)
        for layer in layers
        if layer in trial.config
    ]
    columns = "position number relative_cost knee layer weight_bits weight_mark activation_bits activation_mark"
    return pd.DataFrame(rows, columns=columns.split())


def layers_table(layers: Sequence[LayerInfo], cost: RelativeCost) -> pd.DataFrame:
    """A row per quantizable layer, in the network's order.

    Columns: layer, kind, shape (of the weight), macs, weights (elements), reference_percent (what the layer adds to the
    cost of the reference config, which is 100).
    """
    reference = cost.reference
    rows = [
        (
            info.name,
            "depthwise" if info.depthwise else info.kind,
            "×".join(map(str, info.weight_shape)),
            info.macs,
            info.weights,
            100 * reference.per_layer[info.name] / reference.total,
        )
        for info in layers
        if info.reason is None
    ]
    return pd.DataFrame(rows, columns=["layer", "kind", "shape", "macs", "weights", "reference_percent"])


def config_table(config: Mapping[str, LayerPrecision], layers: pd.DataFrame, cost: RelativeCost) -> pd.DataFrame:
    """The rows of `layers` (as from `layers_table`) with what a config makes of them.

    Columns more: cost_percent (of the reference's whole cost), and for weight and activation: the precision in words,
    _bits, _quantizer, _mark.
    """
    table = layers[layers.layer.isin(list(config))].reset_index(drop=True)
    precisions = [config[name] for name in table.layer]
    columns: dict[str, list[Any]] = {
        "cost_percent": [100 * cost.addend(n, p) for n, p in zip(table.layer, precisions, strict=True)]
    }
    for side in ("weight", "activation"):
        of_side: list[Precision] = [getattr(precision, side) for precision in precisions]
        columns |= {
            side: [str(precision) for precision in of_side],
            f"{side}_bits": [precision.bits for precision in of_side],
            f"{side}_quantizer": [precision.quantizer for precision in of_side],
            f"{side}_mark": [mark(precision) for precision in of_side],
        }
    return table.assign(**columns)


def config_text(config: Mapping[str, LayerPrecision], most: int = 24) -> str:
    """A config in words for a hover, HTML: a line for every run of layers of one precision, at most `most` lines.

    >>> config_text({name: LayerPrecision.shorthand("w4a8") for name in ("conv", "fc")})
    'conv … fc (2): 4 × 8'
    """

    def shown(pair: tuple[str, LayerPrecision]) -> str:
        return f"{mark(pair[1].weight)} × {mark(pair[1].activation)}"

    lines = []
    for precision, run in groupby(config.items(), key=shown):
        names = [name for name, _ in run]
        ends = names[0] if len(names) == 1 else f"{names[0]} … {names[-1]} ({len(names)})"
        lines.append(f"{escape(ends)}: {precision}")
    if len(lines) > most:
        lines = [*lines[: most - 1], f"and {len(lines) - most + 1} more: click"]
    return "<br>".join(lines)


def finals_table(records: Sequence[TrialRecord], finals: Sequence[FinalRecord]) -> pd.DataFrame:
    """A row per finally trained trial, by rising cost; in the metric's unit, std over seeds (NaN for a single one).

    Columns: number, origin, relative_cost, proxy (score on val after the trial), val, val_std, test, test_std,
    seeds.
    """
    by_number = {record.number: record for record in records}
    runs = pd.DataFrame([(f.number, f.val, f.test) for f in finals], columns=["number", "val", "test"])
    rows = []
    for number, of_trial in runs.groupby("number"):
        trial = by_number.get(int(str(number)))
        if trial is None or trial.score is None:
            continue
        spread = [value for name in ("val", "test") for value in (of_trial[name].mean(), of_trial[name].std())]
        rows.append((trial.number, trial.origin, trial.cost, trial.score, *spread, len(of_trial)))
    columns = ["number", "origin", "relative_cost", "proxy", "val", "val_std", "test", "test_std", "seeds"]
    return pd.DataFrame(rows, columns=columns).sort_values("relative_cost", ignore_index=True)


def best_table(records: Sequence[TrialRecord], cheapest: float, metric: Metric) -> pd.DataFrame:
    """The best score so far among the trials within each of three costs, a row whenever it gets better and one at the
    end.

    Columns: bound (the reference's cost, and two spread in log cost down to `cheapest`, that of the cheapest config),
    elapsed_s (since the first trial started), score, number.
    """
    bounds = [float(f"{min(1.0, cheapest) ** share:.2g}") for share in (0.0, 0.5, 0.8)]
    started_s = min((record.started_s for record in records), default=0.0)
    complete = [record for record in records if record.state == "complete" and record.score is not None]
    ended = pd.DataFrame(
        sorted((r.ended_s - started_s, r.number, *objectives(r)) for r in complete),
        columns=["elapsed_s", "number", "score", "cost"],
    )
    ended = ended.assign(quality=ended.score.map(metric.quality))
    rows = []
    for bound in dict.fromkeys(bounds):
        within = ended[ended.cost <= bound]
        risen = within[within.quality > within.quality.cummax().shift(fill_value=-math.inf)]
        rows += [(bound, row.elapsed_s, row.score, row.number) for row in rows_of(risen)]
        if len(risen):
            rows.append((bound, ended.elapsed_s.iloc[-1], *rows[-1][2:]))
    return pd.DataFrame(rows, columns=["bound", "elapsed_s", "score", "number"])


def descent_table(log: Sequence[Mapping[str, Any]], slots: Sequence[Slot]) -> pd.DataFrame:
    """A row per logged step and tensor of a warm-start descent, tensors in the network's order.

    Columns: step, budget (relative cost), loss, layer (the first of those that share it), tensor, bits.
    """
    rows = [
        (entry["step"], entry["cost"], entry["loss"], slot.layers[0], slot.tensor, entry["bits"][slot.name])
        for entry in log
        for slot in slots
        if slot.name in entry["bits"]
    ]
    return pd.DataFrame(rows, columns=["step", "budget", "loss", "layer", "tensor", "bits"])


def prescreen_table(scores: Sequence[PrescreenRecord]) -> pd.DataFrame:
    """A row per untrained config that was scored, on the most batches, in the order of scoring.

    Columns: source (who proposed it), relative_cost, divergence. Scores that are no numbers are left out.
    """
    best: dict[PrecisionConfig, PrescreenRecord] = {}
    sources: dict[PrecisionConfig, str] = {}
    for score in scores:
        sources.setdefault(score.config, score.source)
        if score.config not in best or score.batches >= best[score.config].batches:
            best[score.config] = score
    rows = [(sources[c], score.cost, score.divergence) for c, score in best.items() if score.divergence is not None]
    return pd.DataFrame(rows, columns=["source", "relative_cost", "divergence"])


def progress_table(records: Sequence[TrialRecord], cheapest: float, metric: Metric, scores: ScoreRange) -> pd.DataFrame:
    """A row per complete trial, and longer rung of one, in the order of ending.

    Columns: trials (complete so far), elapsed_s, hypervolume, added (to it by this end: of two trials that are as good,
    the first has added it all), origin (of the trial), rung (that ended, from 0).

    Args:
        records: the trials of a study.
        cheapest: relative cost of the cheapest config of the space, where the hypervolume's cost axis begins.
        metric: what scores are.
        scores: the hypervolume's other axis.
    """
    steps = [
        (step.trials, step.elapsed_s, step.hypervolume, step.origin, step.rung)
        for step in hypervolume_over_time(records, cheapest, metric, scores)
    ]
    table = pd.DataFrame(steps, columns=["trials", "elapsed_s", "hypervolume", "origin", "rung"])
    return table.assign(added=table.hypervolume.diff().fillna(table.hypervolume))


def origins_table(progress: pd.DataFrame) -> pd.DataFrame:
    """Who added how much to the hypervolume: a row per origin, in the order of first ends.

    Columns: origin, trials, first (added by first rungs), longer (by longer ones), late (of both, what came after the
    last config that was not the sampler's had ended its first rung).

    Args:
        progress: as from `progress_table`.
    """
    late = progress.index > last_initial(progress)
    columns = {
        "trials": (progress.rung == 0).astype(int),
        "first": progress.added.where(progress.rung == 0, 0.0),
        "longer": progress.added.where(progress.rung > 0, 0.0),
        "late": progress.added.where(late, 0.0),
    }
    return progress[["origin"]].assign(**columns).groupby("origin", sort=False).sum().reset_index()


def last_initial(progress: pd.DataFrame) -> int:
    """The row of a `progress_table` where the last config that was not the sampler's had ended; -1: there was none."""
    initial = progress.index[(progress.origin != "sampler") & (progress.rung == 0)]
    return int(initial[-1]) if len(initial) else -1


def rows_of(table: pd.DataFrame) -> Iterator[Any]:
    """The rows as named tuples; which types they hold is known to whoever reads them."""
    yield from table.itertuples()


def mark(precision: Precision) -> str:
    """The short form of a precision that `MARKS_EXPLAINED` explains."""
    return "f" if precision.is_float else f"{precision.bits}{_MARKS[precision.quantizer]}"
