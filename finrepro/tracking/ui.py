"""MLflow's web interface over a store, for browsers on this machine."""

import errno
import http.client
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time

from finrepro.errors import EnvironmentFault, UsageError
from finrepro.evidence.store import Store
from finrepro.tracking.index import is_current, links, tracking_uri
from finrepro.tracking.library import environment, load_mlflow
from finrepro.tracking.rebuilding import rebuild

LOCAL = ("localhost", "127.0.0.1")
PATIENCE = 120.0  # seconds until the server has to answer
# MLflow's own names of variables
HOSTS, ORIGINS = "MLFLOW_SERVER_ALLOWED_HOSTS", "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"


def _bind(host: str, port: int) -> int:
    """The port once it was listened on for a moment; 0 gives a free one. Raises `OSError`."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
        return int(probe.getsockname()[1])


def checked_port(host: str, text: str) -> int:
    """The port as a number. Raises `UsageError` for what is none, and `EnvironmentFault` for one
    that cannot be listened on, with a free one where that is the reason.
    """
    if not (text.isascii() and text.isdecimal()) or not 0 < int(text) < 65536:
        raise UsageError(f"--port '{text}': expected a number from 1 to 65535.")
    try:
        return _bind(host, int(text))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise EnvironmentFault(
                f"port {text} of {host} is in use, perhaps by another `ui`; "
                f"free is --port {_bind(host, 0)}."
            ) from None
        raise EnvironmentFault(
            f"cannot listen on {host}:{text} ({error.strerror}); "
            "choose another with --host or --port."
        ) from None


def allowed_addresses(host: str, port: int, variables: dict[str, str]) -> dict[str, str]:
    """MLflow's variables that say which addresses it answers to: this machine's, `host`, and those
    that the user's `variables` allow: MLFLOW_SERVER_ALLOWED_HOSTS="lab.example:5000".

    Any port of this machine is right, since a container's port may be mapped to another. Every
    other name or address is refused with "Invalid Host header", and pages of other sites cannot
    write: so a web page cannot reach the server by a name of its own.
    """
    hosts = [f"{name}{suffix}" for name in LOCAL for suffix in ("", ":*")]
    hosts += [] if host in (*LOCAL, "0.0.0.0") else [f"{host}:{port}"]
    hosts += _listed(variables, HOSTS)
    origins = [f"http://{name}" for name in hosts] + _listed(variables, ORIGINS)
    return {HOSTS: ",".join(hosts), ORIGINS: ",".join(origins)}


def _listed(variables: dict[str, str], key: str) -> list[str]:
    return [item.strip() for item in variables.get(key, "").split(",") if item.strip()]


def _answers(host: str, port: int) -> bool:
    """Whether the server is up."""
    connection = http.client.HTTPConnection(host, port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _stop(server: "subprocess.Popen[bytes]") -> None:
    """End the server with the processes that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, number)
            server.wait(10)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def serve(store: Store, host: str, port: str) -> int:
    """Show the view in MLflow's server until interrupted; the addresses are printed once it
    answers.

    Raises `UsageError` or `EnvironmentFault` for a port that cannot be used, `EnvironmentFault`
    without mlflow or if the server ends.
    """
    number = checked_port(host, port)
    if importlib.util.find_spec("mlflow") is None:
        load_mlflow(store)  # which says what is missing
    if not is_current(store):
        with store.lock():
            rebuild(store)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `docker stop`
    server = _start(store, host, number)
    try:
        _wait_and_print(server, store, "127.0.0.1" if host == "0.0.0.0" else host, number)
        code = server.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        _stop(server)
    raise EnvironmentFault(f"MLflow's server ended with exit code {code}.")


def _start(store: Store, host: str, port: int) -> "subprocess.Popen[bytes]":
    """MLflow's server, in a process group of its own."""
    user = dict(os.environ)
    variables = user | environment(store) | allowed_addresses(host, port, user)
    # MLflow's server greets with a warning of a library of its own, and then logs every request.
    variables |= {"PYTHONWARNINGS": "ignore", "MLFLOW_LOGGING_LEVEL": "ERROR"}
    command = [sys.executable, "-m", "mlflow", "ui", "--workers", "1"]
    command += ["--backend-store-uri", tracking_uri(store), "--host", host, "--port", str(port)]
    command += ["--uvicorn-opts", "--log-level warning"]
    return subprocess.Popen(command, env=variables, start_new_session=True)


def _wait_and_print(
    server: "subprocess.Popen[bytes]", store: Store, address: str, port: int
) -> None:
    """Print the addresses of the experiments once the server answers, or return when it has ended.

    Raises `EnvironmentFault` when it does neither for `PATIENCE` seconds.
    """
    deadline = time.monotonic() + PATIENCE
    while server.poll() is None and not _answers(address, port):
        if time.monotonic() > deadline:
            raise EnvironmentFault(
                f"MLflow's server did not answer on {address}:{port} within {PATIENCE:.0f} s."
            )
        time.sleep(0.2)
    if server.poll() is not None:
        return
    print(f"MLflow: http://{address}:{port}  (stop with Ctrl-C)")
    for name, path in links(store).items():
        print(f"  {name}: http://{address}:{port}/{path}")
    if not links(store):
        print("  nothing to show yet: run a table first, as `reproduce --table 3 --quick`")
    sys.stdout.flush()
