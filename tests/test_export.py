"""Exports. The law: what `invoke export` writes, loaded by PEFT and Transformers alone, computes what the run computes; where it does not,
or the run is not whole, nothing is left behind."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fixtures_model import MINIATURES, broken, make, process, spec_of, stir, tokenizer  # noqa: F401
from fixtures_process import environment, forget, one_line
from safetensors.torch import load_file, save_file

from finrepro import catalogue, provenance, store
from finrepro.adapters import lora
from finrepro.errors import EnvironmentFault, FinreproError, UsageError
from finrepro.exporting import rebuild, verify, write
from finrepro.exporting.command import export
from finrepro.manifest import damaged_files
from finrepro.place import Place
from finrepro.result import header
from finrepro.schema import Choice
from finrepro.spec import RunSpec
from finrepro.store import open_store
from finrepro.tokens import tokenizer_digest

GPT2, LLAMA = MINIATURES
SCORE = {"task": "tfns", "metric": "accuracy", "value": 0.625, "low": 0.55, "high": 0.7, "n": 9, "constant": 0.5}


def seal(place: Place, spec: RunSpec, **facts: Any) -> str:
    """A finished run of `spec` as a cell leaves it, its trained parameters drawn; its id."""
    folder = place.store.run_folder(spec.base_run) / "weights" if spec.base_run else None
    model = stir(make(spec, folder).model)
    with place.store.new_run(spec.run_id) as target:
        (target / "weights").mkdir()
        spec.adapter.module("adapters").export(model, target / "weights")
        if spec.weights == "scratch":
            tokenizer(spec.model.family).save_pretrained(target / "weights")
        base: dict[str, Any] = {"files": {}}
        if spec.base_run:
            base = {"run_id": spec.base_run, "weights": place.store.weights_digest(spec.base_run)}
        digest = tokenizer_digest(folder or target / "weights")
        result = header(spec, store.DONE, None, time.time(), "cpu") | {
            "scores": [SCORE],
            "data": {
                "fingerprints": {"tfns": {"train": "a" * 64}},
                "files": {"tfns": {"train": "d" * 64}},
                "base": base,
                "tokenizer": {"origin": "", "sha256": digest},
            },
        }
        store.write_json(target / "result.json", result | facts)
    return spec.run_id


def miniature(name: str, adapter: str | Choice, quantizer: str = "none", **changes: Any) -> RunSpec:
    return dataclasses.replace(spec_of(catalogue.model(name), adapter, quantizer), **changes)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A store with the runs that make the two miniatures' weights."""
    place = Place(open_store(tmp_path_factory.mktemp("export") / "store"))
    for name in MINIATURES:
        seal(place, miniature(name, "full", weights="scratch"))
    return place


def on_base(place: Place, name: str, adapter: str | Choice, quantizer: str = "none") -> str:
    """A finished run on a miniature's own weights."""
    base = miniature(name, "full", weights="scratch").run_id
    return seal(place, miniature(name, adapter, quantizer, weights="pretrained", base_run=base))


FRESH = """
import json, sys
sys.modules["finrepro"] = None  # whoever imports it fails
{snippet}
for module in model.modules():
    module.support_avx512bf16_for_cpu = False
with torch.no_grad():
    found = [model(input_ids=torch.tensor([ids])).logits[0].float() for ids in json.loads(sys.argv[1])]
from safetensors.torch import save_file
save_file({{str(i): each for i, each in enumerate(found)}}, sys.argv[2])
assert not [name for name in sys.modules if name.startswith("finrepro.")]
print(type(model).__name__, tokenizer.decode(tokenizer("a b")["input_ids"], skip_special_tokens=True))
"""


def snippet(folder: Path) -> str:
    """The card's own lines."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    return str(code)


def elsewhere(folder: Path, prompts: list[list[int]], tmp_path: Path) -> list[torch.Tensor]:
    """The logits of an export, loaded by its card's lines in a process without this package, in a folder that was moved."""
    moved = Path(shutil.copytree(folder, tmp_path / "moved" / folder.name))
    program = FRESH.format(snippet=snippet(moved))
    kept = {key: value for key, value in environment().items() if key != "PYTHONPATH"}
    answer = subprocess.run(
        [sys.executable, "-c", program, json.dumps(prompts), str(tmp_path / "logits")],
        cwd=moved, env=kept, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    return [each for _, each in sorted(load_file(tmp_path / "logits").items())]


def run_logits(place: Place, run_id: str, wanted: str = "peft") -> tuple[list[list[int]], list[torch.Tensor]]:
    """Prompts, and the logits of the run's model made by training's own code and not by the export's."""
    from finrepro.exporting.recorded import find

    found = find(place.store, run_id, wanted)
    start = rebuild.start(found, place, wanted)
    model = stir(make(found.spec, start.folder).model)
    prompts = rebuild.encoded_prompts(start.tokenizer)
    return prompts, rebuild.logits(model, prompts)


def equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert verify.difference(expected, found).relative <= 1e-5


def safe(folder: Path) -> None:
    """Safetensors, JSON and text alone, sealed, and no path of this machine."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".md", ".sha256", ".jinja"}
    assert damaged_files(folder) == []
    for path in files:
        if path.suffix != ".safetensors":
            assert str(folder.parent) not in path.read_text() and "finrepro_isolated" not in path.read_text()


@pytest.mark.parametrize(
    ("name", "adapter", "quantizer", "wanted"),
    [
        (LLAMA, "iec_r8", "icq", "peft"),
        (GPT2, "lora_r4", "nf4", "merged"),
        pytest.param(GPT2, "lora_r4", "icq", "peft", marks=pytest.mark.slow),
        pytest.param(GPT2, "rslora_r8", "nf4", "peft", marks=pytest.mark.slow),
        pytest.param(LLAMA, "lora_r4", "int8", "peft", marks=pytest.mark.slow),
        pytest.param(LLAMA, "iec_r8", "icq", "merged", marks=pytest.mark.slow),
        pytest.param(LLAMA, "dora_r8", "none", "merged", marks=pytest.mark.slow),
    ],
)
def test_an_export_loads_where_this_package_is_not(
    name: str, adapter: str, quantizer: str, wanted: str, begun: Place, tmp_path: Path
):
    """I5: by the lines of its own card, in another process and another folder."""
    run_id = on_base(begun, name, adapter, quantizer)
    folder = export(run_id, wanted, tmp_path / "out", begun)
    safe(folder)
    prompts, expected = run_logits(begun, run_id, wanted)
    equal(elsewhere(folder, prompts, tmp_path), expected)
    broken(equal, [each * 1.001 for each in expected], expected)


@pytest.mark.parametrize("quantizer", ["none", "nf4", "icq", "int8"])
@pytest.mark.parametrize("adapter", ["lora_r4", "iec_r8", "dora_r8", "vera_r256"])
@pytest.mark.parametrize("name", MINIATURES)
def test_every_linear_method_is_exported_in_every_format(
    name: str, adapter: str, quantizer: str, begun: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    if adapter == "dora_r8" and quantizer == "icq":
        return  # refused when it is planned
    run_id = on_base(begun, name, adapter, quantizer)
    for wanted in ("peft", "merged"):
        if (adapter, quantizer, wanted) == ("vera_r256", "icq", "peft") or (quantizer, wanted) == ("int8", "merged"):
            with pytest.raises(UsageError, match=r"possible: (peft|merged) or base"):
                export(run_id, wanted, tmp_path / wanted, begun)
            continue
        safe(export(run_id, wanted, tmp_path / wanted, begun))
        assert "logits equal the run's" in capsys.readouterr().out
    assert not list(tmp_path.glob(".*"))
