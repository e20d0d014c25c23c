"""From YAML to cells: the catalogues, the tables' axes, and what cannot be combined."""
