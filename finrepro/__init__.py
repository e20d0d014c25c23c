"""finrepro: the reproducibility package of a journal paper that extends FinGPT-HPC (ICDCS 2024)."""

__version__ = "0.1.0"
