"""Adapters for checkpoints in the layouts of Hugging Face's transformers library."""
