"""finrepro: the reproducibility package of a journal paper that extends FinGPT-HPC (ICDCS 2024)."""

from pathlib import Path

__version__ = "0.1.0"

PROJECT = Path(__file__).resolve().parent.parent  # where configs/ and requirements/ lie
