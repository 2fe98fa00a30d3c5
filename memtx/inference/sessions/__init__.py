"""Streaming sessions: pool, registry, store and file format."""
