"""An additive model of divergence: what each choice of each slot adds to it, learned from configs that were scored.

    g(D(x)) = m + sum over slots s of  beta_s(x_s),      g = sqrt or log
    beta_s(c) = e_s(c) (1 + u_t + u_s + u_sc)
    e_s(c) = a_t sqrt(h_s(c)) + b_k n^-bits(c)          (t: the tensor, weight or input; k: t and the quantizer type)

h is a sensitivity (`table.py`), n^-bits the noise of a quantizer (n = 2: its amplitude, n = 4: its power). e is what is
expected, with a and b >= 0 fitted to all scores, so that what is measured on some slots says something of all. Around
it a tensor, a slot and a choice have shares of their own, u, with normal priors around zero: Bayesian ridge regression,
whose posterior is normal and exact. As they are shares, a choice that nobody has tried stays as bad as its noise makes
expect. Which g and n, how much is a slot's own and how much is noise, is decided by leaving out each score in turn: the
predictive density of D, which takes g into account, is the largest.

Two fidelities, as in Kennedy and O'Hagan (Biometrika 87, 2000): g(D) after a trial is r g(D at the start) + m' +
another such sum that is small, with r learned where both are known. So hundreds of start scores say what the slots do,
and a dozen trials what training makes of it.

More bits never do more harm: a draw from the posterior is projected on effects that fall with the bits of a type
(isotonic regression; Dunson and Neelon, Biometrics 59, 2003). Such a draw is a table of effects, whose best config
within a budget an integer program finds exactly (`allocate.py`): Thompson sampling.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import isotonic_regression, nnls
from scipy.sparse import csr_array, hstack

from mpsearch.precision import PrecisionConfig
from mpsearch.record import PrescreenRecord
from mpsearch.space.space import SearchSpace, Slot
from mpsearch.warmstart.table import SensitivityTable

Floats = NDArray[np.float64]
Link = Literal["sqrt", "log", "identity"]
Scores = Sequence[tuple[PrecisionConfig, float]]
"""(config, divergence in nats)."""

BASES = (2, 4)
LEAST = 8  # scores that a model is made of
FLOOR = 1e-6  # nats: a smaller divergence counts as this

TENSOR = 0.5  # prior deviation of a tensor's share u_t
OWN = (0.15, 0.3, 0.6)  # of a slot's, u_s; half of it of a choice's, u_sc
NOISE = (0.001, 0.01, 0.1)  # variance of the noise, as a share of that of the scores
TRAINED = 0.1  # prior variances after training, as a share of those before it
TRAINED_NOISE = (0.02, 0.1, 0.4)  # variance of its noise, as a share of that of the trials' scores


@dataclass(frozen=True)
class Setting:
    """What cross-validation chooses between."""

    link: Link
    base: int  # n of the module's top
    own: float
    noise: float


class Design:
    """The columns of the model for a space: a row of them for each choice of each slot that leaves one.

    Args:
        space: the configs there are.
        table: a sensitivity for every choice; without one the model has the noise alone.
    """

    def __init__(self, space: SearchSpace, table: SensitivityTable | None = None) -> None:
        self.slots = space.free
        self.first = np.cumsum([0, *(len(slot.choices) for slot in self.slots)])
        self._index = [{choice: i for i, choice in enumerate(slot.choices)} for slot in self.slots]
        self._harm = None if table is None else np.concatenate([_harms(slot, table) for slot in self.slots])
        self._choices = [(i, slot, choice) for i, slot in enumerate(self.slots) for choice in slot.choices]
        self._chosen: dict[PrecisionConfig, NDArray[np.int64]] = {}  # every model is made of much the same configs

    def rows(self, configs: Sequence[PrecisionConfig]) -> csr_array:
        """Which choices each config makes, `(n, choices)` of zeros and ones."""
        chosen = np.concatenate([np.empty(0, np.int64), *map(self._choices_of, configs)])
        ends = np.arange(len(configs) + 1) * len(self.slots)
        return csr_array((np.ones(len(chosen)), chosen, ends), shape=(len(configs), int(self.first[-1])))

    def _choices_of(self, config: PrecisionConfig) -> NDArray[np.int64]:
        """The columns of the choices that a config makes, `(slots,)`."""
        if config not in self._chosen:
            self._chosen[config] = np.array(
                [
                    first + index[getattr(config[slot.layers[0]], slot.tensor)]
                    for slot, first, index in zip(self.slots, self.first, self._index, strict=False)
                ],
                np.int64,
            )
        return self._chosen[config]

    def expected(self, base: int) -> Floats:
        """What e is a sum of, with weights that are learned, `(choices, k)`."""
        noise = np.array([0.0 if c.is_float else float(base) ** -c.bits for _, _, c in self._choices])
        parts = [_by_group(noise, [(slot.tensor, c.quantizer) for _, slot, c in self._choices])]
        if self._harm is not None:
            parts.append(_by_group(self._harm, [slot.tensor for _, slot, _ in self._choices]))
        return np.asarray(hstack(parts).toarray())

    def columns(self, expected: Floats, own: float) -> tuple[csr_array, Floats]:
        """The columns of the shares u, `(choices, p)`, and their prior variances `(p,)`."""
        parts = [
            _by_group(expected, [slot.tensor for _, slot, _ in self._choices]),
            _by_group(expected, [i for i, _, _ in self._choices]),
            _by_group(expected, list(range(len(expected)))),
        ]
        deviations = (TENSOR, own, own / 2)
        prior = [np.full(part.shape[1], d**2) for part, d in zip(parts, deviations, strict=True)]
        return csr_array(hstack(parts)), np.concatenate(prior)

    def split(self, effects: Floats) -> list[Floats]:
        """Effects `(choices,)` slot by slot, made to fall with the bits of each type."""
        return [
            _falling(slot, effects[a:b]) for slot, a, b in zip(self.slots, self.first, self.first[1:], strict=False)
        ]


@dataclass(frozen=True)
class Effects:
    """What each choice of each free slot adds to g(D): one table of them, drawn or expected."""

    values: Mapping[str, Floats]  # by slot name, in the order of its choices
    intercept: float
    link: Link
    slots: tuple[Slot, ...]

    def __call__(self, config: PrecisionConfig) -> float:
        """g(D) of a config."""
        chosen = (
            self.values[slot.name][slot.choices.index(getattr(config[slot.layers[0]], slot.tensor))]
            for slot in self.slots
        )
        return self.intercept + math.fsum(chosen)

    def of_slots(self, space: SearchSpace) -> list[list[float]]:
        """For each slot of the space and choice its effect, as an integer program takes it."""
        return [
            self.values[slot.name].tolist() if slot.name in self.values else [0.0] * len(slot.choices)
            for slot in space.slots
        ]


def start_scores(records: Sequence[PrescreenRecord]) -> list[tuple[PrecisionConfig, float]]:
    """Each prescreened config with its start score, where that is a number: on the batches that all were scored on."""
    return [(r.config, r.divergence) for r in records if r.divergence is not None and r.source != "again"]


class AdditiveModel:
    """The model of the module's top, fitted.

    Args:
        design: of the space.
        starts: start scores.
        trials: divergences after trials; where there are any, effects are those after a trial.
        setting: how the scores are modelled, as an earlier model chose it; default: chosen by cross-validation.
        links: to choose between. `identity` is for scores that are no divergences.

    Raises:
        ValueError: fewer than `LEAST` finite scores in all.
    """

    def __init__(
        self,
        design: Design,
        starts: Scores,
        trials: Scores = (),
        setting: Setting | None = None,
        links: Sequence[Link] = ("sqrt", "log"),
    ) -> None:
        starts, trials = ([(c, d) for c, d in scores if math.isfinite(d)] for scores in (starts, trials))
        if len(starts) + len(trials) < LEAST:
            raise ValueError(f"an additive model needs {LEAST} scores, got {len(starts) + len(trials)}")
        self.scores = len(starts) + len(trials)
        self._design = design
        alone = len(starts) < LEAST  # too few of them: the trials are all there is
        low, high = (trials, []) if alone else (starts, trials)
        self._rows = [design.rows([config for config, _ in scores]) for scores in (low, high)]
        self._divergence = [np.array([divergence for _, divergence in scores]) for scores in (low, high)]
        self.setting = setting or self._choose(links)
        self._fit()

    def draw(self, random: np.random.Generator, temperature: float = 1.0) -> Effects:
        """Effects from the posterior, at `temperature` times their distance from the expected ones."""
        return self._effects(random, temperature)

    def mean(self) -> Effects:
        """The expected effects."""
        return self._effects(np.random.default_rng(0), 0.0)

    def left_out(self) -> Floats:
        """g(D) of each trial as foreseen from all scores of *other* configs, `(trials,)`, in the order of the trials.

        Where there are no trials, or no start scores, of each score.
        """
        low, high = self._rows
        target, offset = (high, low.shape[0]) if high.shape[0] else (low, 0)
        same = (low @ target.T).toarray() >= len(self._design.slots) - 0.5  # (starts, trials): the same config
        inverse = cho_solve(self._factor, np.eye(len(self._residual)))
        solved = inverse @ self._residual
        foreseen = np.empty(target.shape[0])
        for i in range(target.shape[0]):
            out = np.unique([*np.flatnonzero(same[:, i]), offset + i])
            error = np.linalg.solve(inverse[np.ix_(out, out)], solved[out])
            foreseen[i] = self._residual[offset + i] - error[np.searchsorted(out, offset + i)]
        return np.asarray(self._centre + self._scale * (foreseen + self._foreseen[offset:] + self._shift[offset:]))

    # ------------------------------------------------------------------------------------------------------ fitting

    def _choose(self, links: Sequence[Link]) -> Setting:
        best, best_density = None, -math.inf
        for link, base in product(links, BASES):
            y, slope = _linked(self._divergence[0], link)
            scale = float(y.std()) or 1.0
            z = (y - y.mean()) / scale
            expected = self._expected(z, base)
            left = z - self._centred(0, expected)
            for own in OWN:
                features, prior = self._features(0, expected, own)
                kernel = (features * prior) @ features.T
                for noise in NOISE:
                    density = _left_out_density(kernel, left, noise) + float(np.log(slope / scale).sum())
                    if density > best_density:
                        best, best_density = Setting(link, base, own, noise), density
        assert best is not None
        return best

    def _expected(self, z: Floats, base: int) -> Floats:
        """e of each choice, `(choices,)`: the weights, none below zero, that fit the scores best."""
        parts = self._design.expected(base)
        sums = self._rows[0] @ parts
        size = np.maximum(sums.std(axis=0), 1e-12)
        little = 1e-3 * len(z)  # ridge: a part that the scores do not tell from others is not left out altogether
        left = np.vstack([(sums - sums.mean(axis=0)) / size, math.sqrt(little) * np.eye(len(size))])
        weights, _ = nnls(left, np.concatenate([z, np.full(len(size), math.sqrt(little) / len(size))]))
        return np.asarray(parts @ (weights / size))

    def _centred(self, fidelity: int, per_choice: Floats) -> Floats:
        """The sum over the choices of each config of a fidelity, less the mean of the lower one."""
        first = self._rows[0] @ per_choice
        return np.asarray(self._rows[fidelity] @ per_choice - first.mean(axis=0))

    def _features(self, fidelity: int, expected: Floats, own: float) -> tuple[Floats, Floats]:
        """The columns `(n, p)` of a fidelity's configs, centred, and the prior variances `(p,)`."""
        columns, prior = self._design.columns(expected, own)
        first, rows = self._rows[0] @ columns, self._rows[fidelity] @ columns
        return rows.toarray() - first.mean(axis=0), prior

    def _fit(self) -> None:
        """Condition on all scores, which are put in units of the spread of the lower fidelity."""
        setting = self.setting
        y, _ = _linked(self._divergence[0], setting.link)
        self._centre, self._scale = float(y.mean()), float(y.std()) or 1.0
        z = (y - self._centre) / self._scale
        self._prior_mean = self._expected(z, setting.base)
        self._low, self._prior = low, prior = self._features(0, self._prior_mean, setting.own)
        self._foreseen = self._centred(0, self._prior_mean)
        self._residual = z - self._foreseen
        self._noise = np.full(len(z), setting.noise)
        kernel = (low * prior) @ low.T
        self._factor = cho_factor(kernel + np.diag(self._noise))
        self._high, self._ratio, self._shift = low[:0], 1.0, np.zeros(len(z))
        self._trained = TRAINED * prior
        if len(self._divergence[1]):
            self._learn_training(kernel)

    def _learn_training(self, kernel: Floats) -> None:
        """Condition on the trials too: how their scores follow from those at the start, and what is left."""
        low, prior, z = self._low, self._prior, self._residual
        self._high, _ = high, _ = self._features(1, self._prior_mean, self.setting.own)
        trained, _ = _linked(self._divergence[1], self.setting.link)
        t = (trained - self._centre) / self._scale
        expected = self._centred(1, self._prior_mean)
        foreseen = expected + (high * prior) @ low.T @ cho_solve(self._factor, z)
        self._ratio = _slope(foreseen, t)
        shift = float((t - self._ratio * foreseen).mean())
        cross = self._ratio * ((low * prior) @ high.T)
        own = (high * (self._ratio**2 * prior + self._trained)) @ high.T
        both = np.block([[kernel, cross], [cross.T, own]])
        self._residual = residual = np.concatenate([z, t - shift - self._ratio * expected])
        self._shift = np.concatenate([np.zeros(len(z)), np.full(len(t), shift)])
        self._foreseen = np.concatenate([self._foreseen, self._ratio * expected])
        best, begun = -math.inf, self._noise
        for share in TRAINED_NOISE:
            noise = np.concatenate([begun, np.full(len(t), share * max(float(t.var()), 1e-6))])
            factor = cho_factor(both + np.diag(noise))
            density = -float(0.5 * residual @ cho_solve(factor, residual) + np.log(np.diag(factor[0])).sum())
            if density > best:
                best, self._factor, self._noise = density, factor, noise

    def _effects(self, random: np.random.Generator, temperature: float) -> Effects:
        """A draw from the prior, with what the scores say of it put right; `temperature` scales the draw."""
        columns, _ = self._design.columns(self._prior_mean, self.setting.own)
        start, change = (random.normal(size=len(v)) * np.sqrt(v) for v in (self._prior, self._trained))
        noise = random.normal(size=len(self._noise)) * np.sqrt(self._noise)
        said = np.concatenate([self._low @ start, self._high @ (self._ratio * start + change)]) + noise
        start, change = temperature * start, temperature * change
        solved = cho_solve(self._factor, self._residual - temperature * said)
        low, high = solved[: len(self._low)], solved[len(self._low) :]
        start = start + self._prior * (self._low.T @ low + self._ratio * (self._high.T @ high))
        change = change + self._trained * (self._high.T @ high)
        effects, shift = self._prior_mean + columns @ start, 0.0
        if len(self._high):
            effects, shift = self._ratio * effects + columns @ change, float(self._shift[-1])
        values = self._design.split(self._scale * effects)
        centre = float((self._rows[0] @ np.concatenate(values)).mean())
        return Effects(
            {slot.name: value for slot, value in zip(self._design.slots, values, strict=True)},
            self._centre + self._scale * shift - centre,
            self.setting.link,
            self._design.slots,
        )


