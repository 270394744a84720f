"""The weights that a run keeps: of the front, of the uniform ladder, of imports and of final trainings."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from mpsearch.errors import RunError
from mpsearch.problem import Problem
from mpsearch.record import RunFolder, TrialRecord, checkpoint_path, final_path, rung_path, state_path
from mpsearch.search.front import ParetoFront, pareto_front, scores_of
from mpsearch.search.rungs import goes_on
from mpsearch.search.trial import run_trial
from mpsearch.state_dict import load_tensors, read_tensors
from mpsearch.workbench import Workbench

progress = logging.getLogger("mpsearch.progress")


class FrontWeights:
    """Keeps the weights of trials that the front has or may come to have; deletes those of all others.

    A longer rung may be worse than a shorter one. Then what the trial dominated is on the front again, and should have
    its weights there; so only a trial that is dominated by one which has ended its last rung loses them. The uniform
    ladder and imports keep theirs. Of trials that may go on to a longer rung the state of the training is kept too, and
    no older one.
    """

    def __init__(self, folder: RunFolder, records: Sequence[TrialRecord], rungs: int) -> None:
        """
        Args:
            folder: the run.
            records: of it, all.
            rungs: how many there are.
        """
        self._folder, self._metric, self._rungs = folder.checkpoints, folder.metric, rungs
        self._scores = {record.number: score for record in records for score in scores_of([record])}
        for record in records:
            self._take_over(record)
        self._place = {record.number: place for place, record in enumerate(records)}
        self._kept = {record.number: record for record in records}
        self._delete_dominated()
        states = {state_path(self._folder, r.number, len(r.rungs) - 1) for r in records if goes_on(r)}
        for path in [*self._folder.glob("trial-*.state-*"), *self._folder.glob("trial-*.rung-*")]:
            if path not in states:  # of a trial that was killed, or whose next rung is on the record
                path.unlink(missing_ok=True)

    @property
    def front(self) -> ParetoFront:
        """Of all trials: whatever is not kept is dominated by what is."""
        return self._front_of(self._kept.values())

    @property
    def scores(self) -> list[float]:
        """Of every complete trial."""
        return list(self._scores.values())

    def keep(self, record: TrialRecord) -> None:
        """Take a record in that is on the disk."""
        self._take_over(record)
        for score in scores_of([record]):
            self._scores[record.number] = score
        self._place.setdefault(record.number, len(self._place))
        self._kept[record.number] = record
        self._delete_dominated()

    def _delete_dominated(self) -> None:
        """Let go of trials that cannot be on the front any more, whatever becomes of those that may go on."""
        settled = self._front_of(record for record in self._kept.values() if self._settled(record))
        best = {trial.number for trial in settled}
        for record in list(self._kept.values()):
            complete = record.state == "complete"
            if record.number in best or (complete and record.origin in ("uniform", "import")):
                continue
            if self._settled(record) or settled.dominates(record):
                del self._kept[record.number]
                checkpoint_path(self._folder, record.number).unlink(missing_ok=True)

    def _front_of(self, trials: Iterable[TrialRecord]) -> ParetoFront:
        """Of equals it has the one that is first on the record, as the front of all records has."""
        return pareto_front(sorted(trials, key=lambda trial: self._place[trial.number]), self._metric)

    def _settled(self, record: TrialRecord) -> bool:
        """Whether its score stays what it is."""
        return len(record.rungs) >= self._rungs or not goes_on(record)

    def _take_over(self, record: TrialRecord) -> None:
        """Make the weights of the longest rung those of the trial, and remove the state that it went on from."""
        last = len(record.rungs) - 1
        if last > 0:
            if (path := rung_path(self._folder, record.number, last)).exists():
                path.replace(checkpoint_path(self._folder, record.number))
            state_path(self._folder, record.number, last - 1).unlink(missing_ok=True)


def trained_model(
    problem: Problem, folder: RunFolder, record: TrialRecord
) -> tuple[nn.Module, dict[str, float | None]]:
    """The quantized model of a finished trial, in eval mode, and what was measured of it by split.

    Weights are those of its final training, else of the trial; where these were not kept, the trial is run again.
    """
    workbench = Workbench(problem.task, problem.spec.trial, offers=record.config.offers, graph=problem.graph)
    finals = [f for f in folder.finals() if f.number == record.number]
    measured: dict[str, float | None] = {"val": record.score}
    if finals:
        again = f"`mpsearch finalize {folder.path}` trains it again"
        tensors: Mapping[str, Tensor] | None = read_tensors(final_path(folder.checkpoints, record.number), again)
        best = max(finals, key=lambda f: problem.metric.quality(f.val))
        measured = {"val": best.val, "test": best.test}
    else:
        if final_path(folder.checkpoints, record.number).exists():
            progress.warning("nothing is recorded of trial %d's final training: its brief one is used", record.number)
        tensors = trial_weights(folder, record)
    if tensors is not None:
        workbench.reset(record.config)
        load_tensors(workbench.model, tensors)
        return workbench.model.eval(), measured
    score = train_again(problem, folder, record, workbench)
    return workbench.model.eval(), {"val": score}


def trial_weights(folder: RunFolder, record: TrialRecord) -> dict[str, Tensor] | None:
    """The weights that a trial left at its end; None where they were not kept, or are damaged and can be made again.

    Raises:
        RunError: they are damaged, and nobody here could train the network again.
    """
    path = checkpoint_path(folder.checkpoints, record.number)
    imported = record.origin == "import"
    if not path.exists() and not imported:
        return None
    try:
        return read_tensors(path, "import the network again" if imported else "the trial is trained again")
    except RunError as error:
        if imported:
            raise
        progress.warning("%s", error)
        return None


def train_again(problem: Problem, folder: RunFolder, record: TrialRecord, workbench: Workbench) -> float | None:
    """Run a trial whose weights are gone once more, as it was run; the workbench's model has its weights then.

    Returns:
        its score now.
    """
    progress.info("trial %d is trained again: its weights were not kept, or cannot be read", record.number)
    rung = max(0, sum(r.score is not None for r in record.rungs) - 1)
    before = record.at_rung(0) if rung else None
    settings = problem.spec.trial
    return run_trial(problem.task, record.config, settings, workbench=workbench, rung=rung, before=before).score
