"""From a checkpoint to a model, part by part."""
