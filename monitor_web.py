"""Serve runs as one page with live curves: the standard library's HTTP server, a page without build step, JSON.

    /                       the page; its files are a fixed list, read from web/ at the start
    /api/runs               which runs there are
    /api/series             curves of a run between two steps, as many points as asked for
    /api/heat               a quantity by layer and step, as many columns as asked for
    /api/news               what is new since the client's last look: steps, and the summary if it changed
    /api/samples            what the model wrote at a step

A client holds what it has and asks for what is new; it never gets a whole file. Where lines it has no longer hold (a
return to a checkpoint, another file, a glance replaced by the whole) the ``generation`` rises and it begins anew.
Polling, not server-sent events: a phone that slept goes on by itself, and no connection is held open.

Safe by default. Loopback only; another address needs ``--allow-remote`` and then a token. The Host header must name
this machine, so that a foreign page cannot reach in by a name that it points here (DNS rebinding). GET and HEAD only,
no path is ever made from a request, the answer to everything is sent with a policy that forbids foreign content, and
text from runs is only ever set as text.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from run_reader import BY_LAYER, Run
from run_summary import Summary, sample_steps, samples_at, score_table, summarize

WEB = Path(__file__).resolve().parent / "web"
PAGES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/charts.js": ("charts.js", "text/javascript; charset=utf-8"),
    "/style.css": ("style.css", "text/css; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
    "/uplot.js": ("vendor/uPlot.iife.min.js", "text/javascript; charset=utf-8"),
    "/uplot.css": ("vendor/uPlot.min.css", "text/css; charset=utf-8"),
}
SERIES = [
    *("loss", "val_loss", "flip_rate", "agreement", "agreement_control", "consensus"),
    *("tokens_per_s", "mem_peak_bytes", "lr", "seconds", "data_seconds"),
]
"""Columns that a client gets."""
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
COOKIE = "prime_monitor"
LOOK = 1.0
"""Seconds between looks at the files."""
NEWS_MOST, POINTS_MOST, COLUMNS_MOST = 400, 20_000, 2_000
"""Most steps in one answer to /api/news, most points of curves, most columns of a heat map."""


class RefusedError(Exception):
    """An HTTP status other than 200, with its reason."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


# -- what is served ---------------------------------------------------------------------------------------------------


class Board:
    """The runs, read on by one thread and asked by others."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.runs = [Run(folder) for folder in folders]
        self.lock = threading.Lock()
        self.asked = 0.0
        """When somebody asked last, by the monotonic clock."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="follow", daemon=True)

    def start(self) -> None:
        """Look once, then go on in a thread of its own."""
        # Slow to import, and wanted by the first who asks.
        import numpy  # noqa: F401

        for run in self.runs:
            run.refresh()
        self._thread.start()

    def stop(self) -> None:
        """End reading."""
        self._stop.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._stop.is_set():
            behind = False
            for run in self.runs:
                with self.lock:
                    run.refresh()
                    behind |= run.behind > 0
                # A page that is being opened is worth more than a history that is read a little sooner.
                self._stop.wait(0.2 if behind and time.monotonic() - self.asked < 0.3 else 0.001)
            if not behind:
                self._stop.wait(LOOK)

    def overview(self, query: Query) -> dict[str, Any]:
        """Names and states of all runs."""
        now = time.time()
        return {"runs": [{"id": i, **_brief(summarize(run, now, 1))} for i, run in enumerate(self.runs)]}

    def series(self, query: Query) -> dict[str, Any]:
        """Curves, and the last step there is, be it asked for or not."""
        run = self._run(query)
        most = query.whole("points", 1200, 10, POINTS_MOST)
        steps, columns = run.history.points(SERIES, most, query.step("from"), query.step("to"))
        last = run.history.steps[-1] if run.history else None
        return {**_place(run), "last": last, "steps": steps, "columns": columns}

    def heat(self, query: Query) -> dict[str, Any]:
        """A quantity by layer and step."""
        run, name = self._run(query), query.quantity()
        most = query.whole("columns", 240, 1, COLUMNS_MOST)
        bounds, layers, rows = run.history.heat(name, most, query.step("from"), query.step("to"))
        return {**_place(run), "quantity": name, "bounds": bounds, "layers": layers, "rows": rows}

    def news(self, query: Query) -> dict[str, Any]:
        """What is new."""
        run = self._run(query)
        history = run.history
        after = query.step("after")
        answer: dict[str, Any] = {**_place(run), "reset": False}
        last = history.steps[-1] if history else -1
        if query.whole("generation", -1, -1, 1 << 62) != run.generation:
            answer["reset"] = True
        elif last > (-1 if after is None else after):
            begin, end = history.range(None if after is None else after + 1, None)
            if end - begin > NEWS_MOST:
                answer["reset"] = True
            else:
                answer["steps"], answer["columns"] = history.points(SERIES, NEWS_MOST, history.steps[begin])
                bounds, layers, cells = history.heat(query.quantity(), NEWS_MOST, history.steps[begin])
                answer["heat"] = {"bounds": bounds, "layers": layers, "rows": cells}
        summary = summarize(run)
        if query.whole("changes", -1, -1, 1 << 62) != run.changes or query.text("state", "") != summary.state:
            names, rows = score_table(run.evaluations)
            answer["summary"] = {
                **_plain(summary),
                "scores": {"names": names, "rows": rows},
                "sample_steps": sample_steps(run),
            }
        return answer

    def samples(self, query: Query) -> dict[str, Any]:
        """Samples of a step, by default the last with any."""
        run = self._run(query)
        steps = sample_steps(run)
        step = query.step("step")
        chosen = (steps[-1] if steps else 0) if step is None else step
        return {"step": chosen, "samples": samples_at(run, chosen)}

    def _run(self, query: Query) -> Run:
        return self.runs[query.whole("run", 0, 0, len(self.runs) - 1)]


