"""What is known of the hub's client without importing it: its folders, and the secrets that no
message may hold.
"""

import contextlib
import os
import re
from pathlib import Path

TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_TOKEN", "GITHUB_TOKEN")
LOOKS_LIKE_A_TOKEN = re.compile(r"\bhf_\w+|hf_[A-Za-z0-9]{8,}")
USER_IN_AN_ADDRESS = re.compile(r"//[^/@\s]+@")
SHORTEST = 4  # characters: a shorter secret would be found in ordinary words


def home() -> Path:
    """The client's folder, by the client's own rules."""
    folder = os.environ.get("HF_HOME")
    if folder:
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"


def cache() -> Path:
    """The folder of downloaded repositories."""
    folder = os.environ.get("HF_HUB_CACHE")
    return Path(folder) if folder else home() / "hub"


def redact(text: str) -> str:
    """`text` without access tokens (those of the environment, that of the client's file, whatever
    looks like one), and without user and password in addresses.
    """
    secrets = [os.environ.get(name, "") for name in TOKENS]
    token_file = Path(os.environ.get("HF_TOKEN_PATH") or home() / "token")
    with contextlib.suppress(OSError, ValueError):  # nobody has logged in
        secrets.append(token_file.read_text(encoding="utf-8"))
    for secret in sorted({secret.strip() for secret in secrets}, key=len, reverse=True):
        if len(secret) >= SHORTEST:
            text = text.replace(secret, "[token]")
    return USER_IN_AN_ADDRESS.sub("//***@", LOOKS_LIKE_A_TOKEN.sub("[token]", text))


def reason_of(error: Exception) -> str:
    """The first line of an error's text, redacted; the error's class where it has none."""
    lines = str(error).strip().splitlines()
    return redact(lines[0].strip()) if lines else type(error).__name__