def unlinked(value: float, link: Link) -> float:
    """D of g(D), nats."""
    if link == "identity":
        return value
    return max(value, 0.0) ** 2 if link == "sqrt" else math.exp(min(value, 50.0))


def _linked(divergence: Floats, link: Link) -> tuple[Floats, Floats]:
    """g(D) and g'(D)."""
    if link == "identity":
        return divergence, np.ones_like(divergence)
    d = np.maximum(divergence, FLOOR)
    return (np.sqrt(d), 0.5 / np.sqrt(d)) if link == "sqrt" else (np.log(d), 1 / d)


def _left_out_density(kernel: Floats, z: Floats, noise: float) -> float:
    """The summed log density of each score as foreseen from the others (Sundararajan and Keerthi, 2001: in one go)."""
    inverse = cho_solve(cho_factor(kernel + noise * np.eye(len(z))), np.eye(len(z)))
    variance = 1 / np.diag(inverse)
    error = (inverse @ z) * variance
    return float(np.sum(-0.5 * np.log(variance) - 0.5 * error**2 / variance))


def _slope(x: Floats, y: Floats) -> float:
    """The slope of y over x, drawn towards 1 as by two more points, between 0.2 and 1.5."""
    x, y = x - x.mean(), y - y.mean()
    more = 2 * max(float((x**2).mean()), 1e-6)
    return float(np.clip((x @ y + more) / (x @ x + more), 0.2, 1.5))


def _harms(slot: Slot, table: SensitivityTable) -> Floats:
    """sqrt of the summed sensitivity of each choice; one that breaks the network counts as the worst of the others."""
    harm = np.array([sum(table.of(layer, slot.tensor, c) for layer in slot.layers) for c in slot.choices])
    finite = harm[np.isfinite(harm)]
    harm = np.where(np.isfinite(harm), harm, finite.max() if len(finite) else 0.0)
    return np.asarray(np.sqrt(np.maximum(harm, 0.0)))


def _by_group(values: Floats, groups: Sequence[object]) -> csr_array:
    """A column for each group, with the values of its members, `(choices, groups)`."""
    at = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    columns = [at[group] for group in groups]
    return csr_array((values, (np.arange(len(values)), columns)), shape=(len(values), len(at)))


def _falling(slot: Slot, effects: Floats) -> Floats:
    """The nearest effects that fall with the bits of each type."""
    fallen = effects.copy()
    types: dict[tuple[str, str | None], list[int]] = {}
    for i, choice in enumerate(slot.choices):  # in order of bits
        types.setdefault((choice.quantizer, choice.granularity), []).append(i)
    for members in types.values():
        fallen[members] = isotonic_regression(effects[members], increasing=False).x
    return fallen
