"""Kernels and tuning for CPUs."""
