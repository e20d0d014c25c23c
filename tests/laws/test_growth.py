"""Law: what is added is new files and entries alone; the difference to the project is shown."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fixtures.process import forget, python

from finrepro import PROJECT
from finrepro.catalogue import reader
from finrepro.kinds import HOMES

QUANTIZER = '''"""Weights of half the width."""
from finrepro.settings import settings
@settings
class Config:
    """No settings."""
linear = None
def encode(weight, config):
    return weight.half()
def decode(stored):
    return stored
def stored_bytes(stored):
    return stored.nbytes
def layer_bytes(config, inputs, outputs, dtype_bits):
    return 2 * inputs * outputs
'''
FORMAT = '''"""A text a line, a tab, and its label."""
from finrepro.data.examples import Example
from finrepro.data.files import Development, File
from finrepro.catalogue.spec import Hub
from finrepro.settings import settings
@settings
class Config:
    """One file a split."""
    version: int
    title: str
    licence: str
    embedded: bool
    hub: Hub | None
    files: dict[str, File]
    development: Development
def read(contents, name, config):
    """Split -> its lines."""
    return {
        split: tuple(
            Example(id=f"{name}/{split}/{row}", text=text, label=label)
            for row, (text, _, label) in enumerate(
                line.partition("\\t") for line in content.decode().splitlines()
            )
        )
        for split, content in contents.items()
    }
'''
FAMILY = (PROJECT / "finrepro" / "evaluation" / "tasks" / "classification.py").read_text()


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the project to add to."""
    ignored = shutil.ignore_patterns("__pycache__")
    for part in ("finrepro", "configs"):
        shutil.copytree(PROJECT / part, tmp_path / part, ignore=ignored)
    shutil.copy(PROJECT / "tasks.py", tmp_path)
    return tmp_path


def changed(copy: Path) -> set[str]:
    """The files of the copy that the project has not, or has with another content."""
    paths = {
        path.relative_to(copy)
        for part in ("finrepro", "configs")
        for path in (copy / part).rglob("*")
    }
    return {
        path.as_posix()
        for path in paths
        if (copy / path).is_file()
        and "__pycache__" not in path.parts
        and not (
            (PROJECT / path).is_file()
            and (PROJECT / path).read_bytes() == (copy / path).read_bytes()
        )
    }


def add_kind(copy: Path, package: str, kind: str, source: str) -> str:
    path = copy.joinpath(*HOMES[package].split(".")) / f"{kind}.py"
    path.write_text(source)
    return path.relative_to(copy).as_posix()


def add_entry(copy: Path, name: str, entry: dict[str, Any]) -> str:
    path = copy / "configs" / f"{name}.yaml"
    path.write_text(path.read_text() + "\n" + yaml.safe_dump(entry))
    return path.relative_to(copy).as_posix()


def output(copy: Path, *arguments: str) -> str:
    answer = python(*arguments, cwd=copy, FINREPRO_STORE=str(copy / "store"))
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def test_a_new_quantizer_is_a_file_and_an_entry(copy: Path):
    files = {
        add_kind(copy, "quantizers", "half", QUANTIZER),
        add_entry(copy, "quantizers", {"half_width": {"kind": "half"}}),
    }
    label = "gpt2_127m_mini-half_width-lora_r8-tfns-s0"
    command = ("-m", "invoke", "cells", "--scale", "smoke", "--full", "--only", label)
    assert label in output(copy, *command)
    assert changed(copy) == files


def test_a_new_format_and_a_new_task_family_are_a_file_and_an_entry_each(copy: Path):
    entry = reader.entries("datasets")["tfns"]
    entry = {key: entry[key] for key in ("version", "title", "licence", "embedded", "development")}
    files = {"train": {"path": "lines/train.txt", "sha256": None, "rows": 3}}
    task = reader.entries("tasks")["tfns"] | {"kind": "sentiment", "dataset": "lines"}
    added = {
        add_kind(copy, "datasets", "tabbed", FORMAT),
        add_entry(
            copy, "datasets", {"lines": {**entry, "kind": "tabbed", "hub": None, "files": files}}
        ),
        add_kind(copy, "tasks", "sentiment", FAMILY),
        add_entry(copy, "tasks", {"mood": task}),
    }
    (copy / "data" / "lines").mkdir(parents=True)
    (copy / "data" / "lines" / "train.txt").write_text(
        "Up.\tpositive\nDown.\tnegative\nSo.\tneutral\n"
    )
    script = """
from pathlib import Path
from finrepro.catalogue import reader
from finrepro.data import files
from finrepro.kinds import task_of
task = reader.task("mood", "short")
examples = files.load(task.dataset, Path("data"), ("train",)).splits["train"]
print([task_of(task.task).prompt(e) + task_of(task.task).target(e) for e in examples])
"""
    assert "Sentiment: " in output(copy, "-c", script)
    assert changed(copy) == added


def test_a_base_model_of_a_known_family_on_a_local_disk_is_one_entry(tmp_path: Path, configs: Path):
    """Its weights are read from there, whoever wrote them."""
    from fixtures.model import spec_of
    from transformers import LlamaConfig, LlamaForCausalLM

    from finrepro.models.build import load

    sizes = {
        "vocab_size": 120,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    written = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False))
    written.save_pretrained(tmp_path / "llama_tiny")
    entry = {
        "family": "llama",
        "scale": "smoke",
        "variant": "base",
        "dtype": "float32",
        "parameters": sum(parameter.numel() for parameter in written.parameters()),
        "architecture": {**sizes, "tie_word_embeddings": False},
    }
    add_entry(configs.parent, "models", {"llama_tiny": entry})
    forget()
    spec = spec_of(reader.model("llama_tiny"))
    model = load(spec, tmp_path / "llama_tiny")
    values = dict(model.named_parameters())
    for name, parameter in written.named_parameters():
        assert torch.equal(values[name], parameter), name
