"""What will happen to each cell before anything runs."""
