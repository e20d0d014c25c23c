"""Checkpoints on this machine and on the hub. The law: what is wrong with one is said in one
line before anything is computed, naming the file and both values; a gated model says where
access is granted; no message ever holds an access token."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finrepro import PROJECT
from finrepro.catalogue import reader
from finrepro.catalogue.spec import Model
from finrepro.errors import EnvironmentFault
from finrepro.evidence.manifest import file_digest
from finrepro.models import checkpoints
from finrepro.models import safetensors as shards
from finrepro.models.configuration import compare_configuration

REAL = tuple(name for name, entry in reader.entries("models").items() if entry.get("hub"))
MODEL = reader.model("llama3_1_8b")
CANARY = "hf_" + "CANARYcanary0123456789"


def safetensors(path: Path, tensors: dict[str, int]) -> None:
    """A file in the format, written by hand: names, and bytes each."""
    header, end = {}, 0
    for name, size in tensors.items():
        header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))


def hub_configuration(model: Model = MODEL) -> dict[str, Any]:
    """config.json as the hub's older files have it: the rotary settings in two keys."""
    found = {"model_type": model.family, "attention_dropout": 0.1, **model.architecture}
    rope = dict(found.pop("rope_parameters", None) or {})
    if rope:
        theta = rope.pop("rope_theta")
        found |= {
            "rope_theta": theta,
            "rope_scaling": None if rope["rope_type"] == "default" else rope,
        }
    return found


