"""Pure functions of tensors: attention, the delta rule, rotary embeddings, losses."""
