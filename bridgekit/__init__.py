"""bridgekit: train a bridge between two frozen language models and prove, with controls, what it carries."""

__version__ = "0.1.0"
