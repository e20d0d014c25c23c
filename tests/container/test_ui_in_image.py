"""`docker run -p 127.0.0.1:5000:5000 finrepro invoke ui`, as the README gives it: the page is
there for a browser outside.
"""

import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

pytestmark = pytest.mark.container


@pytest.fixture(scope="module")
def port(engine: str, image: str) -> Iterator[int]:
    """The port on this machine at which a container's `invoke ui` answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number = int(probe.getsockname()[1])
    publish = (
        "--publish",
        f"127.0.0.1:{number}:5000",
        "--read-only",
        "--tmpfs",
        "/tmp",
        "--cap-drop",
        "ALL",
    )
    started = subprocess.run(
        [engine, "run", "--detach", *publish, image, "invoke", "ui"],
        check=True,
        capture_output=True,
        text=True,
    )
    name = started.stdout.strip()
    try:
        patience = time.monotonic() + 120
        while fetch(number, "/health")[0] != 200:
            if time.monotonic() > patience:
                logs = subprocess.run(
                    [engine, "logs", name], capture_output=True, text=True, check=False
                )
                pytest.fail(f"no answer after two minutes: {logs.stdout}{logs.stderr}")
            time.sleep(0.5)
        yield number
    finally:
        subprocess.run([engine, "stop", "--time", "1", name], capture_output=True, check=False)
        subprocess.run([engine, "rm", "--force", name], capture_output=True, check=True)


def fetch(
    port: int, path: str, host: str = "localhost", body: bytes | None = None
) -> tuple[int, str]:
    """Status and text of an answer to a browser that knows the server as `host`; status 0
    without an answer.
    """
    headers = {
        "Host": f"{host}:{port}",
        "Origin": f"http://{host}:{port}",
        "Content-Type": "application/json",
    }
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, ""
    except OSError:
        return 0, ""


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_published_port_shows_the_page_and_answers_for_the_store(port: int, host: str) -> None:
    status, page = fetch(port, "/", host)
    assert status == 200
    assert "<title>MLflow</title>" in page
    status, found = fetch(
        port, "/ajax-api/2.0/mlflow/experiments/search", host, b'{"max_results": 5}'
    )
    assert status == 200
    assert json.loads(found) == {}, (
        "a store without results has no experiment, not even MLflow's own"
    )


def test_pages_of_other_sites_are_refused(port: int) -> None:
    """A name that its owner points at this machine (DNS rebinding) reaches nothing."""
    assert (
        fetch(
            port, "/ajax-api/2.0/mlflow/experiments/search", "example.org", b'{"max_results": 5}'
        )[0]
        == 403
    )
