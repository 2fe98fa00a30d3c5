"""Evaluation of memories: accuracy by distance, capacity, needle tests, bAbI, and comparisons of models."""
