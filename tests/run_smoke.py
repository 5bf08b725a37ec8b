"""Execute every notebook that runs something, with its smoke parameters: `make smoke`. Minutes, so no part of pytest.

Once from the project's root as `bridgekit run` does it, then by plain papermill with the kernel beside the notebook, as
JupyterLab starts it: paths must mean the same, and nothing may be written there.
"""

import logging
import shutil
import subprocess
import sys
from pathlib import Path

import papermill

from bridgekit.launch import gather_parameters

ROOT = Path(__file__).parent.parent
NOTEBOOKS = ("phase1", "ablation", "swap", "diagnostics")
STUDIES = ("ablation_smoke", "swap_smoke")  # their finished runs would be kept, and nothing tried


def main(names: list[str]) -> None:
    logging.getLogger("papermill").setLevel(logging.ERROR)
    for folder in [path for name in STUDIES for path in (ROOT / "runs").glob(f"{name}*")]:
        shutil.rmtree(folder)
    for name in names or NOTEBOOKS:
        file = ROOT / "parameters" / f"{name}_smoke.yaml"
        command = [sys.executable, "-m", "bridgekit", "run", f"notebooks/{name}.ipynb", "-f", str(file)]
        subprocess.run(command, cwd=ROOT, check=True)
        beside = ROOT / "notebooks"
        before = sorted(beside.rglob("*"))
        notebook, executed = beside / f"{name}.ipynb", ROOT / "runs" / f"{name}_smoke.beside.ipynb"
        print(f"{notebook.name} again, with its kernel in notebooks/", flush=True)
        values = gather_parameters(notebook, [file], {}, [])
        options = {"kernel_name": "python3", "progress_bar": False, "extra_arguments": ["--log-level=ERROR"]}
        papermill.execute_notebook(notebook, executed, values, cwd=beside, **options)
        written = sorted(set(beside.rglob("*")) - set(before))
        assert not written, f"{name}: wrote {written} beside the notebooks"


if __name__ == "__main__":
    main(sys.argv[1:])
