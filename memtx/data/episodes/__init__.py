"""Tasks that are drawn, one a file: episodes read segment by segment, whose answers only a memory can give."""
