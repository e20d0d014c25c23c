"""Results of a search, kept in a folder under the sha256 of all that they depend on, so that a
model is searched once.

A file is the sha256 of its content and the content, tensors in the format of safetensors. It is
written whole or not at all; one that is damaged is computed again and replaced. Nothing is ever
removed: whoever wants the space deletes the folder, and searches again.
"""

import hashlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch
from torch import Tensor

from finrepro.evidence.files import write_bytes

DIGEST_BYTES = hashlib.sha256().digest_size

_folder: ContextVar[Path | None] = ContextVar("calibration_cache", default=None)


@contextmanager
def stored_in(folder: Path | None) -> Iterator[None]:
    """Keep results in `folder`, which need not exist, within this block; None keeps none."""
    token = _folder.set(folder)
    try:
        yield
    finally:
        _folder.reset(token)


def cached(
    weight: Tensor, settings: str, compute: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """What `compute` gives for a weight: read where it was computed before with equal `settings`
    (which have to name the algorithm's version), for equal bytes, dtype, shape and kind of device.

    A folder that cannot be written is no error: it is said in one line on stderr.
    """
    folder = _folder.get()
    if folder is None:
        return compute()
    path = folder / f"{_key(weight, settings)}.tensors"
    tensors = _read(path, weight.device)
    if tensors is None:
        tensors = compute()
        _write(path, tensors)
    return tensors


def _key(weight: Tensor, settings: str) -> str:
    shape, device = tuple(weight.shape), weight.device.type
    facts = f"{settings} torch {torch.__version__} {weight.dtype} {shape} {device}\n"
    digest = hashlib.sha256(facts.encode())
    digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(path: Path, device: torch.device) -> dict[str, Tensor] | None:
    """The tensors of a file, on `device`; None where it is absent or damaged."""
    from safetensors.torch import load

    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        _report(f"{path} cannot be read ({error.strerror}): searched again.")
        return None
    digest, body = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
    if hashlib.sha256(body).digest() != digest:
        _report(f"{path} is damaged: searched again and replaced.")
        return None
    return {name: tensor.to(device) for name, tensor in load(body).items()}


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save

    body = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, hashlib.sha256(body).digest() + body)
    except OSError as error:
        _report(f"{path} cannot be written ({error.strerror}): the search is not kept.")


def _report(message: str) -> None:
    print(f"finrepro: {message}", file=sys.stderr)
