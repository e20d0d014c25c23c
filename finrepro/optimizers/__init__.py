"""Optimizers, one a file: a `Config` and `build(named_parameters, lr, config)`."""
