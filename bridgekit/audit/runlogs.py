"""Read the facts out of a `train.log` of any size: configuration, losses, evaluations, stopping, crashes.

    from bridgekit.audit.runlogs import read_log
    facts = read_log("runs/x/train.log")

The first experiments' logs mix four processes, progress bars, carriage returns and generated text. The
file is searched in blocks for the few phrases that carry facts: 500 MB cost seconds and little memory.
"""

from __future__ import annotations

import bisect
import re
from array import array
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

BLOCK = 4 << 20
LONGEST_LINE = 1 << 20  # text without a line end beyond this is dropped except for its tail
LONGEST_SECTION = 1 << 16  # a configuration block or traceback is never longer than this
PATH_KEYS = ("log_dir", "save_path")  # where a run was written is no part of its configuration

_LOSS = re.compile(rb"Step (\d+)/(\d+) \| Loss \(avg over last \d+\): ([-+.\w]+)((?: \| \w+: [-+.\w]+)*)")
_COMPONENT = re.compile(rb"\| (\w+): ([-+.\w]+)")
# Each fact stands behind a phrase that is searched for as plain bytes: an alternation is ten times as slow.
_FACTS = {
    phrase: re.compile(re.escape(phrase) + rest)
    for phrase, rest in (
        (b"==== Config ====", rb"(?P<config>)"),
        (b"[Eval] Step ", rb"(?P<eval>\d+) \|"),
        (b"[Final Eval]", rb"(?P<final>)"),
        (b"World size: ", rb"(?P<world>\d+)"),
        (b" samples across ", rb"(?P<ranks>\d+) ranks"),
        (b"Translator parameters: ", rb"(?P<params>[\d.]+)M"),
        (b"GPU 0: ", rb"(?P<gpu>[^\r\n]+)"),
        (b"New best bridged acc: ", rb"(?P<best>[\d.]+)"),
        (b"Stopping early at step ", rb"(?P<stop>\d+)"),
        (b"Saved BEST translator ", rb"\(acc=(?P<saved>[\d.]+)\)"),
        (b"Traceback (most recent call last):", rb"(?P<trace>)"),
        (b"CUDA out of memory", rb"(?P<oom>)"),
        (b"oom_kill", rb"(?P<killed>)"),
        (b"oom-kill", rb"(?P<killed>)"),
        (b"SIGKILL", rb"(?P<killed>)"),
        (b"exceeded memory limit", rb"(?P<killed>)"),
    )
}
_ACCURACY = re.compile(rb"(\w+)(?:-alone)? acc: ([-+.\w]+)")
_SETTING = re.compile(r"([a-z][a-z0-9_]*): (.*)")
_NOISE = re.compile(r"\s*$|\s+\S|\[|[WEI]\d{4} |/|={3,}\s*$")  # other processes write between the settings
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>.+)')
_ERROR = re.compile(r"(?:\[rank\d+\]: ?)?[A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Exit)\b")
_LIBRARY = re.compile(r"(?:site|dist)-packages/|/lib(?:64)?/python\d")
_PER_GIB = {"GiB": 1, "MiB": 2**10, "KiB": 2**20, "bytes": 2**30}
_GIB = r"([\d.]+) (GiB|MiB|KiB|bytes)"


@dataclass
class LogFacts:
    """What one training log says; `settings` keep the logged text, to be compared cell for cell."""

    settings: dict[str, str] = field(default_factory=dict)
    world_size: int | None = None
    parameters_m: float | None = None
    gpu: str | None = None
    planned_steps: int | None = None
    steps: array = field(default_factory=lambda: array("l"))
    losses: array = field(default_factory=lambda: array("d"))
    components: dict[str, dict[int, float]] = field(default_factory=dict)  # name -> step -> value
    evaluations: dict[str, dict[str, float]] = field(default_factory=dict)  # step -> condition
    best_steps: list[tuple[str, float]] = field(default_factory=list)
    saved_best: float | None = None
    stopped_at: int | None = None
    crashes: list[dict] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def last_step(self) -> int:
        return self.steps[-1] if self.steps else 0


def read_log(path: str | Path) -> LogFacts:
    """Collect the facts of one log; what is wrong with it is listed in `problems`, never raised."""
    path, facts = Path(path), LogFacts()
    rest = b""
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            buffer = rest + block
            used = _search(buffer[: _last_line_end(buffer)], facts, complete=False)
            rest = buffer[used:]
            if len(rest) > LONGEST_LINE:
                rest = rest[-LONGEST_SECTION:]
    _search(rest, facts, complete=True)
    _check(path, facts)
    return facts


