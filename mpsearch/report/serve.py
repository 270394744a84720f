"""Serves the dashboard of a run: it listens at once, and what it shows is read and drawn meanwhile.

Optuna, its dashboard and what draws figures take seconds to import, and a run of thousands of trials takes more to be
read: until then, whoever asks gets a page that asks again. optuna-dashboard has no login and lets anybody delete
studies, so beyond this machine it is only served behind a token.
"""

from __future__ import annotations

import contextlib
import ipaddress
import threading
import webbrowser
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any
from urllib.parse import quote

from mpsearch.errors import RunError
from mpsearch.record import RunFolder
from mpsearch.report.gate import Application, Gate, server


@dataclass(frozen=True)
class Served:
    """A dashboard that runs: where it is, when it shows all of the record, and how to wait for its end."""

    url: str
    caught_up: threading.Event
    wait: Callable[[], None]


@contextlib.contextmanager
def serving(
    target: str,
    host: str = "127.0.0.1",
    port: int = 8080,
    token: str | None = None,
    on_listening: Callable[[str, str], None] = lambda url, once: None,
) -> Iterator[Served]:
    """Serve the dashboard of a run, or of any Optuna storage, for the time of the block.

    Args:
        target: a run folder, or the URL of a storage.
        host: where to listen; whatever is not this machine alone demands a token.
        port: 0: any that is free.
        token: what a visitor has to give.
        on_listening: told the address when it can be visited, and one without the token that lets its first visitor
            in; the dashboard is there when the block begins, and shows trials that the run's study lacked while they
            are put into it.

    Raises:
        MpsearchError: no such run or storage, or it is damaged, no token where one is needed, or the port is taken.
    """
    if not find_spec("optuna_dashboard"):
        raise RunError("the Optuna dashboard is not installed: pip install 'mpsearch[dashboard]'")
    if not is_loopback(host) and not token:
        raise RunError(
            f"--host {host} can be reached by others, and whoever reaches the Optuna dashboard can delete studies: "
            "give --token SECRET too, or leave --host at 127.0.0.1 (from elsewhere: ssh -L 8080:127.0.0.1:8080)"
        )
    if "://" not in target:
        RunFolder.open(target)  # what is no run is refused before anybody is told to come
    door, caught_up = _Door(), threading.Event()
    gate = Gate(door, token)
    with contextlib.ExitStack() as stack:
        try:
            listening = stack.enter_context(server(gate, host, port))
        except OSError as error:
            raise RunError(
                f"cannot listen on {host}:{port} ({error.strerror or error}): give another --port, 0 for any free one"
            ) from None
        thread = threading.Thread(target=listening.serve_forever, daemon=True)
        thread.start()
        stack.callback(listening.shutdown)
        name = f"[{host}]" if ":" in host else host
        address = f"http://{name}:{listening.server_port}/dashboard"
        url = f"{address}?token={quote(token, safe='')}" if token else address
        on_listening(url, f"{address}?ticket={gate.ticket}" if token else address)
        from mpsearch.report.dashboard import application  # here, because it takes seconds

        door.behind = stack.enter_context(application(target, caught_up))
        yield Served(url, caught_up, thread.join)


def show(target: str, host: str, port: int, token: str | None, browser: bool) -> None:
    """Serve until interrupted, and open a browser if asked to. Raises as `serving` does."""

    def announce(url: str, once: str) -> None:
        print(f"Optuna dashboard: {url}\nend it with Ctrl-C", flush=True)
        if browser:  # everybody on this machine sees what it is started with
            webbrowser.open(once)

    with contextlib.suppress(KeyboardInterrupt), serving(target, host, port, token, announce) as served:
        served.wait()


def is_loopback(host: str) -> bool:
    """Whether an address to listen on can be reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _Door:
    """What visitors get: the application once it is there, and until then a page that asks again by itself."""

    behind: Application | None = None

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if self.behind is not None:
            return self.behind(environ, start_response)
        body = (
            b'<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="1"><title>mpsearch</title>'
            b"<p>The run is being read; this page looks again every second."
        )
        about = [("Content-Type", "text/html; charset=utf-8"), ("Content-Length", str(len(body))), ("Retry-After", "1")]
        start_response("503 Service Unavailable", about)
        return [body]
