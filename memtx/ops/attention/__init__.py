"""Attention of a segment over keys with visibility intervals: one function, several backends."""