def _last_line_end(buffer: bytes) -> int:
    return max(buffer.rfind(b"\n"), buffer.rfind(b"\r")) + 1


def _search(buffer: bytes, facts: LogFacts, complete: bool) -> int:
    """Read one block up to a line end; returns how much is done (an open section waits for more)."""
    used = len(buffer)
    found = _find_facts(buffer)
    for match in found:
        open_section = match.lastgroup in ("config", "trace") and not complete
        if open_section and used - match.start() < LONGEST_SECTION and _section_is_open(buffer, match):
            used = match.start()
            break
    losses = _LOSS.findall(buffer, 0, used)
    _take_losses(losses, facts)
    ends = [m.start() for m in _LOSS.finditer(buffer, 0, used)] if found and losses else []
    for match in found:
        if match.start() < used:
            _take_fact(buffer, match, facts, _step_before(match.start(), ends, losses, facts))
    return used


def _find_facts(buffer: bytes) -> list[re.Match]:
    """Every fact in the block, in the order in which they stand."""
    found = []
    for phrase, pattern in _FACTS.items():
        place = buffer.find(phrase)
        while place >= 0:
            if match := pattern.match(buffer, place):
                found.append(match)
            place = buffer.find(phrase, place + len(phrase))
    return sorted(found, key=re.Match.start)


def _section_is_open(buffer: bytes, match: re.Match) -> bool:
    """True when a configuration block or traceback reaches the end of this block."""
    lines = _lines_after(buffer, match)
    if match.lastgroup == "config":
        return all(_SETTING.match(line) or _NOISE.match(line) for line in lines)
    return not any(_is_error(line) for line in lines)


def _lines_after(buffer: bytes, match: re.Match) -> list[str]:
    text = buffer[match.end() : match.end() + LONGEST_SECTION].decode("utf-8", "replace")
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")[1:]


def _take_losses(found: list[tuple], facts: LogFacts) -> None:
    for step, _, loss, components in found:
        step = int(step)
        facts.steps.append(step)
        facts.losses.append(_number(loss))
        if components:
            for name, value in _COMPONENT.findall(components):
                facts.components.setdefault(name.decode().lower(), {})[step] = _number(value)
    if found:
        facts.planned_steps = int(found[-1][1])


def _step_before(position: int, ends: list[int], losses: list[tuple], facts: LogFacts) -> int:
    """Training step reached where a fact stands in the log."""
    reached = bisect.bisect_left(ends, position)
    if reached:
        return int(losses[reached - 1][0])
    before = len(facts.steps) - len(losses)
    return facts.steps[before - 1] if before else 0


def _take_fact(buffer: bytes, match: re.Match, facts: LogFacts, step: int) -> None:
    kind, value = match.lastgroup, match[match.lastgroup]
    if kind == "config" and not facts.settings:
        facts.settings = _settings(_lines_after(buffer, match))
    elif kind in ("eval", "final"):
        line = re.split(rb"[\r\n]", buffer[match.end() : match.end() + 400], maxsplit=1)[0]
        accuracies = {name.decode().lower(): _number(v) for name, v in _ACCURACY.findall(line)}
        facts.evaluations["final" if kind == "final" else value.decode()] = accuracies
    elif kind == "world" or (kind == "ranks" and facts.world_size is None):
        facts.world_size = int(value)
    elif kind == "params":
        facts.parameters_m = float(value)
    elif kind == "gpu":
        facts.gpu = value.decode("utf-8", "replace").strip()
    elif kind == "best":
        facts.best_steps.append((next(reversed(facts.evaluations), "0"), float(value)))
    elif kind == "stop":
        facts.stopped_at = int(value)
    elif kind == "saved":
        facts.saved_best = float(value)
    elif kind == "trace":
        crash = _traceback(_lines_after(buffer, match), step)
        same = ("step", "kind", "where")
        known = any(all(crash.get(k) == other.get(k) for k in same) for other in facts.crashes)
        reported = facts.crashes and crash["kind"] == "ChildFailedError"
        if not known and not reported:  # every process prints its own copy, and the launcher another
            facts.crashes.append(crash)
    elif kind in ("oom", "killed") and not _belongs_to_traceback(facts, step):
        line = buffer[match.start() : match.start() + 600].decode("utf-8", "replace").splitlines()[0]
        facts.crashes.append({"step": step} | _describe(line))