def _place(run: Run) -> dict[str, Any]:
    """Where a client is with what it got."""
    return {"generation": run.generation, "changes": run.changes, "glanced": run.glanced}


def _brief(summary: Summary) -> dict[str, Any]:
    return {"name": summary.name, "folder": summary.folder, "state": summary.state}


def _plain(summary: Summary) -> dict[str, Any]:
    fields = summary._asdict()
    return {
        **fields,
        "layers": [layer._asdict() for layer in summary.layers],
        "events": [entry._asdict() for entry in summary.events],
    }


class Query:
    """The checked parameters of a request."""

    def __init__(self, text: str) -> None:
        try:
            self._values = {name: values[-1] for name, values in parse_qs(text, max_num_fields=20).items()}
        except ValueError as error:
            raise RefusedError(400, "too many parameters") from error

    def text(self, name: str, default: str) -> str:
        """A parameter as it is."""
        return self._values.get(name, default)

    def whole(self, name: str, default: int, low: int, high: int) -> int:
        """A whole number within limits."""
        text = self._values.get(name, str(default))
        # Python's int() also takes underscores, blanks, and digits without end.
        if len(text) > 20 or not text.removeprefix("-").isascii() or not text.removeprefix("-").isdigit():
            raise RefusedError(400, f"{name} is not a whole number")
        value = int(text)
        if not low <= value <= high:
            raise RefusedError(400, f"{name} is {value}, expected {low} to {high}")
        return value

    def step(self, name: str) -> int | None:
        """A step, or None where the parameter is missing."""
        return self.whole(name, 0, -1, 1 << 62) if name in self._values else None

    def quantity(self) -> str:
        """A quantity by layer."""
        name = self.text("quantity", "flip_rate")
        if name not in BY_LAYER:
            raise RefusedError(400, f"quantity is {name[:40]!r}, expected one of {', '.join(BY_LAYER)}")
        return name


# -- who may ask ------------------------------------------------------------------------------------------------------


class Guard:
    """Which requests are answered: those whose Host header names this machine, from afar only with the token."""

    def __init__(self, host: str, *, remote: bool, token: str | None) -> None:
        self.remote = remote
        self.token = token
        self.names = {"localhost", "127.0.0.1", "::1"}
        if remote:
            own = socket.gethostname().lower()
            self.names |= {host.lower(), own, f"{own}.local"}

    def knows(self, hosts: list[str]) -> bool:
        """Whether a request's Host headers are exactly one, and a name of this machine. A number is no name that
        somebody else could point here: from afar any will do."""
        if len(hosts) != 1:
            return False
        try:
            parts = urlsplit(f"//{hosts[0]}")
            name, _ = parts.hostname, parts.port
        except ValueError:
            return False
        if not name or parts.username is not None or parts.path or parts.query or parts.fragment:
            return False
        if name in self.names:
            return True
        return self.remote and _is_address(name)

    def admits(self, cookies: str | None, authorization: str | None) -> bool:
        """Whether the token is there, where one is asked for."""
        if self.token is None:
            return True
        try:
            cookie = SimpleCookie(cookies or "").get(COOKIE)
        except CookieError:
            cookie = None
        given = cookie.value if cookie else (authorization or "").removeprefix("Bearer ")
        return self.matches(given)

    def matches(self, given: str) -> bool:
        """Whether this is the token; takes as long for any wrong one."""
        return self.token is not None and hmac.compare_digest(given.encode(), self.token.encode())


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def token_of(file: Path | None) -> str:
    """A new token, or that of a file, which is made where it is missing.

    Raises:
        OSError: the file holds less than 16 characters, or others may read it.
    """
    if file is None:
        return secrets.token_urlsafe(24)
    if not file.exists():
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
            out.write(secrets.token_urlsafe(24) + "\n")
    if os.name == "posix" and file.stat().st_mode & 0o077:
        raise OSError(f"{file} can be read by others: chmod 600 {file}")
    token = file.read_text(encoding="utf-8").strip()
    if len(token) < 16 or not token.isascii() or not token.isprintable() or " " in token:
        raise OSError(f"{file} has no token: expected 16 or more characters without blanks; remove it to get a new one")
    return token


