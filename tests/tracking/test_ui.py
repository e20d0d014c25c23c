"""The web interface: a port that cannot be used is one line with one that can, and the server
answers to this machine's names only.
"""

import http.client
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from fixtures.process import environment, one_line

from finrepro import PROJECT
from finrepro.errors import EnvironmentFault, UsageError
from finrepro.evidence.store import open_store
from finrepro.tracking import ui


@pytest.fixture
def taken() -> Iterator[int]:
    """A port on which another server listens."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def test_a_port_in_use_is_one_line_that_names_a_free_one(tmp_path: Path, taken: int):
    with pytest.raises(EnvironmentFault) as refused:
        ui.serve(open_store(tmp_path), "127.0.0.1", str(taken))
    line = one_line(refused.value)
    assert f"port {taken} of 127.0.0.1 is in use" in line
    named = int(line.split("--port ")[1].rstrip("."))
    assert named != taken and ui.checked_port("127.0.0.1", str(named)) == named


@pytest.mark.parametrize("port", ["0", "65536", "-1", "http", "", "5000.0", "\u0665\u0660"])
def test_what_is_no_port_is_one_line(tmp_path: Path, port: str):
    with pytest.raises(UsageError) as refused:
        ui.serve(open_store(tmp_path), "127.0.0.1", port)
    assert "--port" in one_line(refused.value)


def test_an_address_that_is_not_this_machines_is_one_line(tmp_path: Path):
    with pytest.raises(EnvironmentFault) as refused:
        ui.serve(open_store(tmp_path), "192.0.2.1", "5000")  # RFC 5737: nobody's
    assert "192.0.2.1:5000" in one_line(refused.value)


def answer(port: int, host: str, method: str = "GET", path: str = "/", **headers: str) -> int:
    """The status of a request whose Host header is `host`."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.putrequest(method, path, skip_host=True)
    for name, value in {"Host": host, **headers}.items():
        connection.putheader(name, value)
    connection.endheaders()
    status = connection.getresponse().status
    connection.close()
    return status


def first_line(server: "subprocess.Popen[str]") -> str:
    """The line with the address; the server is killed if it does not come."""
    clock = threading.Timer(120, server.kill)
    clock.start()
    assert server.stdout is not None
    line = next((line for line in server.stdout if line.startswith("MLflow:")), "")
    clock.cancel()
    return line


@pytest.mark.slow
def test_the_server_answers_to_this_machines_names_and_to_no_other_and_ends_with_the_command(
    tmp_path: Path,
):
    port = ui._bind("0.0.0.0", 0)
    command = [
        sys.executable,
        "-m",
        "invoke",
        "ui",
        "--store",
        str(tmp_path / "store"),
        "--host",
        "0.0.0.0",
        "--port",
        str(port),
    ]
    variables = environment(PYTHONPATH=str(PROJECT), MLFLOW_SERVER_ALLOWED_HOSTS="lab.example:5000")
    server = subprocess.Popen(
        command, cwd=PROJECT, env=variables, stdout=subprocess.PIPE, text=True
    )
    try:
        assert first_line(server) == f"MLflow: http://127.0.0.1:{port}  (stop with Ctrl-C)\n"
        # 8080: a container's port may be published under another number.
        for name in (
            f"127.0.0.1:{port}",
            f"localhost:{port}",
            "localhost:8080",
            "localhost",
            "lab.example:5000",
        ):
            assert answer(port, name) == 200, name
        for name in (
            "evil.example",
            f"evil.example:{port}",
            "localhost.evil.example",
            f"192.168.1.7:{port}",
            "lab.example",
        ):
            assert answer(port, name) == 403, name
        path = "/ajax-api/2.0/mlflow/experiments/create"
        local, foreign = f"http://localhost:{port}", "http://evil.example"
        assert answer(port, f"localhost:{port}", "POST", path, Origin=foreign) == 403
        assert (
            answer(port, f"localhost:{port}", "POST", path, Origin=local) == 400
        )  # heard, and found empty
    finally:
        server.terminate()
        assert server.wait(60) == 0
        assert server.stdout is not None
        server.stdout.close()
    assert ui._bind("127.0.0.1", port) == port, "a process of the server is left behind"