def _settings(lines: list[str]) -> dict[str, str]:
    settings: dict[str, str] = {}
    for line in lines:
        if match := _SETTING.fullmatch(line.rstrip()):
            if match[1] not in PATH_KEYS:
                settings[match[1]] = match[2]
        elif not _NOISE.match(line):
            break
    return settings


def _is_error(line: str) -> bool:
    return _ERROR.match(line) is not None


def _traceback(lines: list[str], step: int) -> dict:
    """Where a traceback came from (the innermost line outside libraries) and what it says of memory."""
    crash: dict = {"step": step, "kind": "traceback cut off", "message": ""}
    for number, line in enumerate(lines):
        frame = _FRAME.search(line)
        if frame and not _LIBRARY.search(frame["file"]):
            crash["where"] = f"{Path(frame['file']).name}:{frame['line']} in {frame['function'].strip()}"
            code = "".join(lines[number + 1 : number + 2])
            crash["code"] = re.sub(r"^\[rank\d+\]:", "", code).strip()
        if _is_error(line):
            return crash | _describe(line)
    return crash


def _describe(line: str) -> dict:
    """Kind, message and, for a lack of memory, GiB asked for, in use and in all."""
    rank = re.match(r"\[rank(\d+)\]: ?", line)
    text = line[rank.end() if rank else 0 :].strip()
    memory = re.search(r"out of memory|OutOfMemory|oom[-_]kill|memory limit", text, re.IGNORECASE)
    kind = "out of memory" if memory else text.split(":")[0].split(".")[-1]
    crash: dict = {"kind": kind, "message": text[:300]}
    if rank:
        crash["rank"] = int(rank[1])
    for name, pattern in (
        ("asked_gib", rf"allocate {_GIB}"),
        ("total_gib", rf"capacity of {_GIB}"),
        ("in_use_gib", rf"has {_GIB} memory in use|{_GIB} already allocated"),
    ):
        if found := re.search(pattern, text):
            amount, unit = [part for part in found.groups() if part]
            crash[name] = round(float(amount) / _PER_GIB[unit], 3)
    return crash


def _belongs_to_traceback(facts: LogFacts, step: int) -> bool:
    return any(crash["kind"] == "out of memory" and crash["step"] == step for crash in facts.crashes)


def _number(text: bytes | str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _check(path: Path, facts: LogFacts) -> None:
    name = path.name
    if path.stat().st_size == 0:
        facts.problems.append(f"{name}: the log is empty (0 bytes)")
        return
    if not facts.settings:
        facts.problems.append(f"{name}: no configuration block ('==== Config ====')")
    if any(value != value for value in facts.losses):
        facts.problems.append(f"{name}: a loss is not a number")
    for step, accuracies in facts.evaluations.items():
        for condition, value in accuracies.items():
            if not 0 <= value <= 1:
                facts.problems.append(f"{name}: {condition} accuracy at step {step} is {value}, not 0 to 1")
    if any(b < a for a, b in zip(facts.steps, facts.steps[1:], strict=False)):
        facts.problems.append(f"{name}: steps go backwards, so two trainings were written into one log")
    if "final" not in facts.evaluations:
        why = f"crashed ({facts.crashes[0]['kind']})" if facts.crashes else "no final evaluation"
        planned = facts.planned_steps or "unknown"
        facts.problems.append(f"{name}: {why}, last at step {facts.last_step} of {planned}")


def read_summary(path: str | Path) -> str | None:
    """The end time in a `summary.log` as ISO text (the log's own clock), or None."""
    text = Path(path).read_text(encoding="utf-8", errors="replace")[:LONGEST_SECTION]
    match = re.search(r"End time: \w{3} (\w{3} +\d+ [\d:]+)( [AP]M)?(?: [A-Z]{2,5})? (\d{4})", text)
    if not match:
        return None
    shape = "%b %d %I:%M:%S %p %Y" if match[2] else "%b %d %H:%M:%S %Y"
    try:
        return datetime.strptime(f"{match[1]}{match[2] or ''} {match[3]}", shape).isoformat()
    except ValueError:
        return None
