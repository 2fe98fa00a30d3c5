"""Whole models and how they are kept on disk."""
