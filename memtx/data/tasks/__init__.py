"""Supervised tasks: examples from JSON lines, their encoding, batches and data modules."""
