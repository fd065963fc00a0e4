"""The embedded default: a small arithmetic task, a tokenizer for it, and a model trained on it from random weights."""
