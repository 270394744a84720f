"""How well a proxy ranks configs: Kendall's tau against the fine-tuned score, stratum by stratum of cost.

Over all trials nearly every proxy looks good, because whatever costs more is better. What a search needs is the
order among configs of about equal cost, so the trials are cut into strata of equal size by cost and each has its tau.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import isfinite, nan

import numpy as np
import pandas as pd
from scipy.stats import kendalltau

from mpsearch.errors import PrecisionError, RunError, nearest
from mpsearch.metric import Metric
from mpsearch.record import TrialRecord
from mpsearch.warmstart.table import SensitivityTable

ALL = "all"
SCORES = ("before", "halfway")  # proxies of which more is better
_LEAST = 3  # trials in a stratum that has a tau


def trials_frame(
    records: Sequence[TrialRecord], metric: Metric, tables: Sequence[SensitivityTable] = ()
) -> pd.DataFrame:
    """A row per complete trial: `cost`, `quality` (`Metric.quality` of its score), and what might have foretold it.

    Columns beside these: `before` and `halfway`, the quality before and in the middle of the fine-tune; `start` and
    `divergence`, from the float network before and after it; for each table, the sum of the sensitivities, by proxy.
    """
    rows = []
    for record in records:
        if record.state != "complete" or record.score is None:
            continue
        curve = dict(
            zip(("before", "halfway"), (metric.quality(score) for _, score in record.curve[:-1]), strict=False)
        )
        row = {"cost": record.cost, "quality": metric.quality(record.score), "before": nan, "halfway": nan} | curve
        row["start"] = nan if record.start_divergence is None else record.start_divergence
        row["divergence"] = nan if record.divergence is None else record.divergence
        for table in tables:
            try:
                row[table.proxy] = table.total(record.config)
            except PrecisionError:  # a config from elsewhere, with precisions that the space does not have
                row[table.proxy] = nan
        rows.append(row)
    columns = ["cost", "quality", "before", "halfway", "start", "divergence", *(table.proxy for table in tables)]
    return pd.DataFrame(rows, columns=columns).astype(float)


def proxy_tau(
    trials: pd.DataFrame,
    proxies: Sequence[str],
    *,
    more_is_better: Collection[str] = (),
    strata: int = 4,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int,
) -> pd.DataFrame:
    """Kendall's tau-b of each proxy against quality in each stratum of cost, and over all trials.

    1: the proxy puts the trials in the order of their quality; 0: it knows nothing; -1: it reverses them. The interval
    is that of the percentile bootstrap over trials; with few trials or many ties it is wide, or NaN.

    Args:
        trials: a row per trial; columns `cost`, `quality` and the proxies. Rows without both, or without the proxy in
            question, are left out.
        proxies: columns; less is better, as with sensitivities.
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
    for column in ("cost", "quality", *proxies):
        if column not in trials.columns:
            raise RunError(f"the table of trials has no column '{column}': {nearest(column, map(str, trials.columns))}")
    random = np.random.default_rng(seed)
    known = trials[np.isfinite(trials["cost"].astype(float)) & np.isfinite(trials["quality"].astype(float))]
    rows = []
    for name, stratum in [(ALL, known), *_strata(known, strata)]:
        for proxy in proxies:
            usable = stratum[np.isfinite(stratum[proxy].astype(float))]
            quality = usable["quality"].to_numpy(float)
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
    if len(quality) < _LEAST or np.ptp(quality) == 0 or np.ptp(value) == 0:
        return nan
    return float(kendalltau(quality, value).statistic)


def _interval(
    quality: np.ndarray, value: np.ndarray, resamples: int, confidence: float, random: np.random.Generator
) -> tuple[float, float]:
    n = len(quality)
    drawn = random.integers(n, size=(resamples, n)) if n >= _LEAST else np.empty((0, n), int)
    taus = [tau for rows in drawn if isfinite(tau := _tau(quality[rows], value[rows]))]
    if not taus:
        return nan, nan
    low, high = np.quantile(taus, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
