"""What the first experiments' `train.log` and evaluation JSONL say, whatever is damaged in them.

    facts = load_log("runs/x/train.log")            # settings_text world_size losses logged crashes problems ...
    outcomes = load_outcomes("runs/x/eval_samples_step_final.jsonl", problems := [], "final")

A log mixes four processes, progress bars, carriage returns and generated text. It is mapped into memory and searched
for the few phrases that carry facts: 100 MB a second.
"""

from __future__ import annotations

import bisect
import itertools
import mmap
import re
import sys
from collections import Counter
from datetime import datetime
from pathlib import Path

import pandas as pd

from bridgekit.runs import load_jsonl
from bridgekit.tasks.answers import RULES, extract_answer, truncate_followups

SECTION = 1 << 16  # a configuration block or traceback is never longer than this
PATH_KEYS = ("log_dir", "save_path")  # where a run was written is no part of its configuration
REPORTED = 5  # of each kind of damage, this many lines are named

_LOSS = re.compile(rb"Step (\d+)/(\d+) \| Loss \(avg over last \d+\): ([-+.\w]+)((?: \| \w+: [-+.\w]+)*)")
_COMPONENT = re.compile(rb"\| (\w+): ([-+.\w]+)")
_FACTS = (  # (kind, phrase, what follows it): plain phrases are found ten times as fast as one pattern with all of them
    ("config", b"==== Config ====", rb""),
    ("eval", b"[Eval] Step ", rb"(\d+) \|"),
    ("final", b"[Final Eval]", rb""),
    ("world", b"World size: ", rb"(\d+)"),
    ("ranks", b" samples across ", rb"(\d+) ranks"),
    ("parameters_m", b"Translator parameters: ", rb"([\d.]+)M"),
    ("gpu", b"GPU 0: ", rb"([^\r\n]+)"),
    ("stopped_at", b"Stopping early at step ", rb"(\d+)"),
    ("saved_best", b"Saved BEST translator ", rb"\(acc=([\d.]+)\)"),
    ("trace", b"Traceback (most recent call last):", rb""),
    *(("killed", phrase, rb"") for phrase in (b"CUDA out of memory", b"oom_kill", b"oom-kill", b"SIGKILL",
                                              b"exceeded memory limit")),
)  # fmt: skip
_ACCURACY = re.compile(r"(\w+)(?:-alone)? acc: ([-+.\w]+)")
_SETTING = re.compile(r"([a-z][a-z0-9_]*): (.*)")
_NOISE = re.compile(r"\s*$|\s+\S|\[|[WEI]\d{4} |/|={3,}\s*$")  # other processes write between the settings
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>.+)')
_ERROR = re.compile(r"(?:\[rank\d+\]: ?)?[A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Exit)\b")
_LIBRARY = re.compile(r"(?:site|dist)-packages/|/lib(?:64)?/python\d")
_PER_GIB = {"GiB": 1, "MiB": 2**10, "KiB": 2**20, "bytes": 2**30}
_GIB = r"([\d.]+) (GiB|MiB|KiB|bytes)"


# -- the log ------------------------------------------------------------------------------------------------


def load_log(path: str | Path) -> dict:
    """The facts of one log; what is wrong with it is listed in `problems`, never raised."""
    path = Path(path)
    empty = path.stat().st_size == 0
    with path.open("rb") as file:
        text = b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        facts = _collect(text)
    facts["problems"] = [f"{path.name}: {p}" for p in (["the log is empty (0 bytes)"] if empty else _check(facts))]
    return facts


def _collect(text: bytes | mmap.mmap) -> dict:
    losses, places = [], []
    facts: dict = dict.fromkeys(("world_size", "gpu", "parameters_m", "saved_best", "stopped_at", "planned"))
    for found in _LOSS.finditer(text):
        places.append(found.start())
        facts["planned"] = int(found[2])
        parts = {name.decode().lower(): _number(value) for name, value in _COMPONENT.findall(found[4])}
        losses.append({"step": int(found[1]), "loss": _number(found[3])} | parts)
    facts |= {"settings_text": {}, "crashes": []}
    logged: dict[str, dict] = {}
    for place, kind, end, value in _find_facts(text):
        lines = re.split("\r\n|\r|\n", text[end : end + SECTION].decode("utf-8", "replace"))
        before = bisect.bisect_left(places, place)
        step = losses[before - 1]["step"] if before else 0
        if kind == "config" and not facts["settings_text"]:
            facts["settings_text"] = _settings(lines[1:])
        elif kind in ("eval", "final"):
            accuracies = {name.lower(): _number(v) for name, v in _ACCURACY.findall(lines[0])}
            logged[value or "final"] = accuracies
        elif kind == "world" or (kind == "ranks" and facts["world_size"] is None):
            facts["world_size"] = int(value)
        elif kind in ("parameters_m", "saved_best"):
            facts[kind] = _number(value)
        elif kind == "stopped_at":
            facts[kind] = int(value)
        elif kind == "gpu":
            facts[kind] = value.strip()
        elif kind in ("trace", "killed"):
            _add_crash(facts["crashes"], kind, step, lines, text[place:end].decode())
    facts["losses"] = pd.DataFrame(losses, columns=None if losses else ["step", "loss"])
    facts["logged"] = pd.DataFrame([{"step": step, **accuracies} for step, accuracies in logged.items()])
    return facts


