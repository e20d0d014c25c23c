"""What else a model of the catalogue is called: by its former hub id, by a path to a copy of it, in
another letter case.
"""

import difflib
import re
from functools import cache

from finrepro.catalogue.reader import entries, model
from finrepro.catalogue.spec import Model

# A folder of the hub's cache: models--<owner>--<name>, with a snapshot of a commit or without.
CACHED = re.compile(r"(?:^|/)models--.+?--([^/]+)(?:/snapshots(?:/[^/]+)?)?$")
# The hub renamed Meta-Llama-3 and 3.1, and redirects the former ids.
FORMER = re.compile(r"^meta-(?=llama-3)")


def plain_name(written: str) -> str:
    """The last part of a hub id or a path, without what does not tell models apart."""
    text = written.strip().replace("\\", "/").rstrip("/")
    cached = CACHED.search(text)
    return FORMER.sub("", (cached[1] if cached else text.rpartition("/")[2]).casefold())


def is_called(entry: Model, written: str) -> bool:
    """Whether a name, as a folder gives it for its base, is that of the catalogue's model."""
    return plain_name(written) in _plain_names(entry)


def former_id(hub_id: str) -> str | None:
    """The hub id that a model had before the hub renamed it; None if it is not known to have had
    another.
    """
    owner, _, name = hub_id.rpartition("/")
    return f"{owner}/Meta-{name}" if name.startswith("Llama-3") else None


@cache
def nearest(written: str) -> str | None:
    """The hub id, or the name, of the catalogue's model that is called most alike; None if none
    is.
    """
    models = [model(name) for name in entries("models")]
    by_name = {
        name: entry.hub.id if entry.hub else entry.name
        for entry in reversed(models)
        for name in _plain_names(entry)
    }
    near = difflib.get_close_matches(plain_name(written), by_name, n=1, cutoff=0.5)
    return by_name[near[0]] if near else None


def _plain_names(entry: Model) -> set[str]:
    return {plain_name(entry.name), *([plain_name(entry.hub.id)] if entry.hub else [])}
