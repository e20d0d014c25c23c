"""Quantizers, one method a file: how the weight of a linear layer is stored and multiplied."""
