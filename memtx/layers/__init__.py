"""Modules without state: attention over a memory, feed-forward, positions, the block of all three."""
