"""Everything that is kept on disk: pretrained folders, training checkpoints, conversion between them."""
