"""Imported before anything of ours: from then on a call is held to what the function's annotations say, and its tensors to their shapes.

jaxtyping does that. It wraps a call in what takes ten times as long as a small function; modules of plain data and many such ones, whose
annotations name no shapes, are held to them by beartype alone.
"""

from pathlib import Path

from beartype import BeartypeConf
from beartype.claw import beartype_packages
from jaxtyping import install_import_hook

PACKAGE = Path(__file__).parents[1] / "finrepro"
MODULES = [
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.stem != "__init__"
]
PLAIN = [
    name
    for name in MODULES
    if name.startswith(("finrepro.catalogue.", "finrepro.planning.", "finrepro.settings", "finrepro.data.files"))
    or name == "finrepro.models.checkpoints"
]
beartype_packages(tuple(PLAIN), conf=BeartypeConf(claw_is_pep526=False))
install_import_hook([name for name in MODULES if name not in PLAIN], "beartype.beartype")
