"""Children and headless notebooks: progress, failure, nothing left alive. Two tests start real processes.

python -m pytest tests/test_launch.py
"""

import ast
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import papermill
import psutil
import pytest
import yaml

from bridgekit import launch, runs
from bridgekit.alive import Child
from bridgekit.config import ConfigError, load_config
from bridgekit.results import live

ROOT = Path(__file__).parent.parent
TINY = """\
task.n_train=64 task.n_val=16 task.n_test=16 train.val_samples=8 train.eval_every=4 train.warmup_steps=1
eval.max_new_tokens=8 eval.conditions=[source,target,bridged,shuffled] train.controls=[] bridge.bridge_dim=16
bridge.heads=2 bridge.depth=1 bridge.n_soft_tokens=4""".split()
KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
SECRETS, CANARY = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"), "hf_canary7391"
CELLS = {  # of small notebooks: one that trains as phase1 does, and one that has no run folder of its own
    "phase1": [
        'name = "phase1"\nsteps = 2\nrun_dir = ""\noverrides = []',
        "from bridgekit import launch\nfrom bridgekit.config import load_config\n"
        'launch.refuse_unknown("phase1", globals())',
        "config = load_config(overrides=overrides, name=name, steps=steps)\n"
        "run_dir = launch.open_run(config, run_dir)\nlaunch.run_stage(run_dir, 'train')",
    ],
    "slow": [
        'folder = ""',
        "import subprocess, time\nfrom bridgekit.results.live import LiveView\n"
        "LiveView().show({'stage': '3 of 9 runs finished'})\nsubprocess.Popen(['sleep', '600'])\ntime.sleep(600)",
    ],
}


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A project folder of its own, with the two notebooks; the package is found from there too."""
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / "notebooks").mkdir()
    for name, cells in CELLS.items():
        made = [nbformat.v4.new_code_cell(text) for text in cells]
        made[0].metadata["tags"] = ["parameters"]
        notebook = nbformat.v4.new_notebook(cells=made, metadata=KERNEL)
        nbformat.write(notebook, tmp_path / "notebooks" / f"{name}.ipynb")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(project: Path, *arguments: str) -> subprocess.Popen:
    """A command of the user's, in a process of its own."""
    command = [sys.executable, "-m", "bridgekit", "run", *arguments]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **streams, cwd=project, env=os.environ | dict.fromkeys(SECRETS, CANARY))


def test_a_headless_run_leaves_what_the_notebook_shows(project):
    (project / "small.yaml").write_text(yaml.safe_dump({"notebook": "phase1", "overrides": TINY}))
    (project / "more.yaml").write_text("steps: 4\noverrides: [train.batch_size=8]\n")
    child = start(project, "notebooks/phase1.ipynb", "-f", "small.yaml", "-f", "more.yaml")
    out, err = child.communicate()
    assert child.returncode == 0, err
    (run_dir,) = project.glob("runs/phase1_*/")
    assert runs.load_run_config(run_dir).train.batch_size == 8
    (output,) = nbformat.read(run_dir / "phase1.ipynb", as_version=4).cells[-1].outputs  # one view that is replaced
    assert "done" in output.data["text/plain"] and "<svg" in output.data["text/html"]
    assert "train bridged · step " in out, "the terminal shows progress too"
    assert f"executed notebook  {run_dir / 'phase1.ipynb'}" in out and not list(run_dir.glob("*.*.ipynb"))
    page = (run_dir / "phase1.html").read_text()  # the same for any browser
    assert page.startswith("<!DOCTYPE html>") and "<svg" in page
    record = runs.json.loads((run_dir / "provenance.json").read_text())
    assert record["command"] == "bridgekit run notebooks/phase1.ipynb -f small.yaml -f more.yaml"
    written = [path for path in project.rglob("*") if path.is_file()]
    assert len(written) > 20 and not any(CANARY.encode() in path.read_bytes() for path in written), "a secret is kept"
    assert CANARY not in out + err
    before = (run_dir / "train.log").read_bytes()
    launch.run_stage(run_dir, "train")
    assert (run_dir / "train.log").read_bytes() == before, "a finished run is not trained again"
    with pytest.raises(ConfigError, match="is finished, and so is its phase1.ipynb"):
        launch.execute_notebook("notebooks/phase1.ipynb", resume=run_dir)


