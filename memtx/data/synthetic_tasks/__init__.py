"""Synthetic memory tasks, generated from a seed."""
