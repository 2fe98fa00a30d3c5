"""Checkpoints in layouts of Hugging Face ``transformers``; models do not import this package."""

from memtx.hf.loader import is_hf_folder, load, save

__all__ = ["is_hf_folder", "load", "save"]
