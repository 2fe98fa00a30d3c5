"""Sources of text: plain files, tables, other file systems, and datasets of the Hugging Face hub."""
