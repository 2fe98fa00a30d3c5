"""A model behind HTTP: completions, sessions and a page; the only folder that knows FastAPI."""
