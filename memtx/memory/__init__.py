"""What is carried between segments, one kind a file."""