def tokenizer(tokens: int) -> dict[str, Any]:
    return {
        "model": {"vocab": {f"t{index}": index for index in range(tokens - 1)}},
        "added_tokens": [{"id": tokens - 1}],
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint in two shards that is in order, as far as can be seen without reading a
    tensor.
    """
    found = tmp_path / "checkpoint"
    found.mkdir()
    (found / "config.json").write_text(json.dumps(hub_configuration()))
    (found / "tokenizer.json").write_text(json.dumps(tokenizer(128256)))
    safetensors(found / "model-1.safetensors", {"a": 8, "b": 5})
    safetensors(found / "model-2.safetensors", {"c": 3})
    index = {"a": "model-1.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"}
    (found / shards.INDEX).write_text(json.dumps({"weight_map": index}))
    return found


def refused(folder: Path, *parts: str) -> None:
    """`check` raises one line with the folder and all the parts."""
    try:
        checkpoints.check(MODEL, folder)
    except EnvironmentFault as error:
        assert error.exit_code == 3 and "\n" not in str(error) and str(folder) in str(error)
        for part in parts:
            assert part in str(error), error
        return
    raise AssertionError("nothing was said")


def rewrite(name: str, **changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps(content))

    return change


def only_pickles(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")


def unlink(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def cut(name: str, keep: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:keep])


def text(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content) and None


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n"
FAULTS: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "another family": (
        rewrite("config.json", model_type="qwen2"),
        ("model_type is 'qwen2', llama3_1_8b has 'llama'",),
    ),
    "another size": (
        rewrite("config.json", hidden_size=8192),
        ("hidden_size is 8192, llama3_1_8b has 4096",),
    ),
    "Llama 3 in place of 3.1": (
        rewrite("config.json", rope_scaling=None),
        ("rope_parameters.", "None", "llama3_1_8b has"),
    ),
    "quantized already": (
        rewrite("config.json", quantization_config={"bits": 4}),
        ("is quantized already",),
    ),
    "no configuration": (unlink("config.json"), ("lacks config.json",)),
    "corrupt configuration": (text("config.json", "{"), ("config.json: not readable JSON",)),
    "configuration too deep": (
        text("config.json", '{"a": ' + "[" * 100 + "]" * 100 + "}"),
        ("config.json: not readable JSON: nested more than 100 deep",),
    ),
    "configuration is a list": (
        text("config.json", "[]"),
        ("a JSON object is expected, not a list",),
    ),
    "corrupt index": (text(shards.INDEX, '{"weight_map"'), ("index.json: not readable JSON",)),
    "empty index": (text(shards.INDEX, "{}"), ("'weight_map' must map",)),
    "index leads elsewhere": (
        rewrite(shards.INDEX, weight_map={"a": "../a"}),
        ("which is no file of this folder",),
    ),
    "index is wrong": (
        rewrite(shards.INDEX, weight_map={"c": "model-1.safetensors"}),
        ("c is in model-1.safetensors, and it is not",),
    ),
    "shard absent": (
        unlink("model-2.safetensors"),
        ("1 of 2 shards are absent, the first is model-2.safetensors",),
    ),
    "shard truncated": (
        cut("model-1.safetensors", -1),
        ("model-1.safetensors", "its header says", "truncated"),
    ),
    "header truncated": (cut("model-1.safetensors", 30), ("model-1.safetensors: truncated",)),
    "shard empty": (cut("model-1.safetensors", 0), ("0 bytes",)),
    "shard is text": (
        text("model-1.safetensors", "these are not the weights"),
        ("no safetensors file",),
    ),
    "shard is a pointer": (
        text("model-1.safetensors", POINTER),
        ("model-1.safetensors: a Git LFS pointer", "git lfs pull"),
    ),
    "tokenizer is a pointer": (text("tokenizer.json", POINTER), ("tokenizer.json: a Git LFS",)),
    "SentencePiece alone": (
        lambda folder: (folder / "tokenizer.json").rename(folder / "tokenizer.model"),
        ("tokenizer.model alone cannot be read", "AutoTokenizer.save_pretrained"),
    ),
    "pickles alone": (only_pickles, ("pytorch_model.bin", "never read", "safetensors version")),
    "no tokenizer": (unlink("tokenizer.json"), ("lacks its tokenizer",)),
    "corrupt tokenizer": (text("tokenizer.json", "{"), ("tokenizer.json: not readable JSON",)),
    "another model's tokenizer": (
        text("tokenizer.json", json.dumps(tokenizer(32000))),
        ("32000 tokens", "another model's"),
    ),
    "no tokenizer's file": (
        text("tokenizer.json", '{"model": {"vocab": 3}}'),
        ("not a tokenizer's file",),
    ),
    "too many tokens": (
        text("tokenizer.json", json.dumps(tokenizer(128257))),
        ("128257 tokens", "128256 rows"),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_with_a_checkpoint_is_said_in_one_line(fault: str, folder: Path) -> None:
    change, parts = FAULTS[fault]
    checkpoints.check(MODEL, folder)
    change(folder)
    refused(folder, *parts)


@pytest.mark.parametrize("name", REAL)
def test_every_entry_accepts_its_own_configuration_and_no_other_sizes(
    name: str, folder: Path
) -> None:
    model = reader.model(name)
    (folder / "tokenizer.json").write_text(
        json.dumps(tokenizer(int(model.architecture["vocab_size"])))
    )
    (folder / "config.json").write_text(json.dumps(hub_configuration(model)))
    checkpoints.check(model, folder)
    for other in map(reader.model, REAL):
        if other.architecture != model.architecture:
            with pytest.raises(EnvironmentFault, match=f"is not {other.name}"):
                checkpoints.check(other, folder)


LLAMA_THETA = MODEL.architecture["rope_parameters"]["rope_theta"]
# Configurations that compute what the catalogue's entry does, and mutants that do not.
EQUAL: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("gpt2_127m", {"n_inner": None}, {"n_inner": 768}),
    ("gpt2_127m", {"n_inner": 4 * 768}, {"n_inner": 4 * 768 + 1}),
    ("llama2_7b", {"num_key_value_heads": None}, {"num_key_value_heads": 8}),
    ("llama2_7b", {"head_dim": None}, {"head_dim": 64}),
    ("llama2_7b", {"head_dim": 128}, {"head_dim": 127}),
    ("llama2_7b", {"rms_norm_eps": 9.999999747378752e-06}, {"rms_norm_eps": 1.00001e-05}),
    ("llama2_7b", {"hidden_act": "swish", "mlp_bias": None}, {"hidden_act": "gelu"}),
    (
        "llama2_7b",
        {"rope_parameters": {"rope_type": "default"}, "rope_theta": 10000.0},
        {"rope_parameters": {"rope_type": "default"}, "rope_theta": 20000.0},
    ),
    (
        "llama2_7b",
        {"rope_parameters": {"rope_theta": 10000}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
    ),
    (
        "llama3_1_8b",
        {
            "rope_parameters": {
                key: value
                for key, value in MODEL.architecture["rope_parameters"].items()
                if key != "rope_theta"
            },
            "rope_theta": int(LLAMA_THETA),
        },
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": LLAMA_THETA, "factor": 8.1}},
    ),
]


@pytest.mark.parametrize(("name", "equal", "different"), EQUAL, ids=str)
def test_a_configuration_that_means_the_same_is_accepted_however_it_is_written(
    name: str, equal: dict[str, Any], different: dict[str, Any], folder: Path
) -> None:
    model = reader.model(name)
    config = hub_configuration(model)
    if "rope_parameters" in equal:
        config.pop("rope_scaling", None)
    architecture = {"hidden_act": "silu", **model.architecture}  # as the model's class has it

    def compare(**changes: Any) -> None:
        (folder / "config.json").write_text(json.dumps(config | changes))
        compare_configuration(name, model.family, architecture, folder)

    compare(**equal)
    with pytest.raises(EnvironmentFault, match=f"is not {name}"):
        compare(**different)


@pytest.mark.parametrize(
    "place", ["Meta-Llama-3.1-8B", "meta-llama/Meta-Llama-3.1-8B", "Llama-3.1-8B", "llama3_1_8b"]
)
def test_a_checkpoint_is_found_under_every_id_that_it_had(
    place: str, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "models" / place).parent.mkdir(parents=True)
    folder.rename(tmp_path / "models" / place)
    assert checkpoints.locate(MODEL, tmp_path / "models") == tmp_path / "models" / place
    assert checkpoints.locate(reader.model("llama3_1_8b_instruct"), tmp_path / "models") is None


def test_vocabulary_files_of_a_gpt2_are_counted(folder: Path) -> None:
    model = reader.model("gpt2_127m")
    (folder / "config.json").write_text(json.dumps(hub_configuration(model)))
    (folder / "tokenizer.json").unlink()
    (folder / "merges.txt").write_text("")
    for tokens, fits in ((50257, True), (50258, False)):
        (folder / "vocab.json").write_text(
            json.dumps({f"t{index}": index for index in range(tokens)})
        )
        if fits:
            checkpoints.check(model, folder)
        else:
            with pytest.raises(
                EnvironmentFault, match="50258 tokens, the embedding of gpt2_127m has 50257 rows"
            ):
                checkpoints.check(model, folder)


def test_a_checkpoint_is_checked_without_torch(folder: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from finrepro.catalogue import reader
from finrepro.models import checkpoints
checkpoints.check(reader.model("llama3_1_8b"), Path({str(folder)!r}))
assert not {{"torch", "transformers", "safetensors", "huggingface_hub"}} & set(sys.modules)
"""
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    answer = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr


@pytest.mark.parametrize("name", REAL)
def test_a_checkpoint_is_found_under_each_of_its_names_and_in_the_cache(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = reader.model(name)
    assert model.hub is not None
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    places = [model.name, model.hub.id, model.hub.id.rpartition("/")[2]]
    cached = (
        tmp_path
        / "home"
        / "hub"
        / f"models--{model.hub.id.replace('/', '--')}"
        / "snapshots"
        / str(model.hub.revision)
    )
    for place in [
        *(tmp_path / f"models{index}" / place for index, place in enumerate(places)),
        cached,
    ]:
        place.parent.mkdir(parents=True)
        models_dir = next(
            (
                parent
                for parent in place.parents
                if parent.name.startswith("models") and parent.parent == tmp_path
            ),
            None,
        )
        assert checkpoints.locate(model, models_dir) is None and checkpoints.missing_reason(
            model, models_dir
        )
        place.symlink_to(folder, target_is_directory=True)
        assert (
            checkpoints.locate(model, models_dir) == place
            and checkpoints.missing_reason(model, models_dir) is None
        )
        place.unlink()
    assert all(checkpoints.locate(reader.model(other), folder.parent) is None for other in REAL)


def test_why_weights_are_missing_says_what_to_do(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    assert "https://huggingface.co/meta-llama/Llama-3.1-8B" in str(
        checkpoints.missing_reason(MODEL, None)
    )
    open_model = reader.model("gpt2_127m")
    assert "HF_TOKEN" not in str(checkpoints.missing_reason(open_model, tmp_path))
    folder.rename(tmp_path / MODEL.name)
    only_pickles(tmp_path / MODEL.name)
    assert "never read" in str(checkpoints.missing_reason(MODEL, tmp_path))
    (tmp_path / MODEL.name / "config.json").unlink()
    assert "lacks config.json" in str(checkpoints.missing_reason(MODEL, tmp_path))


def test_digests_are_of_the_weight_files(folder: Path) -> None:
    safetensors(folder / "another.safetensors", {"x": 1})
    names = ["model-1.safetensors", "model-2.safetensors"]
    expected = {name: file_digest(folder / name) for name in names}
    assert checkpoints.digests(folder, file_digest) == expected


class Refusal(Exception):
    """What a transport might raise: the request, with its headers."""


def attempt(monkeypatch: pytest.MonkeyPatch, error: Exception, model: Model = MODEL) -> str:
    """What `fetch` says when the hub's client raises `error`."""
    import huggingface_hub

    def download(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(EnvironmentFault) as caught:
        checkpoints.fetch(model)
    assert "\n" not in str(caught.value) and caught.value.__suppress_context__
    return str(caught.value)


@pytest.mark.parametrize("token", [CANARY, "an-old-token-of-another-form"])
@pytest.mark.parametrize("kept", ["environment", "file"])
def test_no_message_holds_the_token(
    token: str, kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HF_TOKEN_PATH", raising=False)
    said = f"401 for request with header 'Authorization: Bearer {token}'"
    if token != CANARY:  # a canary of the usual form is found by its form alone
        assert token in attempt(monkeypatch, Refusal(said))
    if kept == "environment":
        monkeypatch.setenv("HF_TOKEN", token)
    else:
        (tmp_path / "token").write_text(token + "\n")
    message = attempt(monkeypatch, Refusal(said))
    assert token not in message and "401 for request" in message and "[token]" in message


def test_a_gated_model_names_the_page_that_grants_access(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import GatedRepoError

    response: Any = SimpleNamespace(
        headers={}, request=None
    )  # the transport's, of which the error takes no more
    for error in (
        GatedRepoError("Access to model is restricted", response=response),
        OSError("no route"),
    ):
        message = attempt(monkeypatch, error)
        assert "https://huggingface.co/meta-llama/Llama-3.1-8B" in message and "HF_TOKEN" in message
    assert "HF_TOKEN" not in attempt(monkeypatch, OSError("no route"), reader.model("gpt2_127m"))


def test_another_commit_than_the_pinned_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path / "0" / "abc")
    )
    with pytest.raises(EnvironmentFault, match="the hub gave commit abc, pinned is"):
        checkpoints.fetch(MODEL)
    assert MODEL.hub is not None
    pinned = dataclasses.replace(MODEL, hub=dataclasses.replace(MODEL.hub, revision="abc"))
    assert checkpoints.fetch(pinned) == tmp_path / "0" / "abc"
