"""Series of vectors in CSV and NumPy files."""
