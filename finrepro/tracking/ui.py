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
from finrepro.tracking.view import (
    environment,
    is_current,
    links,
    load_mlflow,
    rebuild,
    tracking_uri,
)

# Ports that a browser does not open ("unsafe port"), of those from 1024: each tried in Chromium
# 156; it is the Fetch standard's rule.
BLOCKED = frozenset(
    [
        1719,
        1720,
        1723,
        2049,
        3659,
        4045,
        5060,
        5061,
        6000,
        6566,
        6665,
        6666,
        6667,
        6668,
        6669,
        6697,
        10080,
    ]
)
LOCAL = ("localhost", "127.0.0.1")
PATIENCE = 120.0  # seconds until the server has to answer
ALLOWED, ORIGINS = (
    "MLFLOW_SERVER_ALLOWED_HOSTS",
    "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS",
)  # MLflow's own names


def _bind(host: str, port: int) -> OSError | None:
    """What keeps us from listening there, None if nothing does."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error
    return None


def _checked_port(host: str, text: str) -> int:
    """The port as a number. Raises `UsageError` or `EnvironmentFault`, naming a free one nearby,
    if it cannot be used.
    """
    if not (text.isascii() and text.isdecimal()) or not 0 < int(text) < 65536:
        raise UsageError(f"--port '{text}': expected a number from 1 to 65535.")
    port = int(text)
    near = range(max(port + 1, 1024), min(port + 200, 65536))
    # Looked for only when it is to be named.
    free = (each for each in near if each not in BLOCKED and _bind(host, each) is None)
    if port in BLOCKED:
        raise UsageError(
            f"--port {port}: browsers refuse to open this port; free is --port {next(free, 5000)}."
        )
    error = _bind(host, port)
    if error is None:
        return port
    if error.errno == errno.EADDRINUSE:
        other = next(free, None)
        hint = f"free is --port {other}" if other else "choose another with --port"
        raise EnvironmentFault(f"port {port} of {host} is in use, perhaps by another `ui`; {hint}.")
    raise EnvironmentFault(
        f"cannot listen on {host}:{port} ({error.strerror}); choose another with --host or --port."
    )


def guard(host: str, port: int, given: dict[str, str]) -> dict[str, str]:
    """MLflow's variables that say which addresses it answers to: this machine's, `host`, and those
    that the user allows.

    Any port of this machine is right, since a container's port may be mapped to another. Every
    other name or address is refused with "Invalid Host header", and pages of other sites cannot
    write: so a web page cannot reach the server by a name of its own. `given` is the user's
    environment; MLFLOW_SERVER_ALLOWED_HOSTS adds names, as in "lab.example:5000".
    """
    hosts = [f"{name}{suffix}" for name in LOCAL for suffix in ("", ":*")]
    hosts += [] if host in (*LOCAL, "0.0.0.0") else [f"{host}:{port}"]
    hosts += [each.strip() for each in given.get(ALLOWED, "").split(",") if each.strip()]
    origins = [f"http://{each}" for each in hosts]
    origins += [each.strip() for each in given.get(ORIGINS, "").split(",") if each.strip()]
    return {ALLOWED: ",".join(hosts), ORIGINS: ",".join(origins)}


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
    number = _checked_port(host, port)
    if importlib.util.find_spec("mlflow") is None:
        load_mlflow(store)  # which says what is missing
    if not is_current(store):
        with store.lock():
            rebuild(store)
    variables = os.environ | environment(store) | guard(host, number, dict(os.environ))
    # MLflow's server greets with a warning of a library of its own, and then logs every request.
    variables |= {"PYTHONWARNINGS": "ignore", "MLFLOW_LOGGING_LEVEL": "ERROR"}
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "ui",
        "--backend-store-uri",
        tracking_uri(store),
        "--workers",
        "1",
    ]
    command += ["--host", host, "--port", port, "--uvicorn-opts", "--log-level warning"]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `docker stop`
    server = subprocess.Popen(command, env=variables, start_new_session=True)
    try:
        reached = "127.0.0.1" if host == "0.0.0.0" else host
        until = time.monotonic() + PATIENCE
        while server.poll() is None and not _answers(reached, number):
            if time.monotonic() > until:
                raise EnvironmentFault(
                    f"MLflow's server did not answer on {reached}:{port} within {PATIENCE:.0f} s."
                )
            time.sleep(0.2)
        if server.poll() is None:
            print(f"MLflow: http://{reached}:{port}  (stop with Ctrl-C)")
            for name, path in links(store).items():
                print(f"  {name}: http://{reached}:{port}/{path}")
            if not links(store):
                print("  nothing to show yet: run a table first, as `reproduce --table 3 --quick`")
            sys.stdout.flush()
        code = server.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        _stop(server)
    raise EnvironmentFault(f"MLflow's server ended with exit code {code}.")