def _find_facts(text: bytes | mmap.mmap) -> list[tuple[int, str, int, str]]:
    """(start, kind, end, value) of every fact, in the order in which they stand."""
    found = []
    for kind, phrase, rest in _FACTS:
        pattern, place = re.compile(rest), text.find(phrase)
        while place >= 0:
            if match := pattern.match(text, place + len(phrase)):
                value = match[1].decode("utf-8", "replace") if pattern.groups else ""
                found.append((place, kind, match.end(), value))
            place = text.find(phrase, place + len(phrase))
    return sorted(found)


def _settings(lines: list[str]) -> dict[str, str]:
    settings: dict[str, str] = {}
    for line in itertools.takewhile(lambda line: _SETTING.fullmatch(line.rstrip()) or _NOISE.match(line), lines):
        if (match := _SETTING.fullmatch(line.rstrip())) and match[1] not in PATH_KEYS:
            settings[match[1]] = match[2]
    return settings


def _add_crash(crashes: list[dict], kind: str, step: int, lines: list[str], phrase: str) -> None:
    """One crash once: every process prints its own copy, and the launcher another."""
    if kind == "trace":
        crash = _traceback(lines[1:], step)
        same = any(all(crash.get(k) == other.get(k) for k in ("step", "kind", "where")) for other in crashes)
        if not same and not (crashes and crash["kind"] == "ChildFailedError"):
            crashes.append(crash)
    elif not any(crash["kind"] == "out of memory" and crash["step"] == step for crash in crashes):
        crashes.append({"step": step} | _describe((phrase + lines[0])[:600]))


def _traceback(lines: list[str], step: int) -> dict:
    """Where a traceback came from (the innermost line outside libraries) and what it says of memory."""
    crash: dict = {"step": step, "kind": "traceback cut off", "message": ""}
    for number, line in enumerate(lines):
        frame = _FRAME.search(line)
        if frame and not _LIBRARY.search(frame["file"]):
            crash["where"] = f"{Path(frame['file']).name}:{frame['line']} in {frame['function'].strip()}"
            crash["code"] = re.sub(r"^\[rank\d+\]:", "", "".join(lines[number + 1 : number + 2])).strip()
        if _ERROR.match(line):
            return crash | _describe(line)
    return crash


def _describe(line: str) -> dict:
    """Kind, message and, for a lack of memory, GiB asked for, in use and in all."""
    rank = re.match(r"\[rank(\d+)\]: ?", line)
    text = line[rank.end() if rank else 0 :].strip()
    memory = re.search(r"out of memory|OutOfMemory|oom[-_]kill|memory limit", text, re.IGNORECASE)
    crash: dict = {"kind": "out of memory" if memory else text.split(":")[0].split(".")[-1], "message": text[:300]}
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


