"""Training and answering: one experiment from its configuration to its evaluation JSONL."""
