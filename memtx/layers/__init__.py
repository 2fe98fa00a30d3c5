"""Neural network modules without recurrent state."""
