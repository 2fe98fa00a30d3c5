"""Command line of ``memtx`` and ``lightning``, one file per command."""
