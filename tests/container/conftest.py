"""The image under test: `FINREPRO_IMAGE` names it, podman or docker runs it."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# How someone who trusts the image with nothing would run it.
CONFINED = (
    *("--network", "none", "--read-only"),
    *("--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
    *("--memory", "8g", "--pids-limit", "512"),
)

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def image() -> str:
    name = os.environ.get("FINREPRO_IMAGE")
    if not name:
        pytest.skip("FINREPRO_IMAGE names no image to test")
    return name


@pytest.fixture(scope="session")
def engine(image: str) -> str:
    found = shutil.which("podman") or shutil.which("docker")
    assert found, "FINREPRO_IMAGE is set, but neither podman nor docker is installed"
    return found


@pytest.fixture(scope="session")
def run(engine: str, image: str) -> Run:
    """`run(*command, ...)`: the command's result in a fresh container, by default a confined
    one.
    """

    def run_in_image(
        *command: str,
        options: tuple[str, ...] = (),
        confined: bool = True,
        scratch: str = "/tmp:noexec",
        timeout: float = 900,
    ) -> subprocess.CompletedProcess[str]:
        limits = (*CONFINED, "--tmpfs", scratch) if confined else ("--network", "none")
        call = [engine, "run", "--rm", *limits, *options, image, *command]
        return subprocess.run(
            call,
            check=False,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=timeout,
        )

    return run_in_image


@pytest.fixture(scope="session")
def facts(engine: str, image: str) -> dict[str, Any]:
    """What the engine knows of the image."""
    listing = subprocess.run(
        [engine, "image", "inspect", image], capture_output=True, text=True, check=True
    )
    found: dict[str, Any] = json.loads(listing.stdout)[0]
    return found


@pytest.fixture(scope="session")
def lock(facts: dict[str, Any]) -> str:
    """The lock file that the image says it was made from; it tells which of the two targets this
    is.
    """
    (found,) = (
        line.split("=", 1)[1]
        for line in facts["Config"]["Env"]
        if line.startswith("FINREPRO_LOCK=")
    )
    assert found in ("requirements/cpu.lock", "requirements/cuda.lock")
    return str(found)


@pytest.fixture(scope="session")
def new_store(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Makes an empty folder that any uid of a container may write to."""

    def make() -> Path:
        store = tmp_path_factory.mktemp("store")
        store.chmod(0o777)
        return store

    return make
