"""How fast the readers are and how much memory they take, on inputs made here; run by hand, not by pytest.

python tests/audit/bench_readers.py [megabytes, default 500]
"""

import json
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from first_generation import example, log_text  # noqa: E402

from bridgekit.audit.first_logs import load_log, load_outcomes  # noqa: E402


def write_log(path: Path, size: int) -> None:
    """Settings, then progress bars, warnings, sample outputs and a loss line every few lines."""
    bar = "\r".join(
        f"Loading checkpoint shards: {n}%|████      | 1/3 [00:11<00:22, 11.29s/it]" for n in range(0, 99, 9)
    )
    sample = "Q: How many eggs are left?\nA: 16 - 3 = <<16-3=13>>13 eggs\n#### 13\n" * 5
    with path.open("w") as file:
        file.write(log_text(steps=0))
        step = 0
        while file.tell() < size:
            step += 20
            file.write(f"{bar}\n{sample}Step {step}/9999999 | Loss (avg over last 20): 1.2345 | DiT_flow: 0.5\n")
        file.write("[Final Eval] Source-alone acc: 0.540 | Target-alone acc: 0.770 | Bridged acc: 0.645\n")


def write_examples(path: Path, lines: int) -> None:
    row = example(0, 18, {"source": 18, "target": 19, "bridged": "[invalid]"}, "final")
    for key in ("source_full", "target_full", "bridged_full"):
        row[key] *= 3
    with path.open("w") as file:
        for index in range(lines):
            file.write(json.dumps(row | {"index": index, "gold_extracted": str(index % 977)}) + "\n")


def measure(name: str, path: Path, read) -> None:
    start = time.process_time()  # of one core, also where others keep the machine busy
    found = read(path)
    seconds, megabytes = time.process_time() - start, path.stat().st_size / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{name}: {megabytes:.0f} MB in {seconds:.2f} s = {megabytes / seconds:.0f} MB/s; "
        f"peak memory {peak:.0f} MB; {found}"
    )


def main(megabytes: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        log, examples = Path(folder) / "train.log", Path(folder) / "eval_samples_step_final.jsonl"
        write_log(log, megabytes * 1_000_000)
        measure("log", log, lambda path: f"{len(load_log(path)['losses'])} losses")
        log.unlink()
        write_examples(examples, 1_000_000)
        measure("JSONL", examples, lambda path: f"{len(load_outcomes(path, [], 'final'))} examples")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 500)
