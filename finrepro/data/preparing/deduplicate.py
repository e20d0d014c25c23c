"""What makes two documents the same, and which are held out: both follow from the text alone,
whatever their order and place.
"""

import hashlib
import unicodedata


def identity(text: str) -> bytes:
    """16 bytes of BLAKE2b over the text in NFC with every run of white space as one space, without
    any at the ends.

    Two different documents of a billion share one with a probability below 1e-20.
    """
    if not unicodedata.is_normalized("NFC", text):
        text = unicodedata.normalize("NFC", text)
    return hashlib.blake2b(" ".join(text.split()).encode(), digest_size=16).digest()


def held_out(document: bytes, fraction: float, seed: int) -> bool:
    """Whether the document of this identity belongs to the validation split, which has about
    `fraction` of the documents.

    The same document is on the same side in every corpus of that seed and fraction; a larger
    fraction holds out the same ones and more.
    """
    drawn = hashlib.blake2b(document, digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(drawn, "big") < fraction * 2**64


class Seen:
    """The documents so far: `seen.before(identity)` is true from the second time on. About 80
    bytes a document are kept.
    """

    def __init__(self) -> None:
        self._identities: set[bytes] = set()

    def before(self, document: bytes) -> bool:
        """Note a document."""
        known = len(self._identities)
        self._identities.add(document)
        return len(self._identities) == known
