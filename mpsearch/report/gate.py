"""Access to a web application that has no login of its own: by a token, or from this machine alone; and its server."""

from __future__ import annotations

import contextlib
import hmac
import re
import secrets
import socket
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

_COOKIE = "mpsearch_token"
_THIS_MACHINE = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:[0-9]+)?")  # as requests name their host

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class Gate:
    """WSGI middleware in front of an application.

    With a token: it is read from `Authorization: Bearer TOKEN`, from a cookie, or from `?token=TOKEN`, which sets the
    cookie and leads on to the address without it, as `?ticket=TICKET` does for its first visitor. Whoever has another
    one, or none, gets 401.

    Without a token: only requests that name this machine as their host, so that no page on the web can make a browser
    talk to the application under a name of its own; others get 403.

    With and without one: no page of another origin may read an answer (headers that would allow it are taken off), and
    what would change something (any method but GET, HEAD and OPTIONS) is refused with 403 where such a page sends it.

    Args:
        application: what is behind the gate.
        token: what a visitor has to give; None: the server listens to this machine alone.
    """

    def __init__(self, application: Application, token: str | None) -> None:
        self._application = application
        self._token = token
        self.ticket = secrets.token_urlsafe()
        self._tickets = [self.ticket]  # that nobody has used

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Answer a request, or hand it on."""
        if environ.get("REQUEST_METHOD") not in ("GET", "HEAD", "OPTIONS") and not _same_origin(environ):
            return _answer(start_response, "403 Forbidden", "a page of another origin may change nothing here")
        start_response = _without_cors(start_response)
        if self._token is None:
            if _THIS_MACHINE.fullmatch(environ.get("HTTP_HOST", "")):
                return self._application(environ, start_response)
            return _answer(start_response, "403 Forbidden", "this address is for requests to 127.0.0.1 or localhost")
        query = dict(parse_qsl(environ.get("QUERY_STRING", "")))
        if self._fits(query.pop("token", "")) | self._admits(query.pop("ticket", "")):
            rest = f"?{urlencode(query)}" if query else ""
            cookie = f"{_COOKIE}={self._token.encode().hex()}; Path=/; HttpOnly; SameSite=Strict"
            path = quote(environ.get("PATH_INFO", "").lstrip("/"), encoding="latin-1")  # a path of here, one line
            headers = [("Location", f"/{path}{rest}"), ("Set-Cookie", cookie)]
            return _answer(start_response, "303 See Other", "", headers)
        scheme, _, bearer = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
        if (scheme.lower() == "bearer" and self._fits(bearer.strip())) or any(map(self._fits, _tokens(environ))):
            return self._application(environ, start_response)
        said = "a token is needed: open the address with ?token=TOKEN, or send Authorization: Bearer TOKEN"
        return _answer(start_response, "401 Unauthorized", said, [("WWW-Authenticate", 'Bearer realm="mpsearch"')])

    def _admits(self, ticket: str) -> bool:
        """Whether it is the ticket, and the first to use it."""
        if hmac.compare_digest(ticket.encode(), self.ticket.encode()):
            with contextlib.suppress(IndexError):  # one thread alone takes it
                return bool(self._tickets.pop())
        return False

    def _fits(self, token: str) -> bool:
        return hmac.compare_digest(token.encode(), (self._token or "").encode())


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Quiet(WSGIRequestHandler):
    def log_message(self, *_: object) -> None:
        """Requests are not printed: with a token in the address they would be no secret."""


def server(application: Application, host: str, port: int) -> _Server:
    """A server with a thread a request, which listens already. Raises OSError if it cannot."""
    kind = _Server6 if ":" in host else _Server
    return make_server(host, port, application, server_class=kind, handler_class=_Quiet)


def _same_origin(environ: dict[str, Any]) -> bool:
    """Whether a request comes from our own page, or from no page: browsers say which origin theirs has."""
    origin = environ.get("HTTP_ORIGIN")
    return origin is None or origin.partition("://")[2] == (environ.get("HTTP_HOST") or "of nobody")


def _without_cors(start_response: Callable[..., Any]) -> Callable[..., Any]:
    """optuna-dashboard lets pages of any origin read its artifacts."""

    def start(status: str, headers: list[tuple[str, str]], *more: Any) -> Any:
        return start_response(status, [h for h in headers if not h[0].lower().startswith("access-control-")], *more)

    return start


def _tokens(environ: dict[str, Any]) -> Iterable[str]:
    """The tokens in our cookies; those of other applications on this host may be of any form."""
    for cookie in environ.get("HTTP_COOKIE", "").split(";"):
        name, _, value = cookie.strip().partition("=")
        if name == _COOKIE:
            try:
                yield bytes.fromhex(value).decode()
            except ValueError:  # not of our making
                continue


def _answer(
    start_response: Callable[..., Any], status: str, text: str, headers: Iterable[tuple[str, str]] = ()
) -> Iterable[bytes]:
    body = f"{text}\n".encode()
    about = [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(body)))]
    start_response(status, [*about, *headers])
    return [body]
