"""Optimizers, one a file: a `Config` and `build(named_parameters, lr, config)`.

A module may have `supports(spec, config) -> str | None`, why a cell that trains cannot be stepped
by it, `state_bytes(shapes, config) -> int`, and the hooks `before_step` and `after_step` of
`finrepro.training.hooks`.
"""