def test_a_command_that_is_terminated_takes_everything_with_it_and_says_so_in_one_line(project):
    child, status = start(project, "notebooks/slow.ipynb"), None
    end = time.monotonic() + 60
    while time.monotonic() < end and not (status := next(project.glob("runs/slow_*/status.json"), None)):
        time.sleep(0.1)
    assert status and runs.load_status(status.parent)["stage"] == "3 of 9 runs finished"
    time.sleep(0.5)
    family = psutil.Process(child.pid).children(recursive=True)
    child.terminate()
    out, err = child.communicate(timeout=30)
    assert child.returncode == 143 and "3 of 9 runs finished" in out
    assert err.endswith("error: terminated\n") and "Traceback" not in err
    assert len(family) > 1 and psutil.wait_procs(family[:1], timeout=5)[1] == []
    assert runs.load_status(status.parent)["error"] == "interrupted"
    assert [path.name for path in status.parent.glob("*.ipynb")] == ["slow.failed.ipynb"]


@pytest.fixture
def stage(project, monkeypatch):
    """`stage(code)`: a run whose stage is this code, in a child of a child."""

    def make(code: str) -> Path:
        inner = [sys.executable, "-c", code]
        outer = f"import subprocess, sys; sys.exit(subprocess.run({inner!r}).returncode % 256)"
        monkeypatch.setattr(launch, "training_command", lambda *arguments: [sys.executable, "-c", outer])
        return launch.open_run(load_config(overrides=TINY))

    return make


def test_an_interrupted_stage_ends_the_whole_family_even_where_its_head_hangs(stage, monkeypatch):
    run_dir, family = stage("import time; time.sleep(600)"), []

    def interrupt(child):
        head = psutil.Process(child.process.pid)
        if not head.children():
            return None
        family.extend([head, *head.children()])
        head.suspend()
        raise KeyboardInterrupt

    monkeypatch.setattr(launch.Child, "poll", interrupt)
    monkeypatch.setattr(launch.Child.end, "__defaults__", (1.0,))  # seconds that the head is given to stop
    with pytest.raises(KeyboardInterrupt):
        launch.run_stage(run_dir, "train")
    assert len(family) == 2 and not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family)
    status = runs.load_status(run_dir)
    assert (status["state"], status["error"]) == ("stopped", "interrupted")


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("print('error: train.lr: too high'); raise SystemExit(2)", "train.lr: too high"),
        ("import os; os.kill(os.getppid(), 9)", "the process ended with exit code -9"),  # the launcher itself
    ],
)
def test_a_stage_that_fails_says_why(stage, code, reason):
    run_dir = stage(code)
    with pytest.raises(RuntimeError, match=f"baselines failed: {reason} .*train.log"):
        launch.run_stage(run_dir, "baselines")
    assert runs.load_status(run_dir)["error"] == f"baselines: {reason}"


class CellError(Exception):
    """As papermill raises it."""

    ename, evalue = "ConfigError", "bridge.source_layers: no layer 99\nin the model"


@pytest.mark.parametrize(
    ("error", "reason"), [(CellError(), "bridge.source_layers: no layer 99"), (OSError(), "OSError")]
)
def test_a_notebook_that_fails_leaves_what_ran_and_one_line(project, monkeypatch, error, reason):
    def execute(notebook, executed, *arguments, **options):
        Path(executed).write_text("{}")
        raise error

    monkeypatch.setattr(papermill, "execute_notebook", execute)
    with pytest.raises(RuntimeError, match=f"^phase1.ipynb failed: {reason}; what ran is in .*phase1.failed.ipynb$"):
        launch.execute_notebook("notebooks/phase1.ipynb", overrides=TINY)
    (run_dir,) = project.glob("runs/phase1_*/")
    assert runs.load_status(run_dir)["error"] == reason and (run_dir / "phase1.failed.ipynb").is_file()


def test_a_missing_model_is_found_before_a_run_folder_is_made(project):
    with pytest.raises(ConfigError, match="pair.target_model"):
        launch.execute_notebook("notebooks/phase1.ipynb", overrides=[*TINY, "pair.target_model=./nowhere"])
    assert not (project / "runs").exists()


@pytest.mark.parametrize(
    ("cell", "named"),
    [
        ("stpes = 3", "phase1.ipynb: no parameter 'stpes': did you mean 'steps'"),
        ("lr = 0.5", "lr: not in the parameters cell of phase1"),
        ('notebook = "swap"', "parameters of 'swap', not of 'phase1'"),
        ('notebook = "phase1"\nsteps = 4', ""),
    ],
)
def test_plain_papermill_is_refused_what_the_notebook_does_not_know(project, cell, named):
    namespace = {"In": ["", "steps = 2", f"# Parameters\n{cell}\n"]}
    exec(cell, namespace)
    if not named:
        return launch.refuse_unknown("phase1", namespace)
    with pytest.raises(ConfigError, match=named):
        launch.refuse_unknown("phase1", namespace)


