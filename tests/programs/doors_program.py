"""The same requests through both doors, without types checked at run time: `python
doors_program.py STORE`. Standard input has lines of JSON: the function of finrepro.api with its
arguments, the command with its options as they are typed. For each a line of JSON comes back: what
either says, and its exit code.
"""

import contextlib
import io
import json
import sys
from typing import Any

from invoke.context import Context

from finrepro import api
from finrepro.commands import collection
from finrepro.errors import FinreproError


def from_python(function: str, arguments: dict[str, Any]) -> tuple[str, int]:
    try:
        getattr(api, function)(**arguments)
    except FinreproError as error:
        return str(error), error.exit_code
    return "", 0


def typed(command: str, options: dict[str, Any]) -> tuple[str, int]:
    code, said = 0, io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            getattr(collection, command)(Context(), **options)
        except SystemExit as end:
            code = int(end.code or 0)
    return said.getvalue().removeprefix("finrepro: ").removesuffix("\n"), code


for line in sys.stdin:
    request = json.loads(line)
    with contextlib.redirect_stdout(io.StringIO()):
        answers = [
            from_python(request["function"], request["arguments"]),
            typed(request["command"], request["options"]),
        ]
    print(json.dumps(answers))
