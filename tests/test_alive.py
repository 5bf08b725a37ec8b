"""Who writes a folder, who is still alive, and that nobody outlives who asked for it.

python -m pytest tests/test_alive.py
"""

import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from bridgekit import alive, runs
from bridgekit.alive import Child, find_writer, lock_run, silence, true_status
from bridgekit.config import ConfigError

ROOT = Path(__file__).parent.parent


def python(code: str, **more) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, text=True, cwd=ROOT, **more)


def test_a_folder_has_one_writer_of_each_role_and_a_killed_one_leaves_it_free(tmp_path):
    folder = tmp_path / "run"
    code = (
        f"import sys; from bridgekit.alive import lock_run\nwith lock_run({str(folder)!r}): print('held', flush=True); "
    )
    holder = python(code + "sys.stdin.read()")
    assert holder.stdout.readline() == "held\n"
    assert find_writer(folder) == f"process {holder.pid} on {platform.node()}" == find_writer(folder, "launcher")
    with pytest.raises(ConfigError, match=f"run' is being written by process {holder.pid} on "), lock_run(folder):
        pass
    with lock_run(folder, "worker"):
        assert find_writer(folder, "worker") == f"process {os.getpid()} on {platform.node()}"
    holder.kill()
    holder.wait()
    assert find_writer(folder) == ""
    with lock_run(folder):
        pass
    assert list(tmp_path.iterdir()) == []


def test_who_only_looks_does_not_keep_a_writer_out(tmp_path):
    looks = "import sys; from bridgekit.alive import find_writer\n"
    looker = python(looks + f"print('on', flush=True)\nwhile True: find_writer({str(tmp_path / 'run')!r})")
    assert looker.stdout.readline() == "on\n"
    for _ in range(200):
        with lock_run(tmp_path / "run"):
            pass
    looker.kill()


def test_a_lock_whose_file_its_last_holder_has_removed_is_taken_again(tmp_path, monkeypatch):
    path, tries, take = alive.lock_path(tmp_path / "run", "launcher"), [], alive.take_lock

    def take_late(file, kind):
        tries.append(len(tries) or (path.unlink(), path.touch()))  # another process has made it anew
        return take(file, kind)

    monkeypatch.setattr(alive, "take_lock", take_late)
    with lock_run(tmp_path / "run"):
        assert path.exists() and len(tries) == 2


def write_beats(folder: Path, ages: dict[int, float]) -> None:
    for rank, age in ages.items():
        (folder / f"{alive.BEAT}{rank}").touch()
        os.utime(folder / f"{alive.BEAT}{rank}", (time.time() - age,) * 2)


def test_a_run_that_says_running_is_believed_only_while_somebody_runs_it(tmp_path):
    runs.write_status(tmp_path, state="running", step=7)
    with lock_run(tmp_path, "worker"):
        assert true_status(tmp_path)["state"] == "running"
    stale = true_status(tmp_path)
    assert (stale["state"], stale["step"]) == ("stale", 7) and "gone" in stale["error"]
    for pid, state in ((os.getpid(), "running"), (2**22 + 1, "stale")):  # of a notebook, between two stages
        runs.write_status(tmp_path, state="running", stage="baselines done", pid=pid)
        assert true_status(tmp_path)["state"] == state
    elsewhere = '{"state": "running", "host": "another node"}'  # whose lock is not seen here: its signs of life count
    (tmp_path / "status.json").write_text(elsewhere)
    write_beats(tmp_path, {0: 5, 1: 500})
    assert true_status(tmp_path)["state"] == "running"
    write_beats(tmp_path, {0: 100})
    assert true_status(tmp_path)["state"] == "stale"


def test_silence_is_measured_by_the_clock_of_the_file_system(tmp_path, monkeypatch):
    assert silence(tmp_path) == float("inf")
    write_beats(tmp_path, {0: 10, 1: 60})
    monkeypatch.setattr(time, "time", lambda: 0.0)  # a host whose clock is decades behind
    assert silence(tmp_path) == pytest.approx(60, abs=2) and silence(tmp_path, min) == pytest.approx(10, abs=2)


@pytest.mark.parametrize("text", ["", "{", "[1]"])
def test_a_damaged_status_is_named_and_stops_nobody(tmp_path, text):
    (tmp_path / "status.json").write_text(text)
    assert "status.json is damaged" in true_status(tmp_path)["error"]


def test_a_child_knows_its_parent_and_does_not_spin(tmp_path, monkeypatch):
    """Spinning OpenMP threads cost a run on a shared machine several times its length."""
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")  # of a group that we belong to, and a child of ours does not
    names = ("BRIDGEKIT_PARENT_PID", "GOMP_SPINCOUNT", "MORE", "WORLD_SIZE")
    code = f"import os; print(*(os.environ.get(n) for n in {names}))"
    for expected in ("30000", "7"):
        Child(tmp_path, [sys.executable, "-c", code], MORE="1").process.wait()
        assert (tmp_path / "train.log").read_text().splitlines()[-1].split() == [
            str(os.getpid()),
            expected,
            "1",
            "None",
        ]
        monkeypatch.setenv("GOMP_SPINCOUNT", "7")  # who sets it, has it


