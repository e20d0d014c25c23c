"""Samples of what the process uses while it runs, for the system metrics of a run."""

import threading
import time
from typing import Any

import psutil


class Monitor:
    """A context manager that samples processor and memory use of this process every `interval`
    seconds into `samples`.
    """

    def __init__(self, interval: float = 1.0) -> None:
        self.interval = interval
        self.samples: list[dict[str, Any]] = []
        self._process = psutil.Process()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _sample(self) -> None:
        gib = 2**30
        self.samples.append(
            {
                "time": time.time(),
                "cpu_utilization_percentage": self._process.cpu_percent(),
                "process_memory_gib": self._process.memory_info().rss / gib,
                "system_memory_usage_percentage": psutil.virtual_memory().percent,
            }
        )

    def _run(self) -> None:
        while not self._stop.wait(self.interval):
            self._sample()

    def __enter__(self) -> "Monitor":
        self._process.cpu_percent()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()