def _number(text: bytes | str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _check(facts: dict) -> list[str]:
    losses, logged = facts["losses"], facts["logged"]
    problems = [] if facts["settings_text"] else ["no configuration block ('==== Config ====')"]
    if losses["loss"].isna().any():
        problems.append("a loss is not a number")
    for row in logged.to_dict("records"):
        for condition, value in row.items():
            if condition != "step" and not 0 <= value <= 1 and condition in logged:
                problems.append(f"{condition} accuracy at step {row['step']} is {value}, not 0 to 1")
    if (losses["step"].diff() < 0).any():
        problems.append("steps go backwards, so two trainings were written into one log")
    if "final" not in set(logged.get("step", ())):
        why = f"crashed ({facts['crashes'][0]['kind']})" if facts["crashes"] else "no final evaluation"
        last = int(losses["step"].iloc[-1]) if len(losses) else 0
        problems.append(f"{why}, last at step {last} of {facts['planned'] or 'unknown'}")
    return problems


def load_end(path: str | Path) -> str | None:
    """The end time in a `summary.log` as ISO text (the log's own clock), or None."""
    text = Path(path).read_text(encoding="utf-8", errors="replace")[:SECTION]
    match = re.search(r"End time: \w{3} (\w{3} +\d+ [\d:]+)( [AP]M)?(?: [A-Z]{2,5})? (\d{4})", text)
    if not match:
        return None
    shape = "%b %d %I:%M:%S %p %Y" if match[2] else "%b %d %H:%M:%S %Y"
    try:
        return datetime.strptime(f"{match[1]}{match[2] or ''} {match[3]}", shape).isoformat()
    except ValueError:
        return None


# -- the answers --------------------------------------------------------------------------------------------


def load_outcomes(path: str | Path, problems: list[str], step: str | None = None) -> pd.DataFrame:
    """Frame `step index gold <condition>_pred ...` of one file by index; damage goes to `problems`.

    A damaged line is reported with its number and left out; the rest of the file is still used.
    """
    path, damage, rows, inside, keys = Path(path), {}, {}, set(), []
    if path.stat().st_size == 0:
        problems.append(f"{path.name}: the file is empty (0 bytes)")
        return pd.DataFrame(columns=["step", "index", "gold"])
    for number, row in enumerate(load_jsonl(path, broken := []), 1):
        number += len(broken)
        keys = keys or _label_keys(row)
        inside.add(str(row.get("eval_step", step)))
        if kind := _find_damage(row, keys):
            damage.setdefault(kind, []).append(number)
        elif row["index"] in rows:
            damage.setdefault("index given twice, the first is kept", []).append(number)
        else:
            rows[row["index"]] = tuple(sys.intern(str(row[key])) for key in keys)
    if broken:
        damage["not a whole JSON object: cut off or binary"] = broken
    if step is not None and inside - {str(step)}:
        damage[f"eval_step inside is {sorted(inside - {str(step)})}, the file name says {step}"] = [1]
    for kind, lines in damage.items():
        named = ", ".join(map(str, lines[:REPORTED])) + (", ..." if len(lines) > REPORTED else "")
        problems.append(f"{path.name}: {kind} (line {named}; {len(lines)} in all)")
    if not rows:
        problems.append(f"{path.name}: no usable line (needed: index, gold_extracted, *_extracted)")
    columns = ["gold", *(key.replace("_extracted", "_pred") for key in keys[1:])]
    frame = pd.DataFrame.from_dict(dict(sorted(rows.items())), orient="index", columns=columns, dtype=object)
    frame.insert(0, "index", frame.index)
    frame.insert(0, "step", str(step if step is not None else min(inside, default="")))
    return frame.reset_index(drop=True)


def _label_keys(row: dict) -> list[str]:
    """The label columns of a file, from its first row that has any condition; the gold label first."""
    found = [key for key in row if key.endswith("_extracted") and key != "gold_extracted"]
    return ["gold_extracted", *found] if found else []


def _find_damage(row: dict, keys: list[str]) -> str:
    """What a row lacks: an index, labels, or text under one of them."""
    if type(row.get("index")) is not int or not -(2**63) <= row["index"] < 2**63:
        return "no whole number under 'index'"
    if not keys:
        return "no '<condition>_extracted' key"
    return next((f"no text under '{key}'" for key in keys if type(row.get(key)) not in (str, int)), "")


def count_rescored(path: str | Path) -> pd.DataFrame:
    """Per condition and extraction rule: labels unlike the stored ones, and how many answers are right."""
    counts: dict[tuple[str, str], Counter] = {}
    for name, text, row in _each_text(path):
        stored, gold = row[f"{name}_extracted"], row.get("gold_extracted")
        for rule in RULES:
            label = extract_answer(text, rule)
            counts.setdefault((name, rule), Counter()).update(
                n=1, moved=label != stored, right_stored=stored == gold, right=label == gold,
                to_right=label == gold != stored, to_wrong=label != gold == stored,
            )  # fmt: skip
    return pd.DataFrame([{"condition": c, "rule": r, **dict(n)} for (c, r), n in counts.items()])


def count_texts(path: str | Path) -> pd.DataFrame:
    """Per condition: texts that begin by repeating the question, and texts that invent a further one."""
    counts: dict[str, Counter] = {}
    for name, text, row in _each_text(path):
        # the first 60 characters of the question asked, after the worked examples of a few-shot prompt
        asked = " ".join(str(row.get("question", "")).rsplit("Q:", 1)[-1].split("\nA:")[0].split())[:60]
        opening = " ".join(text.removeprefix("Q:").split())[: max(len(asked), 1)]
        repeats, invents = bool(asked) and opening == asked, truncate_followups(text) != text
        counts.setdefault(name, Counter()).update(n=1, repeats_question=repeats, invents_question=invents)
    return pd.DataFrame([{"condition": c, **dict(n)} for c, n in counts.items()])


def _each_text(path: str | Path):
    """(condition, text, row) of every answer of an evaluation that has a text and a label."""
    for row in load_jsonl(path, []):
        for key, text in row.items():
            name = key.removesuffix("_full")
            if key.endswith("_full") and isinstance(text, str) and f"{name}_extracted" in row:
                yield name, text, row
