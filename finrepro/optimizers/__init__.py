"""Optimizers, one a file: a `Config` and `build(param_groups, config)`."""
