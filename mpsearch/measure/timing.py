"""How long calls take: warmed up, run in turn, repeated until the medians are known well enough."""

from __future__ import annotations

import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

WARM_UP_S = 0.1
ROUND_S = 0.003
"""A round repeats the call until it takes this long at least: shorter ones are lost in the clock."""
LEAST_ROUNDS = 15
INTERVAL = 0.05
"""Width of the 95 % interval of the median, as a share of it, at which a measurement ends."""
MOST_S = 4.0
"""Seconds after which a measurement ends all the same; its MAD says how well it is known."""

Clock = Callable[[], float]


@dataclass(frozen=True)
class Timing:
    """What a call takes, in microseconds, over `n` rounds."""

    median_us: float
    mad_us: float  # median of the absolute deviations from the median
    n: int

    @property
    def interval(self) -> float:
        """Width of the 95 % interval of the median, as a share of it: 2 * 1.96 * 1.253 * 1.4826 MAD / sqrt(n)."""
        return 2 * 1.96 * 1.253 * 1.4826 * self.mad_us / math.sqrt(self.n) / self.median_us if self.median_us else 0.0


def clock_of(threads: int) -> tuple[Clock, str]:
    """The clock for so many threads, and what it is called.

    One thread is measured in processor time, which other processes of the machine do not add to; several in wall time.
    """
    return (time.process_time, "processor time") if threads == 1 else (time.perf_counter, "wall time")


def timed_in_turn(calls: Sequence[Callable[[], object]], clock: Clock, most_s: float = MOST_S) -> list[Timing]:
    """Measure calls that are compared with each other: round by round, so that all see the machine as it changes.

    Args:
        calls: what is measured.
        clock: seconds.
        most_s: when to end at the latest, by the clock, for each of them.
    """
    repeats = [_repeats(call, clock) for call in calls]
    rounds: list[list[float]] = [[] for _ in calls]
    began = clock()
    while True:
        for call, count, durations in zip(calls, repeats, rounds, strict=True):
            start = clock()
            for _ in range(count):
                call()
            durations.append((clock() - start) / count * 1e6)
        timings = [summary(durations) for durations in rounds]
        enough = all(timing.n >= LEAST_ROUNDS and timing.interval < INTERVAL for timing in timings)
        if enough or (clock() - began > most_s * len(calls) and timings[0].n >= 3):
            return timings


def _repeats(call: Callable[[], object], clock: Clock) -> int:
    """Warm a call up; returns how often it fits into a round."""
    began = clock()
    count = 0
    while clock() - began < WARM_UP_S or count < 2:
        call()
        count += 1
    return max(1, round(ROUND_S * count / max(clock() - began, 1e-9)))


def summary(rounds: list[float]) -> Timing:
    """Median and MAD of rounds, in microseconds.

    >>> summary([1.0, 2.0, 3.0, 10.0, 2.0]).median_us
    2.0
    """
    median = statistics.median(rounds)
    return Timing(median, statistics.median(abs(us - median) for us in rounds), len(rounds))


def device_name() -> str:
    """The processor of this machine, in words."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), name)
    except OSError:
        pass
    return f"{name}, {os.cpu_count()} cores"
