"""A table from command to numbers: which cells run, by whom, and what is shown meanwhile."""