def test_a_machine_that_stood_still_ends_no_process_before_it_could_say_something(tmp_path):
    child = Child(tmp_path, [sys.executable, "-c", "import time; time.sleep(60)"])
    beat = tmp_path / f"{alive.BEAT}0"
    beat.touch()
    os.utime(beat, (time.time() - 1000,) * 2)
    child.looked -= 900  # so long nobody has looked
    assert child.poll() is None and not child.silent
    child.looked, child.awake = child.looked - 6, child.awake - alive.SILENT_SECONDS - 1
    assert child.poll() and "no sign of life" in child.why()


def test_a_process_that_gives_no_sign_of_life_ends_its_whole_family(tmp_path, monkeypatch):
    worker = f"from bridgekit.alive import watch_parent; watch_parent({str(tmp_path)!r}); import time; time.sleep(60)"
    launcher = f"import subprocess, sys; sys.exit(subprocess.call({[sys.executable, '-c', worker]!r}))"
    monkeypatch.setattr(alive, "SILENT_SECONDS", 3)
    monkeypatch.setattr(alive, "BEAT_SECONDS", 1)
    child = Child(tmp_path, [sys.executable, "-c", launcher])
    while not list(tmp_path.glob(f"{alive.BEAT}*")):
        assert child.poll() is None
        time.sleep(0.1)
    (stopped,) = child.family()
    stopped.suspend()
    end = time.monotonic() + 30
    while child.poll() is None and time.monotonic() < end:
        time.sleep(0.1)
    assert child.process.returncode and "no sign of life for" in child.why()
    assert psutil.wait_procs([stopped], timeout=5)[1] == []
    assert not list(tmp_path.glob(f"{alive.BEAT}*"))


@pytest.mark.parametrize("gone", ["asker", "launcher"])
def test_a_worker_is_asked_to_stop_when_who_it_works_for_is_gone(tmp_path, gone):
    worker = (
        "import signal, sys, time; from bridgekit.alive import watch_parent\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('asked', flush=True), sys.exit(75)))\n"
        f"watch_parent({str(tmp_path)!r}); print('on', flush=True); time.sleep(60)"
    )
    asker = python("import time; time.sleep(60)")
    environment = os.environ | {"BRIDGEKIT_PARENT_PID": str(asker.pid)}
    launcher = python(f"import subprocess, sys; subprocess.call({[sys.executable, '-c', worker]!r})", env=environment)
    assert launcher.stdout.readline() == "on\n"
    (left,) = psutil.Process(launcher.pid).children()
    (asker if gone == "asker" else launcher).kill()
    (asker if gone == "asker" else launcher).wait(30)
    assert launcher.stdout.readline() == "asked\n"
    psutil.wait_procs([left], timeout=10)
    assert not left.is_running()
    asker.kill()


def test_a_process_whose_folder_is_gone_ends_at_once_and_says_so(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    code = "from bridgekit import alive; import time; alive.BEAT_SECONDS = 1\n"
    worker = python(f"{code}alive.watch_parent({str(folder)!r}); print('on', flush=True); time.sleep(60)", stderr=-1)
    assert worker.stdout.readline() == "on\n"
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    assert worker.wait(20) == 2 and f"run folder {folder} is gone" in worker.stderr.read()
    assert not folder.exists()


SIGKILL = "a training process was killed by SIGKILL"


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ("step 1\nerror: train.lr: too high\nTraceback\nValueError: x\n", "train.lr: too high"),
        ("[rank0]: torch.OutOfMemoryError: No room.\n", "torch.OutOfMemoryError: No room."),
        ("KeyError: 'a'\nsubprocess.CalledProcessError: Command '[...]' returned 1.\n", "KeyError: 'a'"),
        ("subprocess.CalledProcessError: Command '[..]' died with <Signals.SIGKILL: 9>.\n", SIGKILL),
        ("torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n  error_file: <N/A>\n", None),
        ("  traceback : Signal 9 (SIGKILL) received by PID 77\n", SIGKILL),
        ("\xff\x00 loss 0.1", None),
    ],
)
def test_the_reason_of_an_end_is_read_from_the_log(tmp_path, log, reason):
    path = tmp_path / "train.log"
    path.write_bytes(b"error: of an earlier stage\n" + log.encode("latin-1"))
    assert alive.find_error(path, len("error: of an earlier stage\n")) == reason


def test_signals_wait_while_children_are_ended():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has it ignored
    try:
        with alive.unless_in_thread(signal.SIGINT):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)
    finally:
        signal.signal(signal.SIGINT, before)
