"""How a process ends that has computed in a group."""

import subprocess
import sys

from finrepro import PROJECT

PROGRAM = """
import threading, atexit
from finrepro.runtime import process, ranks

atexit.register(print, "taken apart")
# the interpreter would wait for it for ever
threading.Thread(target=threading.Event().wait).start()
print("unflushed", end="")
ranks.leave_process_group()
process.end({code})
"""


def test_a_process_ends_with_its_code_and_all_that_it_said_whatever_thread_still_runs() -> None:
    for code in (0, 4, 130):
        call = [sys.executable, "-c", PROGRAM.format(code=code)]
        ended = subprocess.run(
            call, cwd=PROJECT, capture_output=True, text=True, check=False, timeout=60
        )
        assert (ended.returncode, ended.stdout, ended.stderr) == (code, "unflushed", "")


def test_a_closed_output_does_not_keep_a_process_from_ending() -> None:
    program = (
        "import sys; from finrepro.runtime import process; print('lost'); sys.stdout.close(); "
        "process.end(3)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=PROJECT, capture_output=True, check=False, timeout=60
    )
    assert ended.returncode == 3 and not ended.stderr
