"""Sources of texts beside books in folders: tables of them, other file systems, data sets of another library."""
