"""A pair of Mistral-7B and Llama-3.1-8B size with random weights, and what a training on it costs in seconds.

    python tests/real_size.py make runs/geometry                    # 30 GB of safetensors; on a GPU in half a minute
    python tests/real_size.py train runs/geometry --steps 4000      # seconds a step, memory, share of checkpoints

Shapes, vocabulary sizes and dtype are the real ones; the tokenizers are trained on the task's own text, so prompts are
as long as with a tokenizer that knows its words. The file name has no test_ in front: pytest does not collect it.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from bridgekit.tasks import units
from bridgekit.train.corpus import make_documents
from bridgekit.train.pretrain import train_tokenizer

COMMON = dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, head_dim=128)
MODELS = {  # the published shapes
    "source": (MistralForCausalLM, MistralConfig, dict(intermediate_size=14336, vocab_size=32768, sliding_window=None)),
    "target": (LlamaForCausalLM, LlamaConfig, dict(intermediate_size=14336, vocab_size=128256)),
}
TRAINING = """
bridge.bridge_dim=1024 bridge.heads=16 bridge.depth=4 bridge.n_soft_tokens=64 train.batch_size=8 train.eval_every=100000
train.val_samples=8 task.n_val=8 task.n_test=8 task.n_train=4096 train.controls=[] eval.max_new_tokens=16
eval.conditions=[source,target,bridged]""".split()


def make_pair(out: Path) -> None:
    device, lexicon = "cuda" if torch.cuda.is_available() else "cpu", units.make_lexicon(1)
    for role, (model_class, config_class, shape) in MODELS.items():
        documents = make_documents(lexicon, role, 20_000, 1)
        tokenizer = train_tokenizer(role, [prompt + answer for prompt, answer in documents], 4096)
        ends = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
        config = config_class(**COMMON, **shape, **ends, max_position_embeddings=32768)
        torch.set_default_dtype(torch.bfloat16)
        with torch.device(device):
            model = model_class(config)
        model.save_pretrained(out / role)
        tokenizer.save_pretrained(out / role)
        del model
    (out / "pair.json").write_text(json.dumps({"lexicon_seed": 1, "lexicon": units.fingerprint_lexicon(lexicon)}))


def train(pair: Path, steps: int, overrides: list[str]) -> None:
    home = pair.parent / "real_size"
    given = [*TRAINING, f"train.steps={steps}", f"run.runs_dir={home}", *overrides]
    given += [f"pair.{role}_model={pair / role}" for role in MODELS]
    since = time.time()
    command = [sys.executable, "-m", "bridgekit", "train", *(part for text in given for part in ("-o", text))]
    done = subprocess.run(command, check=False)
    run = max(home.glob("phase1_*"))
    spent, status = (json.loads((run / name).read_text()) for name in ("timing.json", "status.json"))
    row = {
        "exit code": done.returncode, "parameters": status["parameters"], "seconds": round(time.time() - since, 1),
        "seconds a step": round(spent["train bridged"] / steps, 4), "checkpoints, seconds": spent["checkpoint"],
        "their share": round(spent["checkpoint"] / status["elapsed"], 4), "elapsed": status["elapsed"],
    }  # fmt: skip
    print(json.dumps(row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("make", "train"))
    parser.add_argument("pair", type=Path)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("-o", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    make_pair(args.pair) if args.what == "make" else train(args.pair, args.steps, args.overrides)


if __name__ == "__main__":
    main()
