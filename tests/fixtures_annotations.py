"""Imported before anything of ours: from then on a call is held to what the function's annotations say, and its tensors to their shapes.

jaxtyping does that. It wraps a call in what takes ten times as long as a small function; modules of plain data and many such ones, whose
annotations name no shapes, are held to them by beartype alone.
"""

from pathlib import Path

from beartype import BeartypeConf
from beartype.claw import beartype_packages
from jaxtyping import install_import_hook

PLAIN = ("cells", "data", "plan", "schema", "spec", "weights")
OURS = {path.stem for path in Path(__file__).parents[1].joinpath("finrepro").iterdir() if path.stem.isidentifier()}
beartype_packages(tuple(f"finrepro.{name}" for name in PLAIN), conf=BeartypeConf(claw_is_pep526=False))
install_import_hook([f"finrepro.{name}" for name in sorted(OURS.difference(PLAIN))], "beartype.beartype")
