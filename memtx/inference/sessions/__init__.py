"""Streaming sessions: a pool, its registry, the session store and the session file."""
