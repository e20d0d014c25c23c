"""When two documents are duplicates, and which are held out: both follow from the text alone, not
from the documents' order or place.
"""

import hashlib
import unicodedata


def identity(text: str) -> bytes:
    """16 bytes of BLAKE2b over the text in NFC, stripped, with every run of white space as one
    space.

    The probability that two different documents of a billion collide is below 1e-20.
    """
    if not unicodedata.is_normalized("NFC", text):
        text = unicodedata.normalize("NFC", text)
    return hashlib.blake2b(" ".join(text.split()).encode(), digest_size=16).digest()


def is_held_out(document: bytes, fraction: float, seed: int) -> bool:
    """Whether the document of this identity belongs to the validation split, which has about
    `fraction` of the documents.

    A document is in the same split in every corpus of that seed and fraction; a larger fraction
    holds out the same documents and more.
    """
    number = hashlib.blake2b(document, digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(number, "big") < fraction * 2**64


class DuplicateFilter:
    """The identities of the documents so far; about 80 bytes of memory a document."""

    def __init__(self) -> None:
        self._identities: set[bytes] = set()

    def contains_or_add(self, document: bytes) -> bool:
        """Whether the document came before; from now on it has."""
        count = len(self._identities)
        self._identities.add(document)
        return len(self._identities) == count
