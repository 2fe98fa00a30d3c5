"""The command line: what `memtx` and `lightning` do, a file a command."""
