"""MLflow's web interface over a store, on this machine only."""

import os
import socket
import subprocess
import sys

from finrepro import runtime
from finrepro.errors import EnvironmentFault, UsageError
from finrepro.record import is_current, rebuild, tracking_uri
from finrepro.store import Store


def serve(store: Store, host: str, port: str) -> int:
    """Show the view in MLflow's server until interrupted. Raises `UsageError` or `EnvironmentFault` for a port that cannot be used."""
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise UsageError(f"--port '{port}': expected a number from 1 to 65535.")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, int(port)))
        except OSError as error:
            raise EnvironmentFault(
                f"cannot listen on {host}:{port} ({error.strerror}); choose another with --port."
            ) from None
    if not is_current(store):
        with store.lock():
            rebuild(store)
    print(f"MLflow: http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}  (stop with Ctrl-C)", flush=True)
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "ui",
        "--backend-store-uri",
        tracking_uri(store),
        "--host",
        host,
        "--port",
        port,
    ]
    return subprocess.call(
        [*command, "--workers", "1"], env=os.environ | runtime.OFFLINE | {"GIT_PYTHON_REFRESH": "quiet"}
    )
