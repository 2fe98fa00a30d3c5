"""Checkpoints in the layout of the ``transformers`` library, read exactly and written back."""
