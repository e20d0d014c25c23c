"""A seeded harness of hostile adapter folders. The law: each is scored as plain PEFT computes it,
within 1e-5 of the logits, or refused in one line that names the folder."""

import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.foreign import edit, plain_logits, saved, scored_logits
from fixtures.model import MINIATURES, assert_close, broken, process  # noqa: F401
from safetensors.torch import load_file, save_file
from torch import Tensor

from finrepro.errors import EnvironmentFault
from finrepro.methods import peft_settings
from finrepro.methods.adapters import peft_folder

LLAMA = MINIATURES[1]
SEEDS = range(40)
Tensors = dict[str, Tensor]
A, B = "layers.0.self_attn.q_proj.lora_A.weight", "layers.0.self_attn.q_proj.lora_B.weight"


@pytest.fixture
def sound(process: None, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """The folder that is spoilt, rank 4 on q_proj and v_proj; made once."""
    folder = tmp_path_factory.getbasetemp() / "sound"
    return folder if folder.is_dir() else saved(LLAMA, {}, folder)


def equals_plain_peft_or_is_refused(folder: Path) -> str:
    """The law; what happened, 'equal' or the refusal."""
    try:
        scored = scored_logits(LLAMA, folder)
    except EnvironmentFault as fault:
        assert "\n" not in str(fault) and len(str(fault)) < 1000 and str(folder) in str(fault)
        return str(fault)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of what it ignores
        assert_close(scored, plain_logits(LLAMA, folder), 1e-5)
    return "equal"


def retensor(change: Callable[[Tensors], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / peft_folder.WEIGHTS)
        change(tensors)
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            folder / peft_folder.WEIGHTS,
        )

    return spoil


def of(tensors: Tensors, end: str) -> str:
    return next(name for name in tensors if name.endswith(end))


def put(end: str, change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    """Replaces one tensor."""

    def replace(tensors: Tensors) -> None:
        name = of(tensors, end)
        tensors[name] = change(tensors[name])

    return retensor(replace)


def renamed(end: str, new: str) -> Callable[[Path], None]:
    return retensor(lambda tensors: tensors.update({new: tensors.pop(of(tensors, end))}))


def added(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Callable[[Path], None]:
    return retensor(lambda tensors: tensors.update({name: torch.ones(*shape, dtype=dtype)}))


def all_to(dtype: torch.dtype) -> Callable[[Path], None]:
    return retensor(
        lambda tensors: tensors.update({name: t.to(dtype) for name, t in tensors.items()})
    )


def write(name: str, content: bytes) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return spoil


def cut(name: str, to: int) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:to])

    return spoil


def linked(target: str) -> Callable[[Path], None]:
    """The weights are a link: to the file itself elsewhere, to nothing, to a folder."""

    def spoil(folder: Path) -> None:
        real = folder / "elsewhere.safetensors"
        (folder / peft_folder.WEIGHTS).rename(real)
        (folder / peft_folder.WEIGHTS).symlink_to({"file": real, "folder": "/"}.get(target, target))

    return spoil


def settings(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder, **changes)


def fifo(folder: Path) -> None:
    (folder / peft_folder.WEIGHTS).unlink()
    os.mkfifo(folder / peft_folder.WEIGHTS)


def both(*spoilers: Callable[[Path], None]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        for each in spoilers:
            each(folder)

    return spoil


EMBEDDING = "base_model.model.model.embed_tokens.weight"
DEEP = b'{"peft_type": ' + b"[" * 1500 + b"]" * 1500 + b"}"
LARGE = b'{"peft_type": "LORA"}' + b" " * peft_settings.MAX_BYTES
REFUSED = {
    # tensors
    "a missing A": retensor(lambda tensors: tensors.pop(of(tensors, A))),
    "a missing B": retensor(lambda tensors: tensors.pop(of(tensors, B))),
    "a transposed A": put(A, lambda tensor: tensor.T),
    "A of one dimension": put(A, torch.flatten),
    "A of three dimensions": put(A, lambda tensor: tensor[None]),
    "A of another rank": put(A, lambda tensor: tensor[:2]),
    "B of another rank": put(B, lambda tensor: tensor[:, :2]),
    "B of other outputs": put(B, lambda tensor: tensor[:7]),
    "a scalar": put(B, lambda _: torch.tensor(1.0)),
    "an empty tensor": put(A, lambda tensor: tensor[:0]),
    "no tensors": retensor(dict.clear),
    "integers": all_to(torch.int8),
    "one tensor of integers": put(A, lambda tensor: tensor.to(torch.int64)),
    "booleans": all_to(torch.bool),
    "8 bits": all_to(torch.float8_e4m3fn),
    "complex numbers": put(A, lambda tensor: tensor.to(torch.complex64)),
    "a name of nothing": added(
        "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight", 4, 64
    ),
    "a name with a line break": added("lora_A\n\x1b[31m.weight", 4, 64),
    "a name of 5000 letters": added("a" * 5000, 1),
    "a base weight along": added("base_model.model.model.layers.0.mlp.up_proj.weight", 128, 64),
    "an adapter's name in the keys": renamed(
        A, f"base_model.model.model.{A}".replace("A.", "A.default.")
    ),
    "an embedding of another size": added(EMBEDDING, 3, 64),
    "an embedding of integers": added(EMBEDDING, 512, 64, dtype=torch.int32),
    "magnitudes without DoRA": added(
        "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector", 64
    ),
    # files
    "cut in the header": cut(peft_folder.WEIGHTS, 40),
    "cut in the tensors": cut(peft_folder.WEIGHTS, -50),
    "cut to nothing": cut(peft_folder.WEIGHTS, 0),
    "a header's length alone": write(peft_folder.WEIGHTS, b"\xff" * 8),
    "a header of 0 bytes": write(peft_folder.WEIGHTS, b"\0" * 8),
    "text for weights": write(peft_folder.WEIGHTS, b"version https://git-lfs.github.com/spec/v1\n"),
    "weights that are a pipe": fifo,
    "a link to nothing": linked("nowhere"),
    "a link to itself": linked(peft_folder.WEIGHTS),
    "a link to a folder": linked("folder"),
    "settings cut": cut(peft_folder.SETTINGS, 30),
    "settings of nothing": write(peft_folder.SETTINGS, b""),
    "settings not UTF-8": write(peft_folder.SETTINGS, b'{"peft_type": "\xff"}'),
    "settings too deep": write(peft_folder.SETTINGS, DEEP),
    "settings too large": write(peft_folder.SETTINGS, LARGE),
    "settings a number": write(peft_folder.SETTINGS, b"7"),
    "settings a string": write(peft_folder.SETTINGS, b'"LORA"'),
    "settings a long integer": write(peft_folder.SETTINGS, b'{"r": ' + b"9" * 5000 + b"}"),
    # settings
    "an unknown type": settings(peft_type="LORA2"),
    "a type that is no name": settings(peft_type=["LORA"]),
    "a type of 10000 letters": settings(peft_type="L" * 10_000),
    "prompt tuning": settings(peft_type="PROMPT_TUNING"),
    "AdaLoRA": settings(peft_type="ADALORA"),
    "a base that is a list": settings(base_model_name_or_path=[LLAMA]),
    "a base of 10000 letters": settings(base_model_name_or_path="b" * 10_000),
    "a classifier": settings(task_type="SEQ_CLS"),
    "a task that is unknown": settings(task_type="SING"),
    "another rank": settings(r=2),
    "a rank that is text": settings(r="4"),
    "another rank in a pattern": settings(rank_pattern={"q_proj": 2}),
    "a pattern that is no pattern": settings(rank_pattern={"(": 4}),
    "a pattern that never ends": settings(target_modules=r"(\w+)+$x"),
    "a target that is no pattern": settings(target_modules="["),
    "a target that is a number": settings(target_modules=[7]),
    "no target": settings(target_modules=[]),
    "another target": settings(target_modules=["q_proj", "k_proj"]),
    "targets that are not there": settings(target_modules=["query"]),
    "everything excluded": settings(exclude_modules=["q_proj", "v_proj"]),
    "a layer that is not there": settings(layers_to_transform=[99]),
    "a layer before the first": settings(layers_to_transform=[-1]),
    "a layer with a fraction": settings(layers_to_transform=[0.5]),
    "one layer alone": settings(layers_to_transform=[0]),
    "DoRA without magnitudes": settings(use_dora=True),
    "DoRA that is text": settings(use_dora="yes"),
    "a bias that is not there": settings(lora_bias=True),
    "an unknown bias": settings(bias="some"),
    "a saved module that is not there": settings(modules_to_save=["lm_head"]),
    "a saved module that is a number": settings(modules_to_save=[1]),
    "activated": settings(alora_invocation_tokens=[1, 2]),
    "repeated layers": settings(layer_replication=[[0, 1], [0, 1]]),
    "a key of a newer PEFT": settings(use_next_years_method=True),
    "alpha 0": settings(lora_alpha=0),
    "alpha below 0": settings(lora_alpha=-8),
    "alpha without end": settings(lora_alpha=float("inf")),
    "alpha that is no number": settings(lora_alpha=float("nan")),
    "alpha of a pattern 0": settings(alpha_pattern={"q_proj": 0}),
    "alpha of 1e30": settings(lora_alpha=1e30),
    "LoftQ": settings(init_lora_weights="loftq"),
    "approximate PiSSA": settings(init_lora_weights="pissa_niter_4"),
    "OLoRA": settings(init_lora_weights="olora"),
}
EQUAL = {
    "as it is": settings(),
    "in bfloat16": all_to(torch.bfloat16),
    "in float64": all_to(torch.float64),
    "rank-stabilised": settings(use_rslora=True),
    "a small alpha": settings(lora_alpha=1e-3),
    "alphas by pattern": settings(alpha_pattern={r"layers\.1": 32, "v_proj": 1}),
    "targets as a pattern": settings(target_modules=r".*\.(q|v)_proj"),
    "an exact SVD": settings(init_lora_weights="pissa"),
    "an embedding along": added(EMBEDDING, 512, 64),
    "a link to the weights": linked("file"),
    "more files": both(write("README.md", b"x"), write("optimizer.pt", b"x")),
    "fan-in for a linear layer": settings(fan_in_fan_out=True),
    "null where PEFT says so": settings(layers_pattern=None, modules_to_save=None, task_type=None),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_no_adapter_has_is_refused_in_one_line(what: str, sound: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sound, tmp_path / "adapter"))
    REFUSED[what](folder)
    assert equals_plain_peft_or_is_refused(folder) != "equal"


@pytest.mark.parametrize("what", EQUAL)
def test_what_is_only_unusual_is_scored_as_plain_peft_computes_it(
    what: str, sound: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(sound, tmp_path / "adapter"))
    EQUAL[what](folder)
    assert equals_plain_peft_or_is_refused(folder) == "equal"


VALUES: list[Any] = [
    None, True, False, 0, 1, 4, -3, 0.5, 1e300, "", "none", "all", "q_proj", ".*", "[", [], {},
    [0], ["v_proj"], ["lm_head"], [[]], {"q_proj": 4}, {"v_proj": 8}, {"(": 1}, {"a": {}},
]  # fmt: skip


@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=[pytest.mark.slow] * (seed >= 8)) for seed in SEEDS]
)
def test_settings_and_tensors_drawn_at_random(seed: int, sound: Path, tmp_path: Path) -> None:
    """Two settings of any type, or a byte, changed at random."""
    generator = np.random.default_rng(seed)
    folder = Path(shutil.copytree(sound, tmp_path / "adapter"))
    if seed % 4 == 3:
        name = [peft_folder.SETTINGS, peft_folder.WEIGHTS][int(generator.integers(2))]
        content = bytearray((folder / name).read_bytes())
        # In the header or the settings: a bit of a tensor's value is another adapter's.
        reach = content.find(b"}}") if name == peft_folder.WEIGHTS else len(content)
        content[int(generator.integers(reach))] ^= 1 << int(generator.integers(7))
        (folder / name).write_bytes(bytes(content))
    else:
        keys = [*peft_settings.UNDERSTOOD, *peft_settings.REFUSED, "init_lora_weights"]
        names = generator.choice(keys, size=2, replace=False).tolist()
        drawn = {key: VALUES[int(generator.integers(len(VALUES)))] for key in names}
        edit(folder, **drawn)
    equals_plain_peft_or_is_refused(folder)


def test_the_harness_sees_a_setting_that_is_lost(
    sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A planted mutant."""
    folder = Path(shutil.copytree(sound, tmp_path / "adapter"))
    edit(folder, use_rslora=True)
    arguments = peft_settings.for_peft
    monkeypatch.setattr(
        peft_settings, "for_peft", lambda values: arguments(values) | {"use_rslora": False}
    )
    broken(equals_plain_peft_or_is_refused, folder)
