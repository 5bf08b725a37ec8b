"""What the first experiments' `train.log` and evaluation JSONL say, whatever is damaged in them.

    facts = load_log("runs/x/train.log")            # settings_text world_size losses logged crashes problems ...
    outcomes = load_outcomes("runs/x/eval_samples_step_final.jsonl", problems := [], "final")

A log mixes four processes, progress bars, carriage returns and generated text: it is searched for the few phrases that
carry facts.
"""

from __future__ import annotations

import collections
import itertools
import re
from pathlib import Path

import pandas as pd

from bridgekit.runs import load_jsonl
from bridgekit.tasks.answers import RULES, extract_answer, truncate_followups

SECTION = 1 << 16  # a configuration block or traceback is never longer than this
PATH_KEYS = ("log_dir", "save_path")  # where a run was written is no part of its configuration
REPORTED = 5  # of each kind of damage, this many lines are named

FACTS = {  # fact: (what the log says, what that is); said several times, the last counts
    "world_size": (r"World size: (\d+)", int),
    "ranks": (r" samples across (\d+) ranks", int),
    "gpu": (r"GPU 0: (.+)", str.strip),
    "parameters_m": (r"Translator parameters: (\d+\.?\d*)M", float),
    "saved_best": (r"Saved BEST translator \(acc=(\d+\.?\d*)\)", float),
    "stopped_at": (r"Stopping early at step (\d+)", int),
}
_LOSS = re.compile(r"Step (\d+)/(\d+) \| Loss \(avg over last \d+\): ([-+.\w]+)((?: \| \w+: [-+.\w]+)*)")
_PART = re.compile(r"\| (\w+): ([-+.\w]+)")
_EVALUATION = re.compile(r"\[(?:Eval\] Step (\d+) \||Final Eval\])(.*)")
_ACCURACY = re.compile(r"([A-Z]\w*)(?:-alone)? acc: ([-+.\w]+)")
_CRASH = r"Traceback \(most recent call last\):|CUDA out of memory|oom_kill|oom-kill|SIGKILL|exceeded memory limit"
_SETTING = re.compile(r"([a-z][a-z0-9_]*): (.*)")
_NOISE = re.compile(r"\s*$|\s+\S|\[|[WEI]\d{4} |/|={3,}\s*$")  # other processes write between the settings
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>.+)')
_ERROR = re.compile(r"(?:\[rank\d+\]: ?)?[A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Exit)\b")
_LIBRARY = re.compile(r"(?:site|dist)-packages/|/lib(?:64)?/python\d")
_MEMORY = re.compile(r"out of memory|OutOfMemory|oom[-_]kill|memory limit", re.IGNORECASE)
_MEMORY = re.compile(r"out of memory|OutOfMemory|oom[-_]kill|memory limit", re.IGNORECASE)
_PER_GIB = {"GiB": 1, "MiB": 2**10, "KiB": 2**20, "bytes": 2**30}
_GIB = r"(\d+\.?\d*) (GiB|MiB|KiB|bytes)"
_AMOUNTS = {"asked_gib": f"allocate {_GIB}", "total_gib": f"capacity of {_GIB}"}
_AMOUNTS["in_use_gib"] = f"{_GIB} (?:memory in use|already allocated)"


# -- the log ------------------------------------------------------------------------------------------------


def load_log(path: str | Path) -> dict:
    """The facts of one log; what is wrong with it is listed in `problems`, never raised."""
    text = Path(path).read_text(encoding="utf-8", errors="replace")  # every kind of line end becomes a new line
    found = {name: re.findall(pattern, text) for name, (pattern, _) in FACTS.items()}
    facts = {name: kind(found[name][-1]) if found[name] else None for name, (_, kind) in FACTS.items()}
    ranks = facts.pop("ranks")
    facts["world_size"] = facts["world_size"] or ranks
    steps = list(_LOSS.finditer(text))
    losses = [{"step": m[1], "loss": m[3]} | {k.lower(): v for k, v in _PART.findall(m[4])} for m in steps]
    logged = {m[1] or "final": {k.lower(): v for k, v in _ACCURACY.findall(m[2])} for m in _EVALUATION.finditer(text)}
    facts["losses"] = _to_numbers(pd.DataFrame(losses, columns=None if losses else ["step", "loss"]))
    facts["logged"] = _to_numbers(pd.DataFrame(logged.values(), logged)).rename_axis("step").reset_index()
    lines = text.partition("==== Config ====")[2][:SECTION].split("\n")[1:]
    block = itertools.takewhile(lambda line: _SETTING.fullmatch(line) or _NOISE.match(line), lines)
    settings = dict(match.groups() for line in block if (match := _SETTING.fullmatch(line.rstrip())))
    facts["settings_text"] = {key: value for key, value in settings.items() if key not in PATH_KEYS}
    facts["crashes"] = []
    for match in re.finditer(_CRASH, text):
        step = next((int(m[1]) for m in reversed(steps) if m.start() < match.start()), 0)
        _add_crash(facts["crashes"], step, text[match.start() : match.start() + SECTION].split("\n"))
    problems = _find_problems(facts, steps[-1][2] if steps else "unknown") if text else ["the log is empty (0 bytes)"]
    return facts | {"problems": [f"{Path(path).name}: {problem}" for problem in problems]}


