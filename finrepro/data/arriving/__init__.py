"""Training on text while it is still being prepared."""
