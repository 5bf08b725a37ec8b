"""Builds run folders as the first experiments' program left them: glued ranks, progress bars, returns."""

import json
from pathlib import Path

SETTINGS = {
    "source_model": "org/Source", "target_model": "org/Target", "soft_tokens": -1, "train_steps": 60,
    "eval_every": 20, "eval_samples": 8, "seed": 1234, "bf16": True, "early_stop_patience": 3,
    "decode_loss_weight": 0.0, "decode_interval": 200, "bridge": "dit", "dit_cfg_dropout": None,
    "dit_pool": "mean",
}  # fmt: skip

OOM = """[rank0]: Traceback (most recent call last):
[rank0]:   File "/data/run/cross_attention.py", line 1875, in <module>
[rank0]:     main()
[rank0]:   File "/data/run/cross_attention.py", line 1771, in main
[rank0]:     decode_out = tgt_model(**decode_data)
[rank0]:   File "/lib/python3.10/site-packages/torch/nn/modules/module.py", line 1736, in _wrapped_call_impl
[rank0]:     return self._call_impl(*args, **kwargs)
[rank0]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.09 GiB. GPU 0 has a \
total capacity of 79.11 GiB of which 1.51 GiB is free. \
Including non-PyTorch memory, this process has 77.59 GiB memory in use.
"""

BRIDGED = {"0": [], "20": [0, 1], "40": [0, 1, 2, 3], "60": [0, 1, 2], "final": [1, 2, 5]}


def log_text(settings=None, steps=60, evaluations=None, best=None, final=None, world=4, crash="", params="60.9"):
    """A whole train.log; evaluations: {step: (source, target, bridged)}."""
    shown = [f"{key}: {value}" for key, value in (SETTINGS | (settings or {})).items()]
    shown.insert(3, "[W1116 20:12:23.783906454 CUDAAllocatorConfig.h:28] Warning: not supported")
    accuracies = "Source-alone acc: {:.3f} | Target-alone acc: {:.3f} | Bridged acc: {:.3f}".format
    bar = "\r".join(f"Loading checkpoint shards: {n}%|████      | 1/3 [00:11<00:22, 11.29s/it]" for n in (0, 33, 100))
    lines = [
        "W1116 20:12:14.011000 1726071 torch/distributed/run.py:793] *****", "  GPU 0: NVIDIA H100 80GB HBM3",
        "[Rank 2] DDP initialized successfully on GPU 2[Rank 3] DDP initialized successfully", "==== Config ====",
        *shown, 'log_dir: runs/phase1_"x"/y', "", "==== Reproducibility Settings ====", f"World size: {world} (each)",
        bar, f"Translator parameters: {params}M",
    ]  # fmt: skip
    for step in range(20, steps + 1, 20):
        lines.append(f"Step {step}/60 | Loss (avg over last 20): {5 - step / 20:.4f} | DiT_flow: {step / 1000:.4f}")
        if evaluations and str(step) in evaluations:
            lines += ["Bridged full output:", "Step 1/2 first find the price", "#### 12"]
            lines.append(f"[Eval] Step {step} | {accuracies(*evaluations[str(step)])}")
    lines += [f"Saved BEST translator (acc={best:.3f}) to runs/x/checkpoint.pt"] if best is not None else []
    lines += [f"[Final Eval] {accuracies(*final)}"] if final else []
    return "\n".join(lines) + "\n" + crash


def evaluation(bridged_right, source_right=(0, 1, 2, 3), target_right=(0, 1, 2, 3, 4, 5), n=8, step="final", other="7"):
    """n examples with gold 100+index; a system is right on the indices given and says `other` elsewhere."""
    right, rows = {"source": source_right, "target": target_right, "bridged": bridged_right}, []
    for i in range(n):
        question = f"Answer step by step.\n\nQ: One?\nA: #### 1\n\nQ: What is number {i} of the list of questions?\nA:"
        row = {"eval_step": step, "index": i, "question": question, "gold_full_text": f"#### {100 + i}"}
        row["gold_extracted"] = str(100 + i)
        for condition, indices in right.items():
            label = str(100 + i if i in indices else other)
            row[f"{condition}_full"] = f"It is so.\n#### {label}\n\nQ: Another one?\n#### 99"
            row[f"{condition}_extracted"] = label
        rows.append(row)
    return rows


def write_jsonl(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_run(root: Path, name: str, bridged: dict, sub="phase1_all_fix", **log) -> Path:
    """A run folder; bridged: {step: indices right}. The log tells the same accuracies."""
    folder = root / name / sub
    folder.mkdir(parents=True)
    curve = {step: (0.5, 0.75, len(right) / 8) for step, right in bridged.items()}
    for step, right in bridged.items():
        rows = evaluation(right, step="final" if step == "final" else int(step), other=str(200 + len(right)))
        write_jsonl(folder / f"eval_samples_step_{step}.jsonl", rows)
    final = curve.pop("final", None)
    best = max((accuracies[2] for accuracies in curve.values()), default=None)
    text = log_text(log.pop("settings", {}), evaluations=curve, best=best, final=final, **log)
    (folder / "train.log").write_text(text, encoding="utf-8")
    (root / name / "summary.log").write_text("End time: Sun Nov 16 10:08:44 PM PST 2025\n", encoding="utf-8")
    return root / name


def write_own(folder: Path, rows=None, config=None, metrics="") -> Path:
    """A run folder of this package."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config or "run: {seed: 3}\nbridge: {producer: dit}\n")
    (folder / "provenance.json").write_text('{"command": "bridgekit run"}')
    lines = '{"step": 10, "loss": 2.5, "losses": {"nll": 2.0}}\n{"step": 10, "eval": {"bridged": 0.4, "n": 8}}\n'
    (folder / "metrics.jsonl").write_text(lines + metrics)
    write_jsonl(folder / "eval_samples_step_final.jsonl", rows or evaluation([0, 1]))
    return folder
