"""From a checkpoint to a model, block by block."""
