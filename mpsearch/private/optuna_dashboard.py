"""optuna-dashboard 0.21: notes of trials that have ended; its public `save_note` takes none."""

from __future__ import annotations

from optuna import Study
from optuna.trial import FrozenTrial

from mpsearch.private.optuna import storage_of, study_id, trial_id


def replace_trial_note(study: Study, trial: FrozenTrial, note: str, ours: str) -> None:
    """Write a trial's note, unless somebody else has written it.

    Args:
        study: that the dashboard shows.
        trial: of it.
        note: in Markdown.
        ours: what our notes begin with.
    """
    from optuna_dashboard import _note

    storage, number = storage_of(study), study_id(study)
    held = _note.get_note_from_system_attrs(storage.get_study_system_attrs(number), trial_id(trial))
    if not held["body"] or held["body"].startswith(ours):
        _note.save_note_with_version(storage, number, trial_id(trial), held["version"] + 1, note)
