"""Memories: what a layer carries from segment to segment."""
