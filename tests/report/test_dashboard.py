"""The Optuna dashboard of a run: who may see it, and what it is given to show."""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from browser import chromium, page_of
from typer.testing import CliRunner

from mpsearch.cli import app
from mpsearch.errors import RunError
from mpsearch.exporters.read import read_config
from mpsearch.metric import TOP1
from mpsearch.precision import BITS
from mpsearch.problem import Problem, open_problem, write_facts
from mpsearch.record import RunFolder
from mpsearch.report import dashboard, serve
from mpsearch.report.dashboard import Prepared
from mpsearch.report.data import RunData
from mpsearch.report.gate import Gate
from mpsearch.report.serve import is_loopback, serving
from mpsearch.report.write import watch
from mpsearch.search.run import run_study
from mpsearch.search.view import open_view
from mpsearch.study import parse_study, read_spec

pytestmark = pytest.mark.study

STUDY = {
    "name": "quick",
    "task": {
        "model": "digits_cnn",
        "checkpoint": "digits_cnn",
        "data": {"kind": "digits", "val_fraction": 0.05, "test_fraction": 0.9},
    },
    "space": "digits",
    "search": {"trials": 10, "seed": 1},
    "trial": {"steps": 2, "batch_size": 16, "bn_batches": 1, "calibration_samples": 32, "precision": "fp32"},
    "engine": {"address": "none"},
}

# ------------------------------------------------------------------------------------------------------------ gate


def through(gate: Gate, host: str = "127.0.0.1:8080", **environ: str) -> tuple[str, dict[str, str], bytes]:
    """Status, headers and body of a GET."""
    answered: list[Any] = []
    given = {"REQUEST_METHOD": "GET", "PATH_INFO": "/dashboard", "HTTP_HOST": host, **environ}
    body = b"".join(gate(given, lambda status, headers: answered.extend([status, dict(headers)])))
    return answered[0], answered[1], body


