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


TOUCHES_MEMORY = """
import resource, sys
from finrepro.runtime import memory
if sys.argv[1] == "reused":
    memory.reuse_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        for size in (16 << 20, 8 << 20):
            block = bytes(size)
            block = bytearray(block)
            del block
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def page_faults(how: str) -> int:
    ended = subprocess.run(
        [sys.executable, "-c", TOUCHES_MEMORY, how],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(ended.stdout)


def test_memory_that_was_freed_is_used_again_without_a_page_fault() -> None:
    assert page_faults("reused") < page_faults("as glibc does") / 10
