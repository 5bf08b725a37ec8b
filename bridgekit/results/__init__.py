"""From evaluation JSONL to statistics, words and figures; no torch."""
