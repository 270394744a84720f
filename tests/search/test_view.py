"""The Optuna study that shows a run: all of its trials, each once, none RUNNING."""

import math
from dataclasses import replace

import optuna
import pytest
from drive import make_space, relative_cost, truth

from mpsearch.errors import RunError
from mpsearch.metric import TOP1
from mpsearch.precision import LayerPrecision, PrecisionConfig
from mpsearch.record import RunFolder, TrialRecord, WallTime
from mpsearch.search.view import MOST_WAITING, open_view

SPACE = make_space(3)
CONFIGS = SPACE.ladder()


def complete(number: int, config: PrecisionConfig, **changes) -> TrialRecord:
    record = TrialRecord(config, "complete", truth(config), relative_cost(config), number=number, origin="uniform")
    return replace(record, wall=WallTime(1.0, 2.0, 3.0), started_s=1e9, **changes)


RECORDS = [
    complete(0, CONFIGS[1]),
    complete(2, CONFIGS[4]),
    TrialRecord(CONFIGS[2], "failed", reason="ValueError: no", number=1, origin="sampler"),
    replace(complete(3, CONFIGS[5]), state="stopped", reason="dominated"),
    complete(4, PrecisionConfig.uniform(SPACE.layers, LayerPrecision.parse("shift:4", "float")), cost=0.75),
]


@pytest.fixture
def folder(tmp_path):
    return RunFolder.create(tmp_path / "run", "name: a\n", metric=TOP1)


@pytest.fixture(params=["sqlite", "journal"])
def storage(request):
    return request.param


def stored(folder: RunFolder, storage: str) -> optuna.Study:
    """The study as another process sees it."""
    if storage == "sqlite":
        where = optuna.storages.RDBStorage(f"sqlite:///{folder.study_db}")
    else:
        where = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(folder.study_journal)))
    return optuna.load_study(study_name="a", storage=where)


def test_view_shows_what_is_recorded(folder, storage):
    view = open_view(storage, folder, "a", SPACE, TOP1, 0.7)
    for record in RECORDS:
        view.add(record)
    study = stored(folder, storage)
    first, failed, _, stopped, foreign = study.trials
    assert study.metric_names == ["top1 on val (share)", "cost (log2 of the reference's)"]
    assert [d.name for d in study.directions] == ["MAXIMIZE", "MINIMIZE"]
    assert [t.state.name for t in study.trials] == ["COMPLETE", "FAIL", "COMPLETE", "PRUNED", "COMPLETE"]
    assert [t.user_attrs["number"] for t in study.trials] == [0, 1, 2, 3, 4]
    assert first.values == [truth(CONFIGS[1]), math.log2(7 / 8)]
    assert first.params == SPACE.params_of(CONFIGS[1])
    assert first.user_attrs["config"] == CONFIGS[1].digest
    assert first.duration.total_seconds() == 6
    assert first.datetime_start.timestamp() == 1e9
    assert first.constraints["budget"] == pytest.approx(math.log2(7 / 8 / 0.7))
    assert first.system_attrs["constraints"] == [first.constraints["budget"]]  # what optuna-dashboard reads
    assert failed.user_attrs["reason"] == "ValueError: no"
    assert stopped.user_attrs["cost / reference"] == relative_cost(CONFIGS[5])
    assert foreign.params == {}  # not of the space
    assert [t.user_attrs["number"] for t in study.best_trials] == [2]  # the only one within the budget


def test_view_that_fell_behind_catches_up_and_shows_nothing_twice(folder, storage):
    open_view(storage, folder, "a", SPACE, TOP1, None, RECORDS[:2])
    open_view(storage, folder, "a", SPACE, TOP1, None, RECORDS[1:])
    open_view(storage, folder, "a", SPACE, TOP1, None, RECORDS)
    assert [t.user_attrs["number"] for t in stored(folder, storage).trials] == [0, 2, 1, 3, 4]


def test_view_without_a_budget_has_no_constraint(folder):
    open_view("sqlite", folder, "a", SPACE, TOP1, None, RECORDS)
    assert all(t.constraints == {} for t in stored(folder, "sqlite").trials)


def test_sqlite_is_one_file_when_the_view_is_closed(folder, tmp_path):
    """A person who copies it while the process lives has all of it: nothing is left in SQLite's log."""
    open_view("sqlite", folder, "a", SPACE, TOP1, None, RECORDS).close()
    copy = tmp_path / "copied.db"
    copy.write_bytes(folder.study_db.read_bytes())
    assert [path.name for path in folder.study_db.parent.glob("study.db*")] == ["study.db"]
    study = optuna.load_study(study_name="a", storage=f"sqlite:///{copy}")
    assert len(study.trials) == len(RECORDS)


def test_no_view_is_no_view(folder):
    assert open_view("none", folder, "a", SPACE, TOP1) is None


def test_shared_database_keeps_runs_of_one_study_apart(tmp_path):
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    folders = [RunFolder.create(tmp_path / name, "", metric=TOP1) for name in "ab"]
    for folder in folders:
        open_view(url, folder, "a", SPACE, TOP1, None, RECORDS[:1])
    names = {study.study_name for study in optuna.get_all_study_summaries(url)}
    assert names == {f"a-{folder.id}" for folder in folders}


@pytest.mark.parametrize("storage", ["sqlite", "journal"])
@pytest.mark.parametrize("name", ["a?1", "a %41", "a#b", "a{b}", "{}", "é 'x\"", "a:b@c", "a;b&c"])
def test_the_view_is_in_the_run_folder_whatever_its_name(tmp_path, name, storage):
    folder = RunFolder.create(tmp_path / name, "", metric=TOP1)
    for _ in range(2):  # made, and opened again
        view = open_view(storage, folder, "a", SPACE, TOP1, None, RECORDS[:1])
        assert len(view.study.trials) == 1
        view.close()
    assert (folder.study_db if storage == "sqlite" else folder.study_journal).stat().st_size
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    "url", ["sqlite:////no/such/folder/x.db", "nosuchdb://u:secret@host/db", "postgresql://u:secret@localhost:1/db"]
)
def test_storage_that_cannot_be_opened_is_refused_without_its_password(folder, url):
    with pytest.raises(RunError, match=r"cannot open the storage .*--set storage=sqlite") as caught:
        open_view(url, folder, "a", SPACE, TOP1)
    assert "secret" not in str(caught.value)


def test_optuna_numbers_trials_as_we_do_whatever_the_order_in_which_they_end(folder):
    view = open_view("sqlite", folder, "toy", SPACE, TOP1)
    for number in (1, 0, 3):
        view.add(complete(number, CONFIGS[number]))
    shown = [trial.user_attrs["number"] for trial in view.study.trials]
    assert shown == [0, 1]  # 3 waits for 2
    view.flush()
    view.add(complete(2, CONFIGS[2]))  # slower than the run was willing to wait
    assert [trial.user_attrs["number"] for trial in view.study.trials] == [0, 1, 3, 2]
    for number in range(5, 5 + MOST_WAITING):
        view.add(complete(number, CONFIGS[number % len(CONFIGS)]))
    assert len(view.study.trials) == 4
    view.add(complete(5 + MOST_WAITING, CONFIGS[0]))
    assert len(view.study.trials) == 4 + MOST_WAITING + 1
