"""Checkpoints in the layouts of the Hugging Face ``transformers`` library; models do not import this package."""

from memtx.hf.loader import is_hf_folder, load, save

__all__ = ["is_hf_folder", "load", "save"]
