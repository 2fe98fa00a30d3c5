"""Models on disk: pretrained folders, training checkpoints, and conversion between them."""
