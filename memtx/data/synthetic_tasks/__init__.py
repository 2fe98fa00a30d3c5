"""Synthetic memory tasks, one a file."""
