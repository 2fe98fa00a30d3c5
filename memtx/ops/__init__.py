"""Pure tensor functions: attention, hashing, the delta rule, rotary embeddings and losses."""