def application(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    start_response("200 OK", [])
    return [b"inside"]


def test_gate_lets_in_whoever_has_the_token() -> None:
    gate = Gate(application, "secret")
    assert through(gate)[0].startswith("401")
    assert through(gate)[1]["WWW-Authenticate"].startswith("Bearer")
    assert through(gate, HTTP_AUTHORIZATION="Bearer wrong")[0].startswith("401")
    assert through(gate, HTTP_AUTHORIZATION="Basic secret")[0].startswith("401")
    assert through(gate, HTTP_AUTHORIZATION="Bearer secret")[2] == b"inside"
    assert through(gate, host="example.org", HTTP_AUTHORIZATION="Bearer secret")[2] == b"inside"


def test_gate_turns_a_token_in_the_address_into_a_cookie() -> None:
    gate = Gate(application, "se cret;")
    status, headers, _ = through(gate, QUERY_STRING="a=1&token=se+cret%3B")
    assert (status, headers["Location"]) == ("303 See Other", "/dashboard?a=1")
    cookie, _, attributes = headers["Set-Cookie"].partition(";")
    assert "HttpOnly" in attributes
    assert "SameSite=Strict" in attributes
    assert through(gate, HTTP_COOKIE=cookie)[2] == b"inside"
    assert through(gate, HTTP_COOKIE=cookie + "00")[0].startswith("401")
    assert through(gate, QUERY_STRING="token=other")[0].startswith("401")
    others = 'a/b=1; pref={"a": 1}; mpsearch_token=zz; =; mpsearch_token=' + "00; "  # of other applications here
    assert through(gate, HTTP_COOKIE=others)[0].startswith("401")
    assert through(gate, HTTP_COOKIE=others + cookie)[2] == b"inside"


@pytest.mark.parametrize(
    ("path", "location"),
    [
        ("/dashboard\r\nX-Inj: 1", "/dashboard%0D%0AX-Inj%3A%201"),
        ("//evil.example/a", "/evil.example/a"),
        ("/\\evil.example", "/%5Cevil.example"),
        ("/\xc3\xa9", "/%C3%A9"),
        ("", "/"),
    ],
)
def test_gate_leads_to_a_path_of_its_own(path: str, location: str) -> None:
    _, headers, _ = through(Gate(application, "secret"), PATH_INFO=path, QUERY_STRING="token=secret")
    assert headers["Location"] == location


def test_gate_without_a_token_is_for_this_machine_alone() -> None:
    gate = Gate(application, None)
    for host in ("127.0.0.1:8080", "localhost", "[::1]:8080"):
        assert through(gate, host=host)[2] == b"inside"
    for host in ("rebound.example.org:8080", "[::1", "[::1]evil", "[::1]:80@evil", "localhost:", "127.0.0.1.evil", ""):
        assert through(gate, host=host)[0].startswith("403"), host


@pytest.mark.parametrize("token", [None, "secret"])
def test_pages_of_other_origins_read_nothing_and_change_nothing(token: str | None) -> None:
    """D12."""

    def open_to_all(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        start_response("200 OK", [("Access-Control-Allow-Origin", "*"), ("Content-Type", "text/plain")])
        return [b"inside"]

    gate = Gate(open_to_all, token)
    given = {"HTTP_AUTHORIZATION": "Bearer secret"}
    status, headers, _ = through(gate, HTTP_ORIGIN="http://evil.example", **given)
    assert (status, headers) == ("200 OK", {"Content-Type": "text/plain"})
    for method in ("DELETE", "POST", "PUT"):
        origins = {
            "http://evil.example": "403",
            "null": "403",
            "http://[": "403",
            "": "403",
            "http://127.0.0.1:8080": "200",
            "http://127.0.0.1:1": "403",
        }
        for origin, code in origins.items():
            assert through(gate, REQUEST_METHOD=method, HTTP_ORIGIN=origin, **given)[0].startswith(code), origin
        assert through(gate, REQUEST_METHOD=method, **given)[0].startswith("200")  # curl, say


def test_the_token_is_no_argument_of_the_browser(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Everybody on a machine sees the arguments of its processes: they let the first visitor in, who is the browser."""
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    with monkeypatch.context() as patched:
        patched.setattr(serve, "Served", lambda *_: SimpleNamespace(wait=lambda: visited.append(visit(opened[-1]))))
        visited: list[tuple[int, int]] = []
        serve.show(str(folder.path), "127.0.0.1", 0, "secret", browser=True)
        serve.show(str(folder.path), "127.0.0.1", 0, None, browser=True)
    assert "secret" not in opened[0]
    assert visited == [(200, 401), (200, 200)]  # with a token, who comes second is refused
    assert opened[1].endswith("/dashboard")
    assert "?token=secret" in capsys.readouterr().out


def visit(url: str) -> tuple[int, int]:
    """Who comes first, and who comes then."""
    browser = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
    with browser.open(url) as answer:
        first = answer.status
    try:
        with urllib.request.urlopen(url) as answer:
            return first, answer.status
    except urllib.error.HTTPError as error:
        return first, error.code


def test_only_this_machine_is_loopback() -> None:
    assert [host for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "10.0.0.7", "box") if is_loopback(host)] == [
        "127.0.0.1",
        "::1",
        "localhost",
    ]


# --------------------------------------------------------------------------------------------------------- a run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run of a quick study."""
    path = tmp_path_factory.mktemp("dashboard") / "run"
    run_study(parse_study(STUDY), path)
    return RunFolder.open(path)


@pytest.fixture(scope="module")
def problem(folder: RunFolder) -> Problem:
    return open_problem(read_spec(folder))


@pytest.fixture(scope="module")
def address(folder: RunFolder) -> Iterator[str]:
    with serving(str(folder.path), port=0) as served:
        assert served.caught_up.wait(120)
        yield served.url.removesuffix("/dashboard")


def get(url: str, **headers: str) -> bytes:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as answer:
        content: bytes = answer.read()
        return content


def study_of(address: str) -> dict[str, Any]:
    """The one study, as the dashboard's page gets it."""
    document: dict[str, Any] = json.loads(get(f"{address}/api/studies/1?after=0"))
    return document


def test_study_has_named_objectives_a_note_and_our_figures(address: str, folder: RunFolder) -> None:
    study = study_of(address)
    assert study["objective_names"] == ["top1 on val (share)", "cost (log2 of the reference's)"]
    assert "Maximize top1 on the validation split" in study["note"]["body"]
    assert f"mpsearch export {folder.path} --pick knee" in study["note"]["body"]
    assert {"key": "cost model", "value": "shift_energy"} in study["user_attrs"]
    figures = {plot["id"]: json.loads(plot["graph_object"]) for plot in study["plotly_graph_objects"]}
    assert set(figures) == {"front", "network", "cost", "weight-bits", "input-bits", "hypervolume", "best", "origins"}
    assert figures["front"]["layout"]["title"]["text"] == "top1 against cost"
    drawn = [point for trace in figures["front"]["data"] for point in trace.get("customdata", [])]
    assert sorted(point[0] for point in drawn) == [record.number for record in folder.records()]


def test_trials_have_attributes_notes_and_artifacts(address: str, folder: RunFolder, tmp_path: Path) -> None:
    trials = study_of(address)["trials"]
    assert len(trials) == 10
    untrained, record = (
        next(r for r in folder.records() if r.origin == "uniform" and (len(r.curve) > 1) == trained)
        for trained in (False, True)
    )
    (other,) = [t for t in trials if {"key": "number", "value": str(untrained.number)} in t["user_attrs"]]
    assert {artifact["filename"] for artifact in other["artifacts"]} == {"config.json", "bits.svg"}
    (trial,) = [t for t in trials if {"key": "number", "value": str(record.number)} in t["user_attrs"]]
    attributes = {item["key"]: item["value"] for item in trial["user_attrs"]}
    assert attributes["origin"] == "uniform"
    shares = json.loads(attributes["cost by layer (%)"])
    assert sum(shares.values()) == pytest.approx(100, abs=1)
    assert trial["note"]["body"].startswith(f"**Trial {record.number}**, proposed by uniform")
    assert {param["name"].partition("/")[0] for param in trial["params"]} == set(record.config)  # named after layers
    files = {
        artifact["filename"]: get(f"{address}/artifacts/1/{trial['trial_id']}/{artifact['artifact_id']}").decode()
        for artifact in trial["artifacts"]
    }
    assert set(files) == {"config.json", "bits.svg", "training.svg"}
    (tmp_path / "config.json").write_text(files["config.json"])
    assert read_config(tmp_path / "config.json") == record.config
    assert files["bits.svg"].count("<rect") == 2 * len(record.config) + len(BITS) + 1  # legend, paper
    assert f"trial {record.number} (uniform)" in files["training.svg"]


def test_an_unknown_artifact_is_not_found(address: str, folder: RunFolder, problem: Problem) -> None:
    from optuna.artifacts.exceptions import ArtifactNotFound

    from mpsearch.report.artifacts import RunArtifacts

    store = RunArtifacts(folder, problem)
    for key in ("ffff-0", "0-9", "x"):
        with pytest.raises(ArtifactNotFound):
            store.open_reader(key)


def test_a_token_is_asked_for_over_http(folder: RunFolder) -> None:
    url = f"sqlite:///{folder.study_db}"
    with serving(url, port=0, token="secret") as served:
        address = served.url.removesuffix("/dashboard?token=secret")
        with pytest.raises(urllib.error.HTTPError) as refused:
            get(f"{address}/api/studies")
        assert refused.value.code == 401
        assert b"quick" in get(f"{address}/api/studies", Authorization="Bearer secret")


def test_what_cannot_be_served_is_refused(folder: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="--token"), serving(str(folder.path), host="0.0.0.0"):
        pass
    with pytest.raises(RunError, match="names no file"), serving(f"sqlite:///{tmp_path}/none.db"):
        pass
    assert not (tmp_path / "none.db").exists()
    with pytest.raises(RunError, match="holds no run"), serving(str(tmp_path)):
        pass


def test_a_taken_port_is_refused(folder: RunFolder) -> None:
    url = f"sqlite:///{folder.study_db}"
    with serving(url, port=0) as served:
        port = int(served.url.split(":")[2].split("/")[0])
        with pytest.raises(RunError, match="cannot listen on"), serving(url, port=port):
            pass


def test_a_trial_that_ends_is_shown_while_the_dashboard_runs(
    folder: RunFolder, problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dashboard, "EVERY_S", 0.05)
    records = folder.records()
    live = RunFolder.create(
        tmp_path / "live", folder.study_yaml.read_text(), folder.space_yaml.read_text(), metric=TOP1
    )
    write_facts(live, problem)
    with live.driving():
        view = open_view("sqlite", live, "quick", problem.space, TOP1, None, (), problem.cost)
        live.append(records[0])
        view.add(records[0])
        with serving(str(live.path), port=0) as served:
            address = served.url.removesuffix("/dashboard")
            assert len(study_of(address)["trials"]) == 1
            live.append(records[1])
            view.add(records[1])
            deadline = time.monotonic() + 60
            while "2 complete" not in (study := study_of(address))["note"]["body"] or len(study["trials"]) < 2:
                assert time.monotonic() < deadline
                time.sleep(0.2)


def test_a_note_that_somebody_wrote_stays(folder: RunFolder, problem: Problem) -> None:
    from optuna_dashboard import get_note, save_note

    spec = read_spec(folder)
    view = open_view("journal", folder, spec.name, problem.space, TOP1, None, folder.records(), problem.cost)
    prepared = Prepared(view.study, folder, problem)
    prepared.refresh()
    assert get_note(view.study).startswith("## quick")
    save_note(view.study, "mine")
    Prepared(view.study, folder, problem).refresh()
    assert get_note(view.study) == "mine"


def test_notes_show_what_a_run_says_as_it_is(folder: RunFolder, problem: Problem) -> None:
    evil = "<img src=x onerror=alert(1)> | [a](http://b) `c`\n# d"
    shown = r"\<img src=x onerror=alert(1)\> \| \[a\](http://b) \`c\` \# d"
    records = [replace(record, origin=evil) for record in folder.records()]
    run = RunData.of("quick", records, problem.graph.layers, problem.cost, 0.1, TOP1)
    failed = replace(records[0], state="failed", reason=evil)
    assert f"proposed by {shown}: failed: {shown}." in dashboard.trial_note(failed, run, folder)
    note = dashboard.study_note(run, problem, folder)
    assert f"| {shown} |" in note
    assert evil not in note


def test_a_run_without_a_storage_is_shown_from_its_record(folder: RunFolder, problem: Problem) -> None:
    without = replace(problem, spec=problem.spec.model_copy(update={"storage": "none"}))
    caught_up = threading.Event()
    with dashboard._kept_current(folder, without, caught_up) as study:
        assert caught_up.wait(120)
        assert isinstance(study._storage, optuna.storages.InMemoryStorage)
        assert len(study.trials) == 10


def test_dashboard_listens_before_it_reads_and_shows_what_the_study_lacks_as_it_is_added(
    folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D12: of a run of thousands of trials the study takes minutes to write."""
    copy = RunFolder.open(shutil.copytree(folder.path, tmp_path / "copy"))
    copy.study_db.unlink()
    may_read, may_add = threading.Event(), threading.Semaphore(3)
    read_run, add_trial = dashboard.read_run, optuna.Study.add_trial

    def slow_read(*arguments: Any) -> Any:
        assert may_read.wait(60)
        return read_run(*arguments)

    def slow_add(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        assert may_add.acquire(timeout=60)
        add_trial(study, trial)

    monkeypatch.setattr(dashboard, "read_run", slow_read)
    monkeypatch.setattr(optuna.Study, "add_trial", slow_add)
    waited: list[int] = []

    def visit(url: str, once: str) -> None:
        with pytest.raises(urllib.error.HTTPError) as early:
            get(url)
        waited.append(early.value.code)
        assert b"looks again" in early.value.read()
        may_read.set()

    with serving(str(copy.path), port=0, on_listening=visit) as served:
        address = served.url.removesuffix("/dashboard")
        deadline = time.monotonic() + 60
        while len(study_of(address)["trials"]) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert not served.caught_up.is_set()
        for _ in range(7):
            may_add.release()
        assert served.caught_up.wait(60)
        while len((study := study_of(address))["trials"]) < 10:  # the page keeps its trials for some seconds
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert "10 complete" in study["note"]["body"]
    assert waited == [503]


def test_a_watched_report_is_written_after_every_trial_until_the_run_ends(
    folder: RunFolder, problem: Problem, tmp_path: Path
) -> None:
    records = folder.records()
    live = RunFolder.create(
        tmp_path / "live", folder.study_yaml.read_text(), folder.space_yaml.read_text(), metric=TOP1
    )
    driving = live.driving()
    driving.__enter__()
    unheard = iter([lambda: None, lambda: live.append(records[1]), lambda: driving.__exit__(None, None, None)])
    live.append(records[0])
    written = []
    for path in watch(live, problem, sleep=lambda _: next(unheard)()):
        text = path.read_text(encoding="utf-8")
        written.append((re.findall(r"<p>(\d) complete", text)[0], "http-equiv" in text))
    assert written == [("1", True), ("2", True), ("2", False)]


def test_commands_lead_here(folder: RunFolder) -> None:
    runner = CliRunner()
    refused = runner.invoke(app, ["dashboard", str(folder.path), "--host", "0.0.0.0"])
    assert isinstance(refused.exception, RunError)
    reported = runner.invoke(app, ["report", str(folder.path), "--watch"])  # nobody drives it: once
    assert reported.exit_code == 0
    assert reported.stdout.count("report.html") == 1


@pytest.mark.slow
@pytest.mark.browser
def test_study_page_in_a_browser_shows_note_figures_and_artifacts(address: str, folder: RunFolder) -> None:
    with chromium() as browser, page_of(browser, color_scheme="dark") as (page, errors):
        page.goto(f"{address}/dashboard/studies/1")
        page.wait_for_selector("[id='user-defined-plot:front'] .scatterlayer .point", state="attached")
        points = page.locator("[id='user-defined-plot:front'] .scatterlayer .point").count()
        assert points == len(folder.records()) + 1  # the knee is ringed
        assert "top1 against cost" in page.locator("[id='user-defined-plot:front']").text_content()
        page.goto(f"{address}/dashboard/studies/1/note")
        page.get_by_text("Maximize top1 on the validation split").first.wait_for()
        page.goto(f"{address}/dashboard/studies/1/trials?numbers=0")
        page.get_by_text("bits.svg").first.wait_for()
        page.get_by_text("proposed by uniform").first.wait_for()
        page.wait_for_function(
            "[...document.images].some((image) => image.src.includes('/artifacts/') && image.naturalWidth > 0)"
        )
        assert errors == []
