"""How well a proxy ranks configs: Kendall's tau against what training makes of them, stratum by stratum of cost.

Proxies are sensitivities, start scores, the additive model, and, where final trainings are what counts, the trials.

Over all trials nearly every proxy looks good, because whatever costs more is better. What a search needs is the
order among configs of about equal cost, so the trials are cut into strata of equal size by cost and each has its tau.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from math import isfinite, nan
from types import MappingProxyType

import numpy as np
import pandas as pd

from mpsearch.errors import PrecisionError, RunError, nearest
from mpsearch.metric import Metric
from mpsearch.record import FinalRecord, TrialRecord
from mpsearch.space.space import SearchSpace
from mpsearch.warmstart.additive import LEAST, AdditiveModel, Design, Scores
from mpsearch.warmstart.table import SensitivityTable

ALL = "all"
SCORES = ("quality", "before", "halfway")  # proxies of which more is better
LEAST_RANKED = 3  # trials in a stratum that has a tau


def trials_frame(
    records: Sequence[TrialRecord],
    metric: Metric,
    tables: Sequence[SensitivityTable] = (),
    foreseen: Mapping[int, float] = MappingProxyType({}),
    finals: Sequence[FinalRecord] = (),
) -> pd.DataFrame:
    """A row per complete trial: `cost`, `quality`, `final` (mean quality on test), and what might foretell them.

    Columns beside these: `before` and `halfway`, the qualities before and in the middle of the fine-tune (NaN where
    that was not scored); `rung N`, after a rung of N steps, the divergence (or quality, negated); `start` and
    `divergence`, from the float network before and after it; `additive`, that after it as `foreseen` has it by trial
    number; for each table, the sum of the sensitivities, by proxy.
    """
    rows = []
    tests = pd.Series([metric.quality(f.test) for f in finals], dtype=float).groupby([f.number for f in finals]).mean()
    for record in records:
        if record.state != "complete" or record.score is None:
            continue
        row = {"cost": record.cost, "quality": metric.quality(record.score), "before": nan, "halfway": nan}
        if len(record.curve) > 1 and record.curve[0][0] == 0:
            row["before"] = metric.quality(record.curve[0][1])
        if len(record.curve) == 3 and not record.rungs:
            row["halfway"] = metric.quality(record.curve[1][1])
        for rung in record.rungs:
            if rung.score is not None:
                worse = -metric.quality(rung.score) if rung.divergence is None else rung.divergence
                row[f"rung {rung.steps}"] = worse
        row["start"] = nan if record.start_divergence is None else record.start_divergence
        row["divergence"] = nan if record.divergence is None else record.divergence
        row["additive"] = foreseen.get(record.number, nan)
        row["final"] = tests.get(record.number, nan)
        for table in tables:
            try:
                row[table.proxy] = table.total(record.config)
            except PrecisionError:  # a config from elsewhere, with precisions that the space does not have
                row[table.proxy] = nan
        rows.append(row)
    columns = ["cost", "quality", "final", "before", "halfway", "start", "additive", "divergence"]
    columns += sorted({name for row in rows for name in row if name.startswith("rung ")}, key=lambda n: int(n[5:]))
    columns += [table.proxy for table in tables]
    return pd.DataFrame(rows, columns=columns).astype(float)


def foreseen_divergence(
    records: Sequence[TrialRecord],
    starts: Scores,
    space: SearchSpace,
    table: SensitivityTable | None = None,
) -> dict[int, float]:
    """Trial number -> what the additive model makes of it, rising with its divergence, from all *other* configs.

    In the model's own unit. Empty where there are too few scores.
    """
    known = [r for r in records if r.state == "complete" and r.divergence is not None and space.contains(r.config)]
    trials = [(r.config, r.divergence) for r in known if r.divergence is not None]
    if not trials or len(trials) + len(starts) < LEAST or not space.free:
        return {}
    model = AdditiveModel(Design(space, table), starts, trials)
    return dict(zip((r.number for r in known), model.left_out().tolist(), strict=True))


def proxy_tau(
    trials: pd.DataFrame,
    proxies: Sequence[str],
    *,
    against: str = "quality",
    more_is_better: Collection[str] = (),
    strata: int = 4,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int,
) -> pd.DataFrame:
    """Kendall's tau-b of each proxy against `against` in each stratum of cost, and over all trials.

    1: the proxy puts the trials in that order; 0: it knows nothing; -1: it reverses them. The interval
    is that of the percentile bootstrap over trials; with few trials or many ties it is wide, or NaN.

    Args:
        trials: a row per trial; columns `cost`, `against` and the proxies. Rows without both, or without the proxy in
            question, are left out.
        proxies: columns; less is better, as with sensitivities.
        against: the column that is to be foretold; more is better.
        more_is_better: those of them where more is better, such as the quality before fine-tuning.
        strata: how many, of equal numbers of trials (ties in cost stay together, so there may be fewer).
        resamples: of the bootstrap; 0: no interval.
        confidence: that the interval covers the tau of many such trials.
        seed: of the bootstrap.

    Returns:
        A row per stratum, `all` first, and proxy; columns: stratum (`all`, or its costs as `0.1-0.25`), proxy, tau, n
        (trials), low, high. NaN where fewer than three trials or no differences leave nothing to rank.

    Raises:
        RunError: a column is missing.
    """
    for column in ("cost", against, *proxies):
        if column not in trials.columns:
            raise RunError(f"the table of trials has no column '{column}': {nearest(column, map(str, trials.columns))}")
    random = np.random.default_rng(seed)
    known = trials[np.isfinite(trials["cost"].astype(float)) & np.isfinite(trials[against].astype(float))]
    rows = []
    for name, stratum in [(ALL, known), *_strata(known, strata)]:
        for proxy in proxies:
            usable = stratum[np.isfinite(stratum[proxy].astype(float))]
            quality = usable[against].to_numpy(float)
            value = usable[proxy].to_numpy(float) * (1 if proxy in more_is_better else -1)
            low, high = _interval(quality, value, resamples, confidence, random)
            rows.append((name, proxy, _tau(quality, value), len(usable), low, high))
    return pd.DataFrame(rows, columns=["stratum", "proxy", "tau", "n", "low", "high"])


def _strata(trials: pd.DataFrame, count: int) -> list[tuple[str, pd.DataFrame]]:
    if trials.empty or count < 2:
        return []
    which = pd.qcut(trials["cost"].astype(float), count, labels=False, duplicates="drop")
    groups = [group for _, group in trials.groupby(which)]
    return [(f"{group['cost'].min():.3g}-{group['cost'].max():.3g}", group) for group in groups]


def _tau(quality: np.ndarray, value: np.ndarray) -> float:
    if len(quality) < LEAST_RANKED or np.ptp(quality) == 0 or np.ptp(value) == 0:
        return nan
    from scipy.stats import kendalltau  # here, because it takes a second to import, and most runs rank nothing

    return float(kendalltau(quality, value).statistic)


def _tau_of_signs(one: np.ndarray, other: np.ndarray) -> float:
    """Tau-b from the signs of all differences, `(n, n)` each; NaN where one has none: a tenth of scipy's time."""
    pairs = np.abs(one).sum() * np.abs(other).sum()
    return float((one * other).sum() / np.sqrt(pairs)) if pairs else nan


def _interval(
    quality: np.ndarray, value: np.ndarray, resamples: int, confidence: float, random: np.random.Generator
) -> tuple[float, float]:
    n = len(quality)
    drawn = random.integers(n, size=(resamples, n)) if n >= LEAST_RANKED else np.empty((0, n), int)
    signs = [np.sign(np.subtract.outer(x, x)) for x in (quality, value)]
    taus = [tau for rows in drawn if isfinite(tau := _tau_of_signs(*(sign[np.ix_(rows, rows)] for sign in signs)))]
    if not taus:
        return nan, nan
    low, high = np.quantile(taus, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
