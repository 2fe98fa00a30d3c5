"""HTTP server: completions, sessions, task predictions and a web page; the only package that uses FastAPI."""