# -- the server -------------------------------------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """Listens; holds what its handlers need."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], board: Board, guard: Guard) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.board = board
        self.guard = guard
        self.pages = {route: ((WEB / name).read_bytes(), kind) for route, (name, kind) in PAGES.items()}
        self.answers: dict[str, Callable[[Query], dict[str, Any]]] = {
            "/api/runs": board.overview,
            "/api/series": board.series,
            "/api/heat": board.heat,
            "/api/news": board.news,
            "/api/samples": board.samples,
        }
        super().__init__(address, Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away in the middle is no error."""


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Server
    protocol_version = "HTTP/1.1"
    timeout = 30
    server_version = "monitor"
    sys_version = ""

    def do_GET(self) -> None:
        try:
            self._answer()
        except RefusedError as refusal:
            self._send(refusal.status, f"{refusal}\n".encode(), "text/plain; charset=utf-8")

    do_HEAD = do_GET

    def _answer(self) -> None:
        guard = self.server.guard
        if not guard.knows(self.headers.get_all("Host") or []):
            raise RefusedError(403, "this monitor does not answer to that host name")
        if not self.path.startswith("/"):
            raise RefusedError(400, "expected a path")
        target = urlsplit(self.path)
        query = Query(target.query)
        if not guard.admits(self.headers.get("Cookie"), self.headers.get("Authorization")):
            if target.path == "/" and guard.matches(query.text("token", "")):
                # From now on a cookie has it, and the address, which histories keep, does not.
                cookie = f"{COOKIE}={guard.token}; HttpOnly; SameSite=Strict; Path=/"
                return self._send(303, b"", "text/plain", {"Location": "/", "Set-Cookie": cookie})
            raise RefusedError(401, "a token is needed: open the address that the monitor printed at its start")
        if target.path in self.server.pages:
            body, kind = self.server.pages[target.path]
            return self._send(200, body, kind)
        if target.path not in self.server.answers:
            raise RefusedError(404, "nothing here")
        self.server.board.asked = time.monotonic()
        with self.server.board.lock:
            answer = self.server.answers[target.path](query)
        body = json.dumps(answer, allow_nan=False, separators=(",", ":")).encode()
        return self._send(200, body, "application/json")

    def _send(self, status: int, body: bytes, kind: str, more: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**HEADERS, **(more or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if status >= 400:
            # A body that was sent along was not read: the connection cannot go on.
            self.close_connection = True
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the standard library refuses: unknown methods, malformed requests."""
        status = 405 if code == 501 else code
        self.close_connection = True
        more = {"Allow": "GET, HEAD"} if status == 405 else None
        self._send(status, b"GET and HEAD only\n" if status == 405 else b"bad request\n", "text/plain", more)

    def log_message(self, format: str, *args: Any) -> None:
        """Silent: a line for each poll helps nobody."""


def serve(runs: Sequence[Path], host: str, port: int, *, remote: bool = False, token_file: Path | None = None) -> int:
    """What ``monitor_qwen.py RUN --web`` does: serve until Ctrl-C.

    Raises:
        OSError: the address or the port cannot be had.
    """
    token = token_of(token_file) if remote else None
    board = Board(runs)
    try:
        server = Server((host, port), board, Guard(host, remote=remote, token=token))
    except OSError as error:
        raise OSError(f"cannot serve at {host} port {port}: {error.strerror}; choose another by --port") from error
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{server.server_address[1]}/" + (f"?token={token}" if token else "")
    board.start()
    print(f"watching {', '.join(map(str, runs))} at {address}  (Ctrl-C ends)", flush=True)
    if remote:
        print("other machines can reach it; the token travels unencrypted, ssh -L is safer", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        return 0
    finally:
        server.server_close()
        board.stop()
    return 0
