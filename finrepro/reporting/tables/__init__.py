"""Tables of the paper, one a file: `build(rows) -> Table`, a pure function of results."""
