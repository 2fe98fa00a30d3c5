"""Layers and their parts."""
