"""What a memory is worth: tasks written here and seeded, and accuracy by distance."""
