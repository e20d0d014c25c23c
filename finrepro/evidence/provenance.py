"""Where a number comes from: source, lock, commit, versions and hardware, as recorded in every
result.
"""

import hashlib
import os
import platform
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from finrepro import PACKAGE, PROJECT
from finrepro.evidence.schema import Environment, Hardware

PACKAGES = [
    "accelerate",
    "bitsandbytes",
    "datasets",
    "deepspeed",
    "huggingface-hub",
    "invoke",
    "mlflow",
    "numpy",
    "peft",
    "safetensors",
    "scikit-learn",
    "scipy",
    "seqeval",
    "tokenizers",
    "torch",
    "transformers",
]

# The folders and files that compute a cell. All else plans, shows or records: editing it makes no
# result stale.
COMPUTES = (
    "catalogue/spec.py",
    "contracts.py",
    "data/",
    "evaluation/",
    "kinds.py",
    "methods/",
    "models/",
    "running/",
    "runtime/",
    "settings.py",
    "sizes/",
    "statistics/",
    "training/",
)


@cache
def source_digest() -> str:
    """sha256 over the package's source files that can change a result, names and contents."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if name.startswith(COMPUTES):
            digest.update(f"{name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    for path in sorted(
        (PROJECT / "configs" / "deepspeed").glob("*.json")
    ):  # read while training, in no spec
        digest.update(f"{path.name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


@cache
def lock_name() -> str | None:
    """The lock that the environment was installed from, None when it was not by one.

    `./run` and the images say it (`FINREPRO_LOCK`). Python that is started without them finds the
    copy that `./run` leaves in its environment, if it is the project's lock of today.
    """
    if named := os.environ.get("FINREPRO_LOCK"):
        return named
    for name in ("requirements/cpu.lock", "requirements/cuda.lock"):
        path, copy = PROJECT / name, Path(sys.prefix) / Path(name).name
        if path.is_file() and copy.is_file() and copy.read_bytes() == path.read_bytes():
            return name
    return None


@cache
def lock_digest() -> str | None:
    """sha256 of that lock, None where there is none."""
    name = lock_name()
    path = PROJECT / name if name else None
    return hashlib.sha256(path.read_bytes()).hexdigest() if path and path.is_file() else None


def _git(*arguments: str) -> str | None:
    """Output of a git command in the project, None without git or outside a checkout."""
    command = ["git", "-c", f"safe.directory={PROJECT}", "-C", str(PROJECT), *arguments]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


@cache
def commit() -> tuple[str | None, bool | None]:
    """(commit, dirty). In an image, the commit baked into REVISION; the source digest says what
    really ran.
    """
    baked = PROJECT / "REVISION"
    if baked.is_file():
        name = baked.read_text().strip()
        return (None, None) if name in ("", "unknown") else (name, False)
    if _git("rev-parse", "--show-toplevel") != str(PROJECT):
        return None, None
    status = _git("status", "--porcelain", "--untracked-files=no")
    return _git("rev-parse", "HEAD"), None if status is None else bool(status)


@cache  # of what this process runs with; read for every cell, skipped ones too
def _package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def hardware() -> Hardware:
    """Processor, cores, memory and GPUs of this machine."""
    import psutil

    facts: Hardware = {
        "processor": _cpu_name(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": [],
    }
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            facts["gpus"].append({"name": card.name, "memory_bytes": card.total_memory})
    return facts


@cache
def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def environment() -> Environment:
    """`environment` of result.json: everything of this file."""
    name, dirty = commit()
    return {
        "git_commit": name,
        "git_dirty": dirty,
        "source_digest": source_digest(),
        "lock": lock_name(),
        "lock_digest": lock_digest(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: _package_version(name) for name in PACKAGES},
        "hardware": hardware(),
    }
