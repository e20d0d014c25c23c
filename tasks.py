"""The commands, where `invoke` looks for them in a checkout; finrepro/commands has them."""

from finrepro.commands.collection import namespace

__all__ = ["namespace"]
