"""Wall time and CPU time of a piece of work."""

from __future__ import annotations

import time


class Stopwatch:
    """`with Stopwatch() as watch: ...`, then `watch.wall_s` and `watch.cpu_s` (of the process, all its threads)."""

    wall_s: float
    cpu_s: float

    def __enter__(self) -> Stopwatch:
        self._began = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall_s, self.cpu_s = time.perf_counter() - self._began[0], time.process_time() - self._began[1]
