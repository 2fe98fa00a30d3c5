"""Data: texts to rows of tokens; knows no model."""
