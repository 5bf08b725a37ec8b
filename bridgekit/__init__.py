"""bridgekit: train a bridge between two frozen language models and prove, with controls, what it carries.

    import bridgekit as bk
    answers = bk.load_answers("runs/phase1_20261121_101500")
    bk.share(answers, by=["condition", "group"])

The names a notebook uses stand here; each loads its module when it is first used, so that the import itself is quick.
"""

import importlib

__version__ = "0.1.0"

_NAMES = {
    "config": "Config ConfigError load_config build_config",
    "runs": "find_eval load_eval load_jsonl project_root",
    "launch": "open_run run_stage refuse_unknown",
    "study": "load_study plan_study run_planned plan_swap measure_headroom",
    "tasks": "Example Prompt load_examples get_task",
    "model.message": "Message Injector",
    "model.bridge": "Bridge build_bridge load_bridge",
    "train.experiment": "Experiment",
    "results.table": "load_answers share difference ratio",
    "results.verdict": "judge headroom conditions_table",
    "results.plots": "rows lines",
    "results.style": "save_figure markdown",
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = sorted(_MODULES)


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module 'bridgekit' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"bridgekit.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
