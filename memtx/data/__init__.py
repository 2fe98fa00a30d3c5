"""Text to batches of tokens. Imports no model code."""
