"""What the paper compares: adapters, quantizers, optimizers and their layers."""
