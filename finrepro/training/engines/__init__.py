"""What drives a step: DDP or DeepSpeed."""
