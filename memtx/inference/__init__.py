"""Streaming reading, generation and prediction."""
