"""Reading, going on with and keeping streams of text; import from the files that own the names."""
