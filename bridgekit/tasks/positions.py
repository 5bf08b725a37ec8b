"""Do prompt, soft tokens and answer fit into the target's positions? Asked before any model is loaded.

check_positions(config, n_positions=1024, longest_prompt=37, longest_source=40)
measure_prompts(config)                       # the same three numbers, from the files of two local models
"""

import json
from pathlib import Path

from bridgekit.config import SOFT_INJECTORS, Config, ConfigError
from bridgekit.tasks import literal_prompt, load_examples, source_prompt

EMBEDDED = Path(__file__).parents[1] / "model" / "embedded_pair"
LONGEST_CUE = 16  # tokens, at most, of what `soft_only` leaves of a prompt


def check_positions(config: Config, n_positions: int, longest_prompt: int, longest_source: int) -> None:
    """Refuse more text, soft tokens and answer than the target has positions.

    `longest_prompt` is the target's literal prompt, `longest_source` what the bridge reads, both in tokens without
    BOS. Injectors without soft tokens take no positions, and `soft_only` leaves the literal prompt out.
    """
    bridge, new = config.bridge, config.eval.max_new_tokens
    soft = bridge.n_soft_tokens if bridge.injector in SOFT_INJECTORS else 0
    if soft == -1:
        own_answer = new if bridge.source_view == "solution" else 0
        soft = min(2048, 1 + longest_source + own_answer)
    modes = {bridge.prompt_mode, bridge.train_prompt_mode} - {"same"}
    text = LONGEST_CUE if modes == {"soft_only"} else longest_prompt
    if 1 + longest_prompt + new > n_positions:  # the target alone reads it too
        raise ConfigError(
            f"eval.max_new_tokens: {longest_prompt} prompt tokens and {new} new ones need {1 + longest_prompt + new} "
            f"positions; the target has {n_positions}: use a shorter prompt or answer"
        )
    if 1 + soft + text + new > n_positions:
        raise ConfigError(
            f"bridge.n_soft_tokens: {soft} soft tokens, {text} prompt tokens and {new} new ones need "
            f"{1 + soft + text + new} positions; the target has {n_positions}: use fewer soft tokens"
        )


def measure_prompts(config: Config) -> tuple[int, int, int] | None:
    """The target's positions, its longest prompt and the longest text that the bridge reads, in tokens without BOS.

    None where a model is not on this disk: then only the training can count.
    """
    from tokenizers import Tokenizer

    sides = ("source", "target") if config.pair.direction == "forward" else ("target", "source")
    folders = {}
    for side in ("source", "target"):
        model = getattr(config.pair, f"{side}_model")
        folders[side] = EMBEDDED / side if model == "embedded" else Path(model)
    files = [folders[side] / name for side in sides for name in ("config.json", "tokenizer.json")]
    n_positions = json.loads(files[2].read_text()).get("max_position_embeddings") if files[2].is_file() else None
    record = folders["target"].parent / "pair.json"
    seed = json.loads(record.read_text()).get("lexicon_seed") if record.is_file() else None
    if (
        not all(file.is_file() for file in files)
        or n_positions is None
        or (seed is None and config.task.task == "units")
    ):
        return None
    examples = [e for split in ("val", "test") for e in load_examples(config, seed, split)]
    prompts = [source_prompt(e) for e in examples]
    read = [prompt.prefix if config.bridge.source_view == "facts" else prompt.text for prompt in prompts]
    texts = {files[1]: read, files[3]: [literal_prompt(e).text for e in examples]}
    longest = {}
    for file, rows in texts.items():
        encoded = Tokenizer.from_file(str(file)).encode_batch(rows, add_special_tokens=False)
        longest[file] = max(len(row.ids) for row in encoded)
    return n_positions, longest[files[3]], longest[files[1]]