def test_a_run_folder_belongs_to_one_configuration_and_lies_in_the_project(project, monkeypatch):
    monkeypatch.chdir(project / "notebooks")
    run_dir = launch.open_run(load_config(overrides=TINY))
    assert run_dir.parent == project / "runs"
    config = runs.load_run_config(run_dir)
    assert launch.open_run(config, run_dir) == run_dir
    with pytest.raises(ConfigError, match="run_dir: .*phase1_.* was made with train.lr 0.001, not 0.5"):
        launch.open_run(config.with_(lr=0.5), run_dir)
    with pytest.raises(ConfigError, match="run_dir: 'nowhere' is no run folder"):
        launch.open_run(config, "nowhere")
    longer = launch.open_run(config.with_(steps=9), run_dir)
    assert longer == run_dir and runs.load_run_config(run_dir).train.steps == 9, "how long it trains may change"


def test_a_setting_without_effect_is_noted_beside_what_a_command_prints(project, capsys):
    launch.open_run(load_config(kv_mix="linear", overrides=TINY))
    shown = capsys.readouterr()
    assert "note: bridge.kv_mix has no effect here, only if bridge.injector = kv" in shown.err
    assert "note" not in shown.out


def test_a_notebook_goes_on_with_its_unfinished_run_and_a_command_begins_a_new_one(project):
    config = load_config(overrides=TINY)
    first = launch.open_run(config)
    assert launch.open_run(config) == first != (second := launch.open_run(config, new=True))
    other = launch.open_run(config.with_(lr=0.5))
    assert other not in (first, second)
    for folder in (project / "runs").iterdir():
        runs.write_status(folder, state="finished")
    assert launch.open_run(config) not in (first, other)


def test_progress_is_one_line_on_a_terminal_and_news_elsewhere(capsys, monkeypatch):
    def watch() -> str:
        view = live.LiveView()
        for step in range(3):
            known = {"stage": "train bridged", "step": step, "steps": 3, "loss": 0.5, "val_accuracy": step // 2}
            view.show(known | {"seconds_left": 61, "elapsed": 3725})
        view.close({"stage": "test", "state": "stopped", "error": "asked to stop", "elapsed": 10, "gpu_gib": 52.9})
        return capsys.readouterr().out

    assert watch().splitlines() == [
        "train bridged · step 0/3 · loss 0.500 · val 0.000 · 1:02:05 so far · 0:01:01 left",
        "train bridged · step 2/3 · loss 0.500 · val 1.000 · 1:02:05 so far · 0:01:01 left",
        "test · 0:00:10 so far · 52.9 GiB of GPU memory at most · stopped: asked to stop",
    ]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    shown = watch()
    assert shown.count("\r\x1b[K") == 4 and shown.count("\n") == 1 and shown.endswith("stopped: asked to stop\n")


def test_a_bar_stands_only_where_steps_are_counted():
    assert "<progress" not in live.draw_bar({"stage": "baselines done"}, "baselines done")
    assert live.draw_bar({"step": 3, "steps": 4}, "a < b").startswith('<progress value="0.750"')
    assert live.draw_bar({}, "a < b") == "<pre>a &lt; b</pre>"


@pytest.mark.parametrize("text", ["a'); import os; ('", '"""\nx = 1', "{steps}", "a\\'", "\N{PILE OF POO}\x00"])
def test_a_parameter_is_data_in_the_notebook(project, text):
    """What papermill writes into the notebook is read back as the same values, and nothing else."""
    given = {"name": text, "overrides": [text]}
    notebook = papermill.parameterize.parameterize_notebook(
        papermill.iorw.load_notebook_node(str(project / "notebooks/phase1.ipynb")), given
    )
    (source,) = [cell.source for cell in notebook.cells if "injected-parameters" in cell.metadata.get("tags", [])]
    nodes = ast.parse(source).body
    assert {node.targets[0].id: ast.literal_eval(node.value) for node in nodes} == given and len(nodes) == 2


def test_the_curves_show_loss_and_accuracy_and_stay_small(tmp_path):
    assert live.draw_curves(tmp_path) == "" == live.draw_curves(None)
    rows = [{"step": 0, "eval": {"bridged": 0.25}}, *({"step": s, "loss": 1000 / s} for s in range(1, 2001))]
    runs.write_jsonl(tmp_path / "metrics.jsonl", [*rows, {"step": 2000, "eval": {"bridged": 0.875}}])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 20')  # a line that is being written
    picture = live.draw_curves(tmp_path)
    assert "loss 0.500" in picture and "validation accuracy 0.875" in picture and len(picture) < 3000
    assert "220,63 420,26" in picture  # a quarter and seven eighths of 60 pixels above the axis at 78


def test_a_run_whose_folder_was_deleted_says_so(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    child = Child(folder, [sys.executable, "-c", ""])
    child.process.wait()
    shutil.rmtree(folder)
    assert "its folder was deleted while it ran" in launch.settle(child, "train") and not folder.exists()
