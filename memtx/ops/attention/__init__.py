"""Attention over lifetimes: one function, several backends."""
