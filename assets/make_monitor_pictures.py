"""Pictures of both monitors, of a recorded run: assets/monitor_terminal.png, monitor_web.png, monitor_phone.png.

    python assets/make_monitor_pictures.py runs/watch/run

The run of the README's pictures: tiny_coder, 240 steps, two layers every 20 steps from step 40 on.

    python qwen_prime_importer.py --model assets/tiny_coder --output runs/watch/tiny_coder_prime_init.pt
    python qwen_prime_train.py --checkpoint runs/watch/tiny_coder_prime_init.pt --data assets/stdlib_instruct.jsonl \
        --output-dir runs/watch/run --steps 240 --batch-size 1 --grad-accum 2 --lr 3e-4 --peel 40:20:2 --save-every 60 \
        --eval-every 30 --sample-every 60 --keep-last 5

The terminal is shown as it was at step 65, in the middle of the layer peel. Needs Chromium and its driver.
"""

from __future__ import annotations

import base64
import io
import json
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.terminal_theme import TerminalTheme

ASSETS = Path(__file__).resolve().parent
sys.path.insert(0, str(ASSETS.parent))

from monitor_terminal import render  # noqa: E402
from monitor_web import Board, Guard, Server  # noqa: E402
from run_reader import Run  # noqa: E402

MIDDLE = 65
THEME = TerminalTheme(
    (16, 21, 28),
    (228, 233, 240),
    [
        *((40, 50, 62), (255, 138, 128), (62, 207, 159), (230, 162, 60)),
        *((86, 180, 233), (227, 155, 200), (94, 200, 215), (228, 233, 240)),
    ],
)
HTML = """<!doctype html><meta charset="utf-8"><style>{stylesheet}
body {{ margin: 0; background: #10151c; color: #e4e9f0; }}
pre {{ margin: 0; padding: 20px 24px; display: inline-block; font: 15px/1.3 "DejaVu Sans Mono", monospace; }}
</style><pre>{code}</pre>"""


def terminal_page(folder: Path, steps: int, width: int = 96) -> str:
    """A frame of the run as it was after so many steps, as HTML."""
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / "runs" / "coder"
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.pt", "EVAL_*"))
        for name in ("stats.jsonl", "events.jsonl", "samples.jsonl"):
            lines = [line for line in (copy / name).read_text().splitlines() if json.loads(line)["step"] <= steps]
            (copy / name).write_text("".join(line + "\n" for line in lines))
        # Its process is long gone, but was not then.
        events = (copy / "events.jsonl").read_text().splitlines()
        start = {k: v for k, v in json.loads(events[0]).items() if k != "process"}
        (copy / "events.jsonl").write_text("\n".join([json.dumps(start), *events[1:]]) + "\n")
        run = Run(copy)
        run.read_all()
        run.folder = folder
        console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True, color_system="truecolor")
        console.print(render(run, run.history.value("timestamp") + 2, width), no_wrap=True)
        return console.export_html(theme=THEME, code_format=HTML)


class Camera:
    """Headless Chromium."""

    def __init__(self) -> None:
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium") or ""
        for switch in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "hide-scrollbars"):
            options.add_argument(f"--{switch}")
        options.add_argument(f"--user-data-dir={tempfile.mkdtemp()}")
        self.driver: Any = webdriver.Chrome(
            options=options, service=webdriver.ChromeService(shutil.which("chromedriver"))
        )

    def take(self, url: str, path: Path, width: int, height: int, *, dark: bool, sharp: float = 1.5) -> None:
        """Picture of a page; a ``height`` of 0 takes all of it."""
        size = {"width": width, "height": height or 800, "deviceScaleFactor": sharp, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.driver.get(url)
        while url.startswith("http") and not self.driver.execute_script(
            "return document.documentElement.dataset.ready"
        ):
            time.sleep(0.1)
        if height == 0:
            tall = self.driver.execute_script("return Math.ceil(document.body.getBoundingClientRect().height)")
            self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {**size, "height": tall})
        time.sleep(1.0)
        shot = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})
        path.write_bytes(base64.b64decode(shot["data"]))


def main(folder: Path) -> int:
    camera = Camera()
    with tempfile.TemporaryDirectory() as place:
        page = Path(place) / "terminal.html"
        page.write_text(terminal_page(folder, MIDDLE), encoding="utf-8")
        camera.take(page.as_uri(), ASSETS / "monitor_terminal.png", 920, 0, dark=True)
    board = Board([folder])
    server = Server(("127.0.0.1", 0), board, Guard("127.0.0.1", remote=False, token=None))
    board.start()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/"
    camera.take(url, ASSETS / "monitor_web.png", 1440, 0, dark=False, sharp=1.0)
    camera.take(url, ASSETS / "monitor_phone.png", 390, 1560, dark=True)
    server.shutdown()
    board.stop()
    camera.driver.quit()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))
