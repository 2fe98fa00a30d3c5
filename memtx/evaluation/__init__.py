"""Evaluation of what a memory retains: accuracy by distance, capacity, needles, bAbI, and comparisons of models."""