def _to_numbers(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.apply(pd.to_numeric, errors="coerce")


def _add_crash(crashes: list[dict], step: int, lines: list[str]) -> None:
    """One crash once: every process prints its own copy, the launcher another, and a traceback ends in its cause."""
    crash, parts = {"step": step} | _describe_crash(lines), ("step", "kind", "where")
    same = any(all(crash.get(part, other.get(part)) == other.get(part) for part in parts) for other in crashes)
    if not same and not (crashes and crash["kind"] == "ChildFailedError"):
        crashes.append(crash)


def _describe_crash(lines: list[str]) -> dict:
    """Kind and message, the innermost line outside libraries, and GiB asked for, in use and in all."""
    crash, end = {"kind": "traceback cut off", "message": ""}, 0
    if lines[0].startswith("Traceback"):
        end = next((number for number, line in enumerate(lines) if _ERROR.match(line)), None)
        for number, line in enumerate(lines[:end]):
            if (frame := _FRAME.search(line)) and not _LIBRARY.search(frame["file"]):
                crash["where"] = f"{Path(frame['file']).name}:{frame['line']} in {frame['function'].strip()}"
                crash["code"] = re.sub(r"^\[rank\d+\]:", "", "".join(lines[number + 1 : number + 2])).strip()
    if end is None:
        return crash
    rank, text = re.match(r"(?:\[rank(\d+)\]: ?)?(.*)", lines[end]).groups()
    kind = "out of memory" if _MEMORY.search(text) else text.split(":")[0].split(".")[-1]
    crash |= {"kind": kind, "message": text[:300].strip()} | ({"rank": int(rank)} if rank else {})
    amounts = {name: match for name, pattern in _AMOUNTS.items() if (match := re.search(pattern, text))}
    return crash | {name: round(float(match[1]) / _PER_GIB[match[2]], 3) for name, match in amounts.items()}


def _find_problems(facts: dict, planned: str) -> list[str]:
    losses, logged = facts["losses"], facts["logged"]
    checks = {
        "no configuration block ('==== Config ====')": not facts["settings_text"],
        "a loss is not a number": losses["loss"].isna().any(),
        "steps go backwards, so two trainings were written into one log": (losses["step"].diff() < 0).any(),
    }
    accuracies = logged.melt("step", var_name="condition")
    for row in accuracies[~accuracies["value"].between(0, 1)].itertuples():
        checks[f"{row.condition} accuracy at step {row.step} is {row.value}, not 0 to 1"] = True
    why = f"crashed ({facts['crashes'][0]['kind']})" if facts["crashes"] else "no final evaluation"
    last = losses["step"].iloc[-1] if len(losses) else 0
    checks[f"{why}, last at step {last} of {planned}"] = "final" not in set(logged["step"])
    return [problem for problem, holds in checks.items() if holds]


def parse_time(text: str) -> str | None:
    """A moment as ISO text, on the run's own clock; None where it is none."""
    moment = pd.to_datetime(text, errors="coerce")
    return None if pd.isna(moment) else moment.isoformat()


def load_end(path: str | Path) -> str | None:
    """The end time in a `summary.log`."""
    text = Path(path).read_text(encoding="utf-8", errors="replace")
    match = re.search(r"End time: \w{3} (\w{3} +\d+) ([\d:]+(?: [AP]M)?)(?: [A-Z]{2,5})? (\d{4})", text)
    return parse_time(f"{match[1]} {match[3]} {match[2]}") if match else None


# -- the answers --------------------------------------------------------------------------------------------


def load_outcomes(path: str | Path, problems: list[str], step: str) -> pd.DataFrame:
    """Frame `step index gold <condition>_pred ...` of one file by index; damage goes to `problems`.

    A damaged line is reported with its number and left out; the rest of the file is still used. Problems about units
    met in training are no part of any score.
    """
    path, rows, keys, broken = Path(path), {}, [], []
    damage, steps = collections.defaultdict(list), set()
    for number, row in enumerate(load_jsonl(path, broken), 1):
        labels = [key for key in row if key.endswith("_extracted") and key != "gold_extracted"]
        keys = keys or (["gold_extracted", *labels] if labels else [])
        lacking = [f"no text under '{key}'" for key in keys if type(row.get(key)) not in (str, int)]
        lacking = lacking if keys else ["no '<condition>_extracted' key"]
        steps.add(str(row.get("eval_step", step)))
        if type(row.get("index")) is not int or abs(row["index"]) >= 2**63:
            damage["no whole number under 'index'"].append(number + len(broken))
        elif lacking:
            damage[lacking[0]].append(number + len(broken))
        elif row["index"] in rows:
            damage["index given twice, the first is kept"].append(number + len(broken))
        elif row.get("novelty") != "seen":
            rows[row["index"]] = [str(row[key]) for key in keys]
    damage["not a whole JSON object: cut off or binary"] = broken
    others = sorted(steps - {step})
    damage[f"eval_step inside is {others}, the file name says {step}"] = [1] * bool(others)
    for kind, lines in damage.items():
        if lines:
            named = ", ".join(map(str, lines[:REPORTED])) + (", ..." if len(lines) > REPORTED else "")
            problems.append(f"{path.name}: {kind} (line {named}; {len(lines)} in all)")
    if not rows:
        empty = path.stat().st_size == 0
        why = "the file is empty (0 bytes)" if empty else "no usable line (needed: index, gold_extracted, *_extracted)"
        problems.append(f"{path.name}: {why}")
    columns = ["gold", *(key.replace("_extracted", "_pred") for key in keys[1:])]
    frame = pd.DataFrame.from_dict(dict(sorted(rows.items())), orient="index", columns=columns, dtype=object)
    frame = frame.rename_axis("index").reset_index()
    frame.insert(0, "step", step)
    return frame


def load_texts(path: str | Path, step: str) -> pd.DataFrame:
    """Answers that have a text and a label: step condition text label gold question."""
    rows = [
        (step, key.removesuffix("_full"), text, row[label], row.get("gold_extracted"), str(row.get("question", "")))
        for row in load_jsonl(path, [])
        for key, text in row.items()
        if key.endswith("_full") and isinstance(text, str) and (label := key.replace("_full", "_extracted")) in row
    ]
    return pd.DataFrame(rows, columns=["step", "condition", "text", "label", "gold", "question"])


def count_rescored(texts: pd.DataFrame) -> pd.DataFrame:
    """Per step, condition and extraction rule: labels unlike the stored ones, and how many answers are right."""
    table = texts.merge(pd.Series(list(RULES), name="rule"), how="cross")
    label = pd.Series(map(extract_answer, table["text"], table["rule"]), dtype=object)
    stored, right = table["label"] == table["gold"], label == table["gold"]
    counts = {"n": 1, "moved": label != table["label"], "right_stored": stored, "right": right}
    counts |= {"to_right": right & ~stored, "to_wrong": stored & ~right}
    return _sum_up(table, ["step", "condition", "rule"], counts)


def count_repeats(texts: pd.DataFrame) -> pd.DataFrame:
    """Per step and condition: texts that begin by repeating the question, and texts that invent a further one."""
    # the first 60 characters of the question asked, after the worked examples of a few-shot prompt
    asked = [" ".join(q.rsplit("Q:", 1)[-1].split("\nA:")[0].split())[:60] for q in texts["question"]]
    opening = [" ".join(text.removeprefix("Q:").split()) for text in texts["text"]]
    repeats = [bool(start) and text.startswith(start) for start, text in zip(asked, opening, strict=True)]
    invents = texts["text"].map(truncate_followups) != texts["text"]
    return _sum_up(texts, ["step", "condition"], {"n": 1, "repeats_question": repeats, "invents_question": invents})


def _sum_up(table: pd.DataFrame, by: list[str], counts: dict) -> pd.DataFrame:
    return table.assign(**counts).groupby(by, sort=False)[list(counts)].sum().reset_index()
