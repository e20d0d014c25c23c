"""Law: what is wrong is refused from Python as from the command line, in the same words."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fixtures.process import PROGRAMS, environment

Request = tuple[str, dict[str, Any], str, dict[str, Any], str, int]


def of_table(**changes: Any) -> Request:
    """A request of table 3 with these arguments, which are typed as text; the message's part and
    the exit code are the last two.
    """
    message, code = changes.pop("message"), changes.pop("code", 2)
    arguments = {"table": 3, "scale": "smoke", "store": "STORE"} | changes
    typed = {
        name: ",".join(map(str, value)) if isinstance(value, list) else str(value)
        for name, value in arguments.items()
    }
    return "reproduce", arguments, "reproduce", typed, message, code


def of(function: str, command: str, message: str, code: int = 2, **arguments: Any) -> Request:
    """A request whose options are typed as its arguments are called."""
    typed = {name: str(value) for name, value in arguments.items()}
    return function, arguments, command, typed, message, code


PREPARE = {"prepare": "wikitext2", "tokenizer": "none", "out": "none"}


def of_corpus(message: str, code: int = 2, **arguments: Any) -> Request:
    """A corpus that is prepared."""
    values = {"source": "wikitext2", "tokenizer": "none", "out": "none"} | arguments
    typed = PREPARE | {name: str(value) for name, value in arguments.items()}
    return "prepare_corpus", values, "data", typed, message, code


LONG = "a" * 250
CASES = {
    "no table": of_table(table="", message="--table is needed"),
    "an unknown table": of_table(table=33, message="unknown table '33'"),
    "an unknown scale": of_table(scale="smok", message="Did you mean 'smoke'?"),
    "unknown weights": of_table(weights="random_", message="Did you mean 'random'?"),
    "no job": of_table(jobs=0, message="--jobs '0'"),
    "less than no job": of_table(jobs=-1, message="--jobs '-1'"),
    "half a job": of_table(jobs=0.5, message="--jobs '0.5'"),
    "no device": of_table(devices=0, message="--devices '0'"),
    "a seed twice": of_table(seeds=[1, 1], message="--seeds '1,1'"),
    "a seed below 0": of_table(seeds=[-1], message="--seeds '-1'"),
    "no seed": of_table(seeds=[], message="--seeds ''"),
    "half a seed": of_table(seeds=[0.5], message="--seeds '0.5'"),
    "no such cell": of_table(only="gpt9*", message="no cell of table 3 matches --only 'gpt9*'"),
    "a pattern with a line break": of_table(only="a\nb", message="--only 'a\\nb': control"),
    "a pattern with a control character": of_table(only="\x1b[31m", message="control characters"),
    "a store with a line break": of_table(store="a\nb", message="--store 'a\\nb': control"),
    "a store that is no UTF-8": of_table(store="/tmp/a\udcffb", message="no UTF-8"),
    "a store with a long name": of_table(store=LONG, message="200 bytes at most"),
    "a store that is none": of_table(store="/dev/null", message="/dev/null", code=3),
    "data with a control character": of_table(data_dir="a\x07", message="--data-dir 'a\\x07'"),
    "data that are not there": of_table(data_dir="/none", message="is not a folder", code=3),
    "models with a long name": of_table(models_dir=LONG, message="200 bytes at most"),
    "models that are not there": of_table(models_dir="/none", message="is not a folder", code=3),
    "an adapter with a long name": of_table(adapter=LONG, message="200 bytes at most"),
    "an adapter with a name too long": of_table(adapter="a" * 150, message="1 to 100 printable"),
    "an adapter without a name": of_table(adapter="..", message="1 to 100 printable"),
    "an adapter that is not there": of_table(adapter="/none", message="/none", code=3),
    "a table without jobs": of_table(table=1, scale="auto", jobs=2, message="--jobs does not"),
    "an unknown GPU": of("budget", "budget", "Did you mean 'h200'?", gpu="h20", hours=1),
    "hours below 0": of("budget", "budget", "--hours '-1'", gpu="h100", hours=-1),
    "no hours": of("budget", "budget", "give --hours, or --model", gpu="h100"),
    "no GPU": of("budget", "budget", "--gpus '0'", gpu="h100", hours=1, gpus=0),
    "a rate above the peak": of("budget", "budget", "--mfu '2'", gpu="h100", hours=1, mfu=2),
    "a price of nothing": of("budget", "budget", "--price '0'", gpu="h100", hours=1, price=0),
    "no run": of("export", "export", "--run is needed", run="", store="STORE"),
    "another run": of("export", "export", "unknown run '0'", run="0", store="STORE"),
    "another format": of("export", "export", "'merged'", run="0", format="merge", store="STORE"),
    "an export with a long name": of("export", "export", "200 bytes", run="0", out=LONG),
    "a port that is none": of("ui", "ui", "--port 'http'", port="http", store="STORE"),
    "a store of record": of("record", "record", "200 bytes at most", store=LONG),
    "an unknown dataset": ("fetch", {"dataset": "fbp"}, "data", {"fetch": "fbp"}, "'fpb'?", 2),
    "no corpus": ("verify_corpus", {"folder": ""}, "data", {"verify": ""}, "--verify needs", 2),
    "no tokenizer": of_corpus("--prepare needs --tokenizer", tokenizer=""),
    "nowhere to go": of_corpus("--prepare needs --tokenizer", out=""),
    "a tokenizer that is none": of_corpus("holds no tokenizer", code=3),
    "no worker": of_corpus("--workers '0'", workers=0),
    "all held out": of_corpus("--validation '1'", validation=1),
    "neither stop nor skip": of_corpus("Did you mean 'skip'?", on_error="skp"),
    "documents of nothing": of_corpus("--documents goes with files", documents="lines"),
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[str, int]]]:
    """What either door says to every case, from one process."""
    folder = tmp_path_factory.mktemp("doors")
    keys = ("function", "arguments", "command", "options")
    requests = [json.dumps(dict(zip(keys, case[:4], strict=True))) for case in CASES.values()]
    text = "\n".join(requests).replace("STORE", str(folder / "store"))
    answer = subprocess.run(
        [sys.executable, str(PROGRAMS / "doors_program.py"), str(folder)],
        cwd=folder,
        env=environment(PYTHONPATH=str(Path(__file__).parents[1])),
        input=text,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    return dict(zip(CASES, map(json.loads, answer.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_both_doors_refuse_it_in_the_same_words(
    case: str, answers: dict[str, list[tuple[str, int]]]
):
    message, code = CASES[case][4:]
    from_python, typed = answers[case]
    assert from_python == typed
    assert message in typed[0] and typed[1] == code
    assert "\n" not in typed[0] and "Traceback" not in typed[0]
