"""What is seen of a run while it works: bar and curves in a notebook, a line on a terminal, a line per stage in a log.

    view = LiveView(run_dir); view.show(load_status(run_dir)); view.close(load_status(run_dir))

A notebook's kernel may be waited for by a terminal (BRIDGEKIT_FOLLOWED names a folder): its view writes a status there.
"""

import contextlib
import datetime
import html
import os
import shutil
import sys
import threading
import typing
from pathlib import Path

from bridgekit.runs import load_jsonl, load_status, write_status

FOLLOWED = "BRIDGEKIT_FOLLOWED"  # the folder whose status a waiting terminal shows
POLL_SECONDS = 0.25


def describe_progress(status: dict) -> str:
    """A status as one line of text."""
    parts = [status.get("stage", "")]
    if status.get("steps"):
        parts.append(f"step {status.get('step', 0)}/{status['steps']}")
    for name, label in (("loss", "loss"), ("val_accuracy", "val"), ("best", "best")):
        if status.get(name) is not None:
            parts.append(f"{label} {status[name]:.3f}")
    ended = status.get("stage", "").endswith("done")
    for name, label in (("elapsed", "in all" if ended else "so far"), ("seconds_left", "left")):
        if status.get(name) is not None:
            parts.append(f"{datetime.timedelta(seconds=round(status[name]))} {label}")
    parts.append(status.get("running", ""))  # of several runs at once
    if status.get("error"):
        parts.append(f"failed: {status['error']}")
    return " · ".join(filter(None, parts))


class LiveView:
    """Progress in one place: bar and curves in a notebook, a line on a terminal, a line per stage in a log."""

    def __init__(self, run_dir: Path | None = None) -> None:
        shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
        self.in_notebook = type(shell).__name__ == "ZMQInteractiveShell"
        self.on_terminal = not self.in_notebook and sys.stdout.isatty()
        self.run_dir = run_dir
        followed = os.environ.get(FOLLOWED)
        self.followed = Path(followed) if followed and self.in_notebook else None
        self.handle = None  # of the notebook's output
        self.text = ""
        self.news: tuple = ()

    def show(self, status: dict) -> None:
        text = describe_progress(status)
        if text == self.text:
            return
        self.text = text
        if self.followed:  # the terminal that waits for this notebook shows it too
            write_status(self.followed, **status | {"state": "running", "error": None})
        if self.in_notebook:
            self._show_in_notebook(text, status)
        elif self.on_terminal:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[K{text[:width]}", end="", flush=True)
        else:
            news = (status.get("stage"), status.get("val_accuracy"), status.get("best"), status.get("state"))
            if news != self.news:
                print(text, flush=True)
            self.news = news

    def _show_in_notebook(self, text: str, status: dict) -> None:
        from IPython.display import display

        share = status.get("step", 0) / status["steps"] if status.get("steps") else 0.0
        picture = f'<progress value="{share:.3f}" style="width: 30em"></progress><pre>{html.escape(text)}</pre>'
        bundle = {"text/plain": text, "text/html": picture + draw_curves(self.run_dir)}
        if self.handle is None:
            self.handle = display(bundle, raw=True, display_id=True)
        else:
            self.handle.update(bundle, raw=True)

    def note(self, text: str) -> None:
        """A line that stays, above the live one."""
        print(f"\r\x1b[K{text}" if self.on_terminal else text, flush=True)
        self.text = ""

    def close(self, status: dict) -> None:
        self.show(status)
        if self.on_terminal and self.text:
            print(flush=True)


def draw_curves(run_dir: Path | None) -> str:
    """Training loss and validation accuracy of a run's bridge so far, side by side, as a small SVG."""
    if run_dir is None or not (run_dir / "metrics.jsonl").is_file():
        return ""
    rows = list(load_jsonl(run_dir / "metrics.jsonl", []))  # its last line may be half-written
    losses = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    right = [(row["step"], row["eval"]["bridged"]) for row in rows if "bridged" in row.get("eval", {})]
    drawn = []
    for left, name, points, high in ((0, "loss", losses, max((y for _, y in losses), default=1)),
                                     (220, "validation accuracy", right, 1.0)):  # fmt: skip
        thinned = points[:: 1 + len(points) // 80]
        last = max((x for x, _ in points), default=1) or 1
        line = " ".join(f"{left + 200 * x / last:.0f},{78 - 60 * y / (high or 1):.0f}" for x, y in thinned)
        value = f" {points[-1][1]:.3f}" if points else ""
        drawn.append(
            f'<text x="{left}" y="11" font-size="11" fill="currentColor">{name}{value}</text>'
            f'<path d="M{left},18v60h200" fill="none" stroke="gray"/>'
            f'<polyline points="{line}" fill="none" stroke="currentColor" stroke-width="1.5"/>'
        )
    return f'<svg width="430" height="84">{"".join(drawn)}</svg>'


@contextlib.contextmanager
def following(run_dir: Path) -> typing.Iterator[None]:
    """Show a folder's status on this terminal while something else writes it."""
    view, stop = LiveView(), threading.Event()

    def follow() -> None:
        while not stop.wait(POLL_SECONDS):
            view.show(load_status(run_dir))

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        view.close(load_status(run_dir))
