"""The web monitor: what its server answers to whom, and the page in a real browser."""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from watched_run import STEPS, append, copy_run, cut, recorded_line

import monitor_web
from monitor_web import Board, Guard, Server, token_of

WEB = Path(__file__).resolve().parent.parent / "web"


class Served:
    """A server in this process."""

    def __init__(self, runs: list[Path], **guard: Any) -> None:
        self.board = Board(runs)
        self.server = Server(
            ("127.0.0.1", 0), self.board, Guard("127.0.0.1", **{"remote": False, "token": None, **guard})
        )
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/"

    def ask(self, path: str, method: str = "GET", host: str | None = None, **headers: str) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        connection.putrequest(method, path, skip_host=True)
        for name, value in {"Host": f"127.0.0.1:{self.port}" if host is None else host, **headers}.items():
            connection.putheader(name, value)
        connection.endheaders()
        return connection.getresponse()

    def get(self, path: str) -> Any:
        response = self.ask(path)
        body = response.read()
        assert response.status == 200, body
        return json.loads(body)


@contextlib.contextmanager
def served(*runs: Path, **guard: Any) -> Iterator[Served]:
    found = Served(list(runs), **guard)
    found.board.start()
    thread = threading.Thread(target=found.server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        wait_for(
            lambda: all(run.changes for run in found.board.runs) or not any(r.folder.exists() for r in found.board.runs)
        )
        yield found
    finally:
        found.server.shutdown()
        thread.join()
        found.server.server_close()
        found.board.stop()


def wait_for(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    """The first true value of ``condition``."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError("waited in vain")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return copy_run(tmp_path / "run")


@pytest.fixture
def one(run: Path) -> Iterator[Served]:
    with served(run) as found:
        yield found


# -- answers ----------------------------------------------------------------------------------------------------------


def test_series_heat_samples_and_overview(one: Served) -> None:
    overview = one.get("/api/runs")["runs"]
    assert [(r["id"], r["name"], r["state"]) for r in overview] == [(0, "tiny_coder", "finished")]
    series = one.get("/api/series?run=0&points=5000")
    assert series["steps"] == list(range(1, STEPS + 1))
    assert series["columns"]["loss"] == [recorded_line(s)["loss"] for s in series["steps"]]
    part = one.get("/api/series?from=100&to=120")
    assert part["steps"] == list(range(100, 121)) and part["last"] == STEPS
    assert len(one.get("/api/series?points=60")["steps"]) < 100
    heat = one.get("/api/heat?quantity=movement&columns=24")
    assert heat["layers"] == ["head", "5", "4", "3", "2", "1", "0"] and heat["bounds"] == [*range(1, 241, 10), 241]
    for row, opened in zip(heat["rows"], (1, 41, 41, 61, 61, 81, 81), strict=True):
        assert [v is not None for v in row] == [b + 10 > opened for b in heat["bounds"][:-1]]
    samples = one.get("/api/samples")
    assert samples["step"] == 240 and [s["reference"][:8] for s in samples["samples"]] == ["def when", "def read"]
    assert one.get("/api/samples?step=60")["samples"] != samples["samples"]
    assert one.get("/api/samples?step=61")["samples"] == []


def test_news_is_only_what_is_new(run: Path) -> None:
    with served(cut(run, 65)) as found:
        first = found.get("/api/news?run=0")
        assert first["reset"] and first["summary"]["step"] == 65 and "steps" not in first
        here = f"generation={first['generation']}&changes={first['changes']}&state={first['summary']['state']}&after=65"
        assert not {"summary", "steps"} & found.get(f"/api/news?{here}").keys()
        append(run / "stats.jsonl", **recorded_line(66))
        news = wait_for(lambda: (n := found.get(f"/api/news?{here}&quantity=movement")).get("steps") and n)
        assert news["steps"] == [66] and not news["reset"] and news["summary"]["step"] == 66
        assert news["columns"]["loss"] == [recorded_line(66)["loss"]]
        assert news["heat"]["bounds"] == [66, 67] and news["heat"]["rows"][0] == [recorded_line(66)["movement"]["head"]]
        append(run / "stats.jsonl", **recorded_line(50))
        assert wait_for(lambda: found.get(f"/api/news?{here}")["reset"]), "steps are counted again from an earlier one"
        assert found.get("/api/series")["steps"] == list(range(1, 51))


def test_a_run_that_does_not_exist_yet_and_one_with_holes(tmp_path: Path) -> None:
    with served(tmp_path / "later") as found:
        assert found.get("/api/news")["summary"]["state"] == "waiting"
        assert found.get("/api/series")["steps"] == [] and found.get("/api/heat")["rows"] == []
        (tmp_path / "later").mkdir()
        stats = tmp_path / "later" / "stats.jsonl"
        stats.write_text('{"step": 1, "loss": NaN, "lr": 1e999, "movement": {"head": NaN}}\n{"step": 2, "los')
        wait_for(lambda: found.get("/api/series")["steps"] == [1])
        assert found.get("/api/series")["columns"]["loss"] == [None]
        assert found.get("/api/news")["summary"]["loss"] is None


def test_a_long_run_is_sent_as_few_points(tmp_path: Path) -> None:
    with open(tmp_path / "stats.jsonl", "w") as file:
        for step in range(1, 20_001):
            loss = 50.0 if step == 12_345 else math.sin(step)
            file.write(f'{{"step": {step}, "loss": {loss}, "movement": {{"head": {step}}}}}\n')
    with served(tmp_path) as found:
        wait_for(lambda: not found.get("/api/news")["summary"]["reading"])
        body = found.ask("/api/series?points=1000").read()
        series = json.loads(body)
        assert len(body) < 100_000 and len(series["steps"]) < 1100
        assert 50.0 in series["columns"]["loss"] and series["steps"][-1] == 20_000


# -- who may ask ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    ["evil.example", "127.0.0.1.evil.example", "", "localhost@evil.example", "192.168.0.7", "localhost:x", "a b"],
)
def test_a_foreign_host_header_is_refused(one: Served, host: str) -> None:
    for path in ("/", "/api/runs", "/nothing"):
        response = one.ask(path, host=host)
        assert response.status == 403 and b"tiny" not in response.read()


def test_own_names_are_answered_at_any_port(one: Served) -> None:
    for host in ("localhost", "127.0.0.1", "LOCALHOST:9000", f"[::1]:{one.port}"):
        assert one.ask("/", host=host).status == 200, host


def test_no_or_two_host_headers_are_refused(one: Served) -> None:
    for lines in ("", "Host: localhost\r\nHost: evil.example\r\n"):
        with socket.create_connection(("127.0.0.1", one.port)) as raw:
            raw.sendall(f"GET / HTTP/1.1\r\n{lines}\r\n".encode())
            assert raw.recv(100).startswith(b"HTTP/1.1 403")


@pytest.mark.parametrize(
    "path",
    ["/config.json", "/../config.json", "/..%2f..%2fetc/passwd", "/web/app.js", "/vendor/uPlot.iife.min.js",
     "//etc/passwd", "/api/", "/api/series/", "/app.js/x"],
)  # fmt: skip
def test_routes_are_fixed(one: Served, path: str) -> None:
    assert one.ask(path).status == 404


@pytest.mark.parametrize(
    "query",
    ["series?run=1", "series?run=-1", "series?run=0x0", "series?points=9", "series?points=99999999", "series?from=1_0",
     "series?from=" + "9" * 30, "heat?quantity=__class__", "heat?columns=0", "news?after=a", "samples?step=--1",
     "series?" + "&".join(f"a{i}=1" for i in range(50))],
)  # fmt: skip
def test_parameters_are_checked(one: Served, query: str) -> None:
    response = one.ask(f"/api/{query}")
    assert response.status == 400 and len(response.read()) < 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "BREW"])
def test_it_can_only_be_read(one: Served, method: str) -> None:
    response = one.ask("/api/runs", method)
    assert response.status == 405 and response.getheader("Allow") == "GET, HEAD"


def test_headers_forbid_what_is_foreign(one: Served) -> None:
    for path in ("/", "/app.js", "/api/runs", "/nothing"):
        response = one.ask(path)
        policy = response.getheader("Content-Security-Policy")
        assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert response.getheader("X-Content-Type-Options") == "nosniff"
        assert response.getheader("Access-Control-Allow-Origin") is None
    head = one.ask("/", "HEAD")
    assert head.status == 200 and head.read() == b"" and int(head.getheader("Content-Length")) > 1000


def test_from_afar_only_with_the_token(run: Path) -> None:
    with served(run, remote=True, token="t" * 20) as found:
        for path in ("/", "/app.js", "/api/runs", "/?token=wrong", f"/api/runs?token={'t' * 20}"):
            assert found.ask(path).status == 401, path
        welcome = found.ask(f"/?token={'t' * 20}")
        cookie = welcome.getheader("Set-Cookie")
        assert welcome.status == 303 and welcome.getheader("Location") == "/"
        assert "HttpOnly" in cookie and "SameSite=Strict" in cookie
        assert found.ask("/api/runs", Cookie=cookie.partition(";")[0]).status == 200
        assert found.ask("/api/runs", Cookie="prime_monitor=\xe9").status == 401
        assert found.ask("/api/runs", Authorization=f"Bearer {'t' * 20}").status == 200
        assert found.ask("/", host="evil.example", Authorization=f"Bearer {'t' * 20}").status == 403
        assert found.ask("/", host="192.168.0.7:8005", Authorization=f"Bearer {'t' * 20}").status == 200


def test_a_kept_token(tmp_path: Path) -> None:
    file = tmp_path / "token"
    token = token_of(file)
    assert len(token) >= 32 and token_of(file) == token != token_of(None)
    assert file.stat().st_mode & 0o077 == 0
    file.chmod(0o644)
    with pytest.raises(OSError, match="chmod 600"):
        token_of(file)
    file.chmod(0o600)
    file.write_text("short\n")
    with pytest.raises(OSError, match="16 or more"):
        token_of(file)


def test_a_port_that_is_taken_is_said_so(run: Path, one: Served) -> None:
    with pytest.raises(OSError, match=f"port {one.port}.*--port"):
        monitor_web.serve([run], "127.0.0.1", one.port)


def test_the_page_needs_nothing_from_elsewhere() -> None:
    for name in ("index.html", "app.js", "charts.js", "style.css"):
        text = (WEB / name).read_text(encoding="utf-8")
        assert not re.search(r"https?://|//cdn|@import|innerHTML|insertAdjacentHTML|eval\(|style=", text), name
    assert "MIT" in (WEB / "vendor" / "uPlot.LICENSE").read_text()


# -- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Headless Chromium by its driver."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("needs Chromium and its driver: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: requirements-dev.txt")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    switches = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    for switch in [*switches.split(), "disable-component-update", "disable-sync", "window-size=1440,1000"]:
        options.add_argument(f"--{switch}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield found
    found.quit()


def open_page(browser: Any, url: str) -> None:
    browser.get_log("browser")
    browser.get(url)
    wait_for(lambda: browser.execute_script("return document.documentElement.dataset.ready"))


def text_of(browser: Any, selector: str) -> str:
    return browser.execute_script("return document.querySelector(arguments[0])?.innerText ?? ''", selector)


def no_complaints(browser: Any) -> None:
    assert [entry["message"] for entry in browser.get_log("browser")] == []


CELL = """
const [layer, step] = arguments;
const heat = monitor.charts.heat, u = heat.chart, ratio = devicePixelRatio;
const count = heat.heat.layers.length, i = heat.heat.layers.indexOf(layer);
const x = Math.round(u.valToPos(step, 'x', true));
const y = Math.round(u.bbox.top + u.bbox.height * (i + 0.5) / count);
const pen = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
pen.drawImage(u.ctx.canvas, x, y, 1, 1, 0, 0, 1, 1);
return [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3);
"""
"""The colour on the screen at a layer and a step."""


def test_the_page_shows_a_recorded_run(browser: Any, one: Served) -> None:
    open_page(browser, one.url)
    assert "Crystallization" in text_of(browser, "#now") or "CRYSTALLIZATION" in text_of(browser, "#now")
    assert f"step {STEPS} of {STEPS}" in text_of(browser, "#now") and "finished" in text_of(browser, "#runs")
    assert f"{recorded_line(STEPS)['val_loss']:.4f}" in text_of(browser, "#tiles")
    assert browser.execute_script("return document.querySelectorAll('#layers tr.open').length") == 7
    assert "layers opened 5 and 4" in text_of(browser, "#events")
    assert "def when" in text_of(browser, "#samples") and "nll" in text_of(browser, "#scores")
    drawn = browser.execute_script(
        "return Object.entries(monitor.charts).map(([n, c]) => [n, c.chart?.data[0].length])"
    )
    assert dict(drawn)["loss"] == STEPS + 1, "the steps and the evaluation before them"
    assert all(length for _, length in drawn)
    no_complaints(browser)


def test_the_heat_map_has_the_right_cells(browser: Any, one: Served) -> None:
    open_page(browser, one.url)
    heat = browser.execute_script("return monitor.charts.heat.heat")
    assert heat["layers"] == ["head", "5", "4", "3", "2", "1", "0"] and heat["bounds"] == list(range(1, STEPS + 2))
    opened = {"head": 1, "5": 41, "4": 41, "3": 61, "2": 61, "1": 81, "0": 81}
    for layer, row in zip(heat["layers"], heat["rows"], strict=True):
        assert [v is not None for v in row] == [step >= opened[layer] for step in range(1, STEPS + 1)]
        flips = recorded_line(STEPS)["flips_by_layer"][layer]
        assert row[-1] == pytest.approx(flips / (1_048_576 if layer == "head" else 786_432), rel=1e-5)

    def spread(colour: list[int]) -> int:
        return max(colour) - min(colour)

    for layer, step in opened.items():
        assert spread(browser.execute_script(CELL, layer, step + 3)) > 40, "an open layer has a colour"
        if step > 1:
            assert spread(browser.execute_script(CELL, layer, step - 4)) < 30, "a locked one is grey"
    browser.execute_script(
        "[...document.querySelectorAll('#quantity button')].find(b => b.textContent === 'movement').click()"
    )
    wait_for(lambda: browser.execute_script("return monitor.charts.heat.heat.rows[0].at(-1)") < 0.01)
    assert (
        browser.execute_script("return monitor.charts.heat.heat.rows[6].at(-1)")
        == recorded_line(STEPS)["movement"]["0"]
    )
    no_complaints(browser)


def test_what_is_appended_appears_without_reload(browser: Any, run: Path) -> None:
    with served(cut(run, 65)) as found:
        open_page(browser, found.url)
        assert "step 65 of 240" in text_of(browser, "#now")
        browser.execute_script("window.untouched = true")
        for step in range(66, 86):
            append(run / "stats.jsonl", **recorded_line(step))
        append(run / "events.jsonl", event="spike", step=80, reason="loss 9", micro_batches=0, timestamp=2e9)
        wait_for(lambda: "step 85 of 240" in text_of(browser, "#now"))
        assert browser.execute_script("return monitor.charts.loss.chart.data[0].at(-1)") == 85
        heat = browser.execute_script("return monitor.charts.heat.heat")
        assert heat["layers"] == ["head", "5", "4", "3", "2", "1", "0"] and heat["bounds"][-1] == 86
        assert [row[-1] is not None for row in heat["rows"]] == [True] * 7
        wait_for(lambda: "spike: loss 9" in text_of(browser, "#events"))
        append(run / "stats.jsonl", **recorded_line(70))
        wait_for(lambda: browser.execute_script("return monitor.charts.loss.chart.data[0].at(-1)") == 70)
        assert browser.execute_script("return window.untouched") is True
        no_complaints(browser)


def test_a_reload_between_two_looks_shows_no_step_twice(browser: Any, run: Path) -> None:
    with served(cut(run, 65)) as found:
        open_page(browser, found.url)
        here = found.get("/api/series")["generation"]
        news = json.dumps(found.get(f"/api/news?generation={here}&after=62"))
        put = (
            "const run = monitor.runs[0]; const news = JSON.parse(arguments[0]); const real = window.fetch;"
            "window.fetch = async (url) => url.startsWith('/api/news')"
            " ? {ok: true, json: async () => JSON.parse(arguments[0])} : real(url);"
        )
        browser.execute_script(put, news)
        time.sleep(2.5)
        assert browser.execute_script("return monitor.runs[0].steps") == list(range(1, 66))
        assert browser.execute_script("return monitor.runs[0].heat.bounds") == list(range(1, 67))
        no_complaints(browser)


def test_a_zoomed_page_asks_for_what_is_new_only(browser: Any, run: Path) -> None:
    with served(run) as found:
        open_page(browser, found.url)
        browser.execute_script("monitor.charts.loss.page.zoom({from: 30, to: 60})")
        wait_for(lambda: browser.execute_script("return monitor.runs[0].steps.length") == 31)
        append(run / "stats.jsonl", **recorded_line(200))
        wait_for(lambda: found.get("/api/series")["last"] == 200)
        wait_for(lambda: browser.execute_script("return monitor.runs[0].newest") == 200)
        append(run / "stats.jsonl", **recorded_line(201))
        wait_for(lambda: browser.execute_script("return monitor.runs[0].newest") == 201)
        assert browser.execute_script("return monitor.runs[0].steps") == [*range(30, 61), 201]
        no_complaints(browser)


def test_text_of_a_run_is_text(browser: Any, run: Path) -> None:
    evil = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>\x1b[2J"
    append(run / "samples.jsonl", step=999, prompt=evil, text=evil, reference=evil, timestamp=1.0)
    append(run / "events.jsonl", event=evil, step=240, reason=evil, timestamp=2e9)
    (run / "config.json").write_text(json.dumps({"checkpoint": f"{evil}.pt", "steps": 240, "vote_rule": evil}))
    score = {"scores": {evil: 1.0}, "step": 240, "name": evil, "kind": evil}
    (run / "EVAL_evil_step_240.json").write_text(json.dumps(score))
    with served(run) as found:
        open_page(browser, found.url)
        wait_for(lambda: "<img src=x" in text_of(browser, "#samples"))
        assert "<img src=x" in text_of(browser, "#events") and "<script>" in text_of(browser, "#scores")
        assert browser.execute_script("return document.querySelectorAll('main img, main script').length") == 0
        assert browser.title != "owned"
        no_complaints(browser)


def test_runs_are_compared_zoomed_and_seen_on_a_phone(browser: Any, run: Path, tmp_path: Path) -> None:
    other = cut(copy_run(tmp_path / "other"), 100)
    with served(run, other) as found:
        open_page(browser, found.url)
        labels = browser.execute_script("return monitor.charts.loss.chart.series.map(s => s.label)")
        assert labels == ["step", "run training", "run smoothed", "run held-out", "other training", "other smoothed",
                          "other held-out"]  # fmt: skip
        browser.execute_script("monitor.charts.loss.page.zoom({from: 30, to: 60})")
        ranges = "return Object.values(monitor.charts).map(c => [c.chart.scales.x.min, c.chart.scales.x.max])"
        wait_for(lambda: browser.execute_script(ranges) == [[30, 60]] * 6)
        assert browser.execute_script("return monitor.runs.map(run => run.steps.length)") == [31, 31]
        browser.execute_script("document.querySelectorAll('.run .name')[1].click()")
        wait_for(lambda: "step 100 of 240" in text_of(browser, "#now"))
        size = {"width": 390, "height": 800, "deviceScaleFactor": 2, "mobile": True}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        try:
            open_page(browser, found.url)
            assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
            assert browser.execute_script("return monitor.charts.heat.chart.width") <= 390
        finally:
            browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        no_complaints(browser)
