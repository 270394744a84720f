"""The weights that a run keeps: of the front, of the uniform ladder, of imports and of final trainings."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from safetensors.torch import load_file
from torch import nn

from mpsearch.problem import Problem
from mpsearch.record import RunFolder, TrialRecord, checkpoint_path, final_path
from mpsearch.search.front import pareto_front, scores_of
from mpsearch.search.trial import run_trial
from mpsearch.state_dict import load_tensors
from mpsearch.workbench import Workbench

logger = logging.getLogger(__name__)


class FrontWeights:
    """Keeps the weights of front trials, of the uniform ladder and of imports; deletes those of dominated trials."""

    def __init__(self, folder: RunFolder, records: Sequence[TrialRecord]) -> None:
        self._folder = folder.checkpoints
        self._metric = folder.metric
        self.front = pareto_front(records, self._metric)
        self.scores = scores_of(records)  # of every complete trial

    def keep(self, record: TrialRecord) -> None:
        """Take a record in; whatever is now dominated loses its weights."""
        self.scores += scores_of([record])
        known = {trial.number: trial for trial in (*self.front.trials, *self.front.ladder, record)}
        self.front = pareto_front(list(known.values()), self._metric)
        for number in known.keys() - {trial.number for trial in (*self.front.trials, *self.front.ladder)}:
            if known[number].origin != "import":  # nobody here could train it again
                checkpoint_path(self._folder, number).unlink(missing_ok=True)


def trained_model(
    problem: Problem, folder: RunFolder, record: TrialRecord
) -> tuple[nn.Module, dict[str, float | None]]:
    """The quantized model of a finished trial, in eval mode, and what was measured of it by split.

    Weights are those of its final training, else of the trial; where these were not kept, the trial is run again.
    """
    workbench = Workbench(problem.task, problem.spec.trial, offers=record.config.offers, graph=problem.graph)
    finals = [f for f in folder.finals() if f.number == record.number]
    final, brief = final_path(folder.checkpoints, record.number), checkpoint_path(folder.checkpoints, record.number)
    measured: dict[str, float | None] = {"val": record.score}
    if finals and final.exists():
        best = max(finals, key=lambda f: problem.metric.quality(f.val))
        brief, measured = final, {"val": best.val, "test": best.test}
    if brief.exists():
        workbench.reset(record.config)
        load_tensors(workbench.model, load_file(brief))
        return workbench.model.eval(), measured
    logger.warning("the weights of trial %d were not kept (it is not on the front): it is trained again", record.number)
    again = run_trial(problem.task, record.config, problem.spec.trial, workbench=workbench)
    return workbench.model.eval(), {"val": again.score}
