"""How far a run is: a bar and curves in a notebook, a line on a terminal, a line per stage in a log.

view = LiveView(run_dir)
view.show(load_status(run_dir))     # as often as one likes: what is not new is not shown again
"""

import contextlib
import datetime
import html
import os
import shutil
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

from bridgekit.alive import LOOK_SECONDS
from bridgekit.runs import load_jsonl, load_status, write_status

FOLLOWED = "BRIDGEKIT_FOLLOWED"  # the folder whose status a waiting terminal shows; a notebook's view writes it there


class LiveView:
    """Progress in one place: bar and curves in a notebook, a line on a terminal, a line per stage in a log."""

    def __init__(self, run_dir: Path | None = None) -> None:
        shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
        self.in_notebook = type(shell).__name__ == "ZMQInteractiveShell"
        self.on_terminal = not self.in_notebook and sys.stdout.isatty()
        self.followed = os.environ.get(FOLLOWED) if self.in_notebook else None
        self.run_dir, self.text, self.news = run_dir, "", ()
        self.display_id, self.is_displayed = uuid.uuid4().hex, False  # of the notebook's output

    def show(self, status: dict) -> None:
        """The status, if it says anything new."""
        text = describe_progress(status)
        if text == self.text:
            return
        self.text, before = text, self.news
        self.news = tuple(map(status.get, ("stage", "val_accuracy", "best", "state")))
        if self.followed:  # the terminal that waits for this notebook shows it too
            write_status(self.followed, **status | {"state": "running", "error": None})
        if self.in_notebook:
            self._show_in_notebook(text, status)
        elif self.on_terminal:
            print(f"\r\x1b[K{text[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)
        elif self.news != before:
            print(text, flush=True)

    def _show_in_notebook(self, text: str, status: dict) -> None:
        from IPython.display import display

        bundle = {"text/plain": text, "text/html": draw_bar(status, text) + draw_curves(self.run_dir)}
        display(bundle, raw=True, display_id=self.display_id, update=self.is_displayed)
        self.is_displayed = True

    def note(self, text: str) -> None:
        """A line that stays, above the live one."""
        print(f"\r\x1b[K{text}" if self.on_terminal else text, flush=True)
        self.text = ""

    def close(self, status: dict) -> None:
        self.show(status)
        if self.on_terminal and self.text:
            print(flush=True)


def describe_progress(status: dict) -> str:
    """A status as one line of text."""
    known = {name: value for name, value in status.items() if value is not None}
    stage, spent = known.get("stage", ""), "in all" if known.get("stage", "").endswith("done") else "so far"
    parts = [stage, f"step {known.get('step', 0)}/{known['steps']}" if known.get("steps") else ""]
    names = {"loss": "loss", "val_accuracy": "val", "best": "best"}
    parts += [f"{label} {known[name]:.3f}" for name, label in names.items() if name in known]
    times = {"elapsed": spent, "seconds_left": "left"}
    parts += [f"{datetime.timedelta(seconds=round(known[k]))} {label}" for k, label in times.items() if k in known]
    parts += [f"{known['gpu_gib']} GiB of GPU memory at most"] if known.get("gpu_gib") else []
    parts += [known.get("running", ""), f"{known.get('state', 'failed')}: {known['error']}" if "error" in known else ""]
    return " · ".join(filter(None, parts))


def draw_bar(status: dict, text: str) -> str:
    """The text as HTML, under a bar where the stage counts steps."""
    bar = ""
    if steps := status.get("steps"):
        bar = f'<progress value="{status.get("step", 0) / steps:.3f}" style="width: 30em"></progress>'
    return f"{bar}<pre>{html.escape(text)}</pre>"


def draw_curves(run_dir: Path | None) -> str:
    """Training loss and validation accuracy of a run's bridge so far, side by side, as a small SVG."""
    if run_dir is None or not (run_dir / "metrics.jsonl").is_file():
        return ""
    rows = list(load_jsonl(run_dir / "metrics.jsonl", []))  # its last line may be half-written
    losses = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    shares = [(row["step"], row["eval"]["bridged"]) for row in rows if "bridged" in row.get("eval", {})]
    highest, picture = max((loss for _, loss in losses), default=1) or 1, ""
    for left, name, points, high in ((0, "loss", losses, highest), (220, "validation accuracy", shares, 1.0)):
        last = max((step for step, _ in points), default=1) or 1
        thinned = points[:: 1 + len(points) // 80]
        line = " ".join(f"{left + 200 * step / last:.0f},{78 - 60 * y / high:.0f}" for step, y in thinned)
        value = f" {points[-1][1]:.3f}" if points else ""
        picture += (
            f'<text x="{left}" y="11" font-size="11" fill="currentColor">{name}{value}</text>'
            f'<path d="M{left},18v60h200" fill="none" stroke="gray"/>'
            f'<polyline points="{line}" fill="none" stroke="currentColor" stroke-width="1.5"/>'
        )
    return f'<svg width="430" height="84">{picture}</svg>'


@contextlib.contextmanager
def following(run_dir: Path) -> Iterator[None]:
    """Show a folder's status on this terminal while something else writes it."""
    view, stop = LiveView(), threading.Event()

    def follow() -> None:
        while not stop.wait(LOOK_SECONDS):
            view.show(load_status(run_dir))

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        view.close(load_status(run_dir))
