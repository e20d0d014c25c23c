"""Adapters made elsewhere. The law: a PEFT folder on its base is the model that it was exported
from, bit by bit; a folder that is not whole, not safe, or another model's is refused in one
line, before or when it is loaded."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.foreign import chosen as choice
from fixtures.model import (
    IDS,
    MINIATURES,
    all_logits,
    broken,
    make,
    process,  # noqa: F401
    spec_of,
    stir,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from finrepro.campaigns.preview import choose_scale
from finrepro.catalogue import reader
from finrepro.catalogue.cells import expand
from finrepro.catalogue.selection import Selection, select
from finrepro.catalogue.spec import Scale
from finrepro.errors import EnvironmentFault, UsageError
from finrepro.evidence.place import Place
from finrepro.kinds import adapter_of
from finrepro.methods.adapters import peft_folder
from finrepro.methods.layers.linear import linear_layers
from finrepro.models.build import load

GPT2, LLAMA = MINIATURES


def exported(name: str, quantizer: str, folder: Path) -> tuple[Path, nn.Module]:
    """A trained LoRA of ours on disk, and the model it was exported from."""
    spec = spec_of(name, "lora_r4", quantizer)
    model = stir(make(spec).model)
    folder.mkdir()
    adapter_of(spec.adapter).export(model, folder)
    return folder, model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return all_logits(model.eval(), IDS)


def computes_the_same(one: nn.Module, two: nn.Module) -> None:
    assert torch.equal(logits(one), logits(two))


@pytest.mark.parametrize("quantizer", ["none", "int8", "nf4"])
@pytest.mark.parametrize("name", MINIATURES)
def test_an_exported_adapter_on_its_base_is_the_model_it_came_from(
    name: str, quantizer: str, tmp_path: Path
) -> None:
    folder, model = exported(name, quantizer, tmp_path / "adapter")
    spec = spec_of(name, choice(folder), quantizer)
    assert peft_folder.supports(spec.model, spec.quantizer, 3, spec.adapter.config) is None
    built = make(spec)
    assert built.trainable_parameters == 0 and not any(
        p.requires_grad for p in built.model.parameters()
    )
    computes_the_same(built.model, model)
    broken(computes_the_same, built.model, make(spec_of(name, "base", quantizer)).model)
    (tmp_path / "weights").mkdir()
    peft_folder.export(built.model, tmp_path / "weights")
    assert not list((tmp_path / "weights").iterdir())


@pytest.mark.parametrize(("made_on", "scored_on"), [("nf4", "none"), ("none", "nf4")])
def test_an_adapter_may_be_scored_on_another_form_of_its_base(
    made_on: str, scored_on: str, tmp_path: Path
) -> None:
    """GPT-2's layers store (in, out), their quantized form (out, in): the same A and B fit both."""
    folder, model = exported(GPT2, made_on, tmp_path / "adapter")
    again = stir(make(spec_of(GPT2, "lora_r4", scored_on)).model)
    computes_the_same(make(spec_of(GPT2, choice(folder), scored_on)).model, again)
    broken(computes_the_same, again, model)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "r": 6}, {"use_dora": True}], ids=str)
def test_an_adapter_that_plain_peft_made_is_scored_as_plain_peft_computes_it(
    options: Any, tmp_path: Path
) -> None:
    import peft

    base: Any = load(spec_of(LLAMA), None)
    config = peft.LoraConfig(
        **({"r": 8, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]} | options)
    )
    model = stir(peft.get_peft_model(base, config))
    model.save_pretrained(tmp_path, save_embedding_layers=False)  # type: ignore[operator]
    computes_the_same(make(spec_of(LLAMA, choice(tmp_path))).model, model)


def test_the_identity_of_an_adapter_is_its_files_and_not_its_place(tmp_path: Path) -> None:
    folder, _ = exported(LLAMA, "none", tmp_path / "adapter")
    elsewhere = Path(shutil.copytree(folder, tmp_path / "copy"))
    (elsewhere / "README.md").write_text("a card")
    ids = [spec_of(LLAMA, choice(place)).run_id for place in (folder, elsewhere)]
    assert ids[0] == ids[1]
    tensors = load_file(elsewhere / peft_folder.WEIGHTS)
    save_file(
        {name: tensor * 2 for name, tensor in tensors.items()}, elsewhere / peft_folder.WEIGHTS
    )
    assert spec_of(LLAMA, choice(elsewhere)).run_id != ids[0]


@pytest.mark.parametrize(
    ("model", "written", "fits"),
    [
        ("llama2_13b", "meta-llama/Llama-2-13b-hf", True),
        ("llama2_13b", "NousResearch/Llama-2-13b-hf", True),
        ("llama2_13b", "llama2_13b", True),
        ("llama2_13b", "/models/Llama-2-13b-hf/", True),
        ("llama2_13b", "meta-llama/Llama-2-13b-chat-hf", False),
        ("llama2_13b", "Llama-2-13b", False),
        ("llama3_1_8b_instruct", "meta-llama/Llama-3.1-8B-Instruct", True),
        ("llama3_1_8b_instruct", "NousResearch/Meta-Llama-3.1-8B-Instruct", True),
        ("llama3_1_8b", "meta-llama/Meta-Llama-3.1-8B", True),
        ("llama3_1_8b", "meta-llama/Meta-Llama-3.1-8B-Instruct", False),
        ("llama3_1_8b_instruct", "meta-llama/Meta-Llama-3-8B-Instruct", False),
        ("llama2_13b", "/c/models--meta-llama--Llama-2-13b-hf/snapshots/5c31dfb671ce/", True),
        ("llama2_13b", "/c/models--meta-llama--Llama-2-13b-chat-hf/snapshots/5c31dfb671ce", False),
        ("llama2_13b", "C:\\models\\Llama-2-13b-hf", True),
        ("llama2_13b", "meta-llama/llama-2-13B-HF", True),
        ("gpt2_127m", "gpt2", True),
        ("gpt2_127m", "gpt2-medium", False),
        ("llama3_1_8b", "meta-llama/Llama-3.1-8B-Instruct", False),
        (GPT2, GPT2, True),
        (GPT2, LLAMA, False),
    ],
)
def test_an_adapter_is_for_the_base_that_it_names(model: str, written: str, fits: bool) -> None:
    config = peft_folder.Config(path="x/adapter", sha256="0", base_model=written)
    entry = reader.model(model)
    reason = peft_folder.supports(entry, reader.quantizer("nf4", entry.dtype), 0, config)
    if fits:
        assert reason is None
    else:
        assert reason is not None and "\n" not in reason
        assert "x/adapter" not in reason  # it stands in a table, which names no place on a machine
        assert all(
            part in reason
            for part in ("'adapter'", written, entry.hub.id if entry.hub else entry.name)
        )


@pytest.mark.parametrize(
    ("written", "advice"),
    [
        ("meta-llama/Llama-2-13b", "nearest in the catalogue: meta-llama/Llama-2-13b-hf"),
        (
            "x/Meta-Llama-3-8B-Instruct",
            "nearest in the catalogue: meta-llama/Llama-3.1-8B-Instruct",
        ),
        ("meta-llama/Llama-2-13b-hf", None),
        ("a model of my own", None),
    ],
)
def test_the_advice_is_the_nearest_model_and_not_the_tables_first(
    written: str, advice: str | None
) -> None:
    config = peft_folder.Config(path="x/adapter", sha256="0", base_model=written)
    entry = reader.model(GPT2)
    reason = peft_folder.supports(entry, reader.quantizer("none", entry.dtype), 0, config)
    assert reason is not None and f"not for {GPT2}" in reason
    assert (advice in reason) if advice else ("nearest" not in reason), reason


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31m", "a" * 101, "\udcff", ".."])
def test_a_name_that_no_table_can_show_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="printable characters; rename the folder") as caught:
        select("3", adapter=str(tmp_path / name))
    assert str(caught.value).isprintable()
    assert select("3", adapter=str(tmp_path / "adapter $\\frac$")).adapter


def edit(**changes: Any) -> Callable[[Path], None]:
    """Changes values of adapter_config.json."""

    def mutate(folder: Path) -> None:
        path = folder / peft_folder.SETTINGS
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return mutate


def pickled(folder: Path) -> None:
    (folder / peft_folder.WEIGHTS).rename(folder / peft_folder.PICKLE)


def truncated(folder: Path) -> None:
    path = folder / peft_folder.WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def emptied(folder: Path) -> None:
    path = folder / peft_folder.WEIGHTS
    save_file({name: tensor[:0] for name, tensor in load_file(path).items()}, path)


BEFORE = {
    "gone": (shutil.rmtree, "there is no such adapter folder"),
    "no settings": (
        lambda folder: (folder / peft_folder.SETTINGS).unlink(),
        "not a PEFT folder.*adapter_config",
    ),
    "bad json": (lambda folder: (folder / peft_folder.SETTINGS).write_text("{"), "cannot be read"),
    "a list": (
        lambda folder: (folder / peft_folder.SETTINGS).write_text("[]"),
        "a JSON object is expected",
    ),
    "prompt tuning": (edit(peft_type="PROMPT_TUNING"), "PROMPT_TUNING.*only LORA"),
    "no base": (
        edit(base_model_name_or_path=None),
        "base_model_name_or_path is empty: write the hub id",
    ),
    "empty base": (edit(base_model_name_or_path=""), "base_model_name_or_path is empty"),
    "no weights": (
        lambda folder: (folder / peft_folder.WEIGHTS).unlink(),
        "has no adapter_model.safetensors",
    ),
    "a pickle": (pickled, "only a pickle"),
    "truncated": (truncated, "damaged"),
    "empty shards": (emptied, "is empty: was it saved under ZeRO-3"),
}


@pytest.mark.parametrize("what", BEFORE)
def test_a_folder_that_cannot_be_used_is_refused_in_one_line_before_anything_is_loaded(
    what: str, tmp_path: Path
) -> None:
    folder, _ = exported(LLAMA, "none", tmp_path / "adapter")
    peft_folder.from_folder(folder)
    mutate, message = BEFORE[what]
    mutate(folder)
    with pytest.raises(EnvironmentFault, match=message) as caught:
        peft_folder.from_folder(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def retensor(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    """Changes the tensors of the weights file."""

    def mutate(folder: Path) -> None:
        tensors = load_file(folder / peft_folder.WEIGHTS)
        change(tensors)
        save_file(tensors, folder / peft_folder.WEIGHTS)

    return mutate


def widened(tensors: dict[str, Tensor]) -> None:
    tensors.update(
        {name: torch.zeros(each.shape[0], each.shape[1] + 1) for name, each in tensors.items()}
    )


LOADING = {
    "other layers": (edit(target_modules=["query", "value"]), "does not fit the model"),
    "other shapes": (retensor(widened), "does not fit the model.*size mismatch"),
    "a missing tensor": (retensor(lambda tensors: tensors.pop(min(tensors))), "lacks base_model"),
    "a tensor too many": (
        retensor(
            lambda tensors: tensors.update({"base_model.model.x.lora_A.weight": torch.ones(4, 8)})
        ),
        "without a place for it, base_model.model.x",
    ),
    "another rank": (edit(r=3), "does not fit the model"),
    "NaN": (retensor(lambda tensors: tensors[max(tensors)].fill_(torch.nan)), "holds NaN or an"),
    "an infinity": (
        retensor(lambda tensors: tensors[min(tensors)][0].fill_(-torch.inf)),
        "lora_A.weight holds NaN or an infinity",
    ),
}


@pytest.mark.parametrize("what", LOADING)
def test_an_adapter_that_does_not_fit_the_model_is_refused_in_one_line(
    what: str, tmp_path: Path
) -> None:
    folder, _ = exported(LLAMA, "none", tmp_path / "adapter")
    mutate, message = LOADING[what]
    mutate(folder)
    with pytest.raises(EnvironmentFault, match=message) as caught:
        make(spec_of(LLAMA, choice(folder)))
    assert "\n" not in str(caught.value)


def test_an_adapter_of_another_architecture_does_not_fit(tmp_path: Path) -> None:
    folder, _ = exported(GPT2, "none", tmp_path / "adapter")
    with pytest.raises(EnvironmentFault, match="does not fit the model"):
        make(spec_of(LLAMA, choice(folder)))


@pytest.mark.parametrize("change", [edit(r=3), truncated, pickled])
def test_files_that_change_after_planning_are_not_scored(
    change: Callable[[Path], None], tmp_path: Path
) -> None:
    folder, _ = exported(LLAMA, "none", tmp_path / "adapter")
    spec = spec_of(LLAMA, choice(folder))
    make(spec)
    change(folder)
    with pytest.raises(EnvironmentFault, match=r"have changed|damaged|only a pickle"):
        make(spec)


def test_every_layer_that_the_adapter_names_is_adapted_and_no_other(tmp_path: Path) -> None:
    folder, _ = exported(LLAMA, "none", tmp_path / "adapter")
    model = make(spec_of(LLAMA, choice(folder))).model
    hit = {
        n.removeprefix("base_model.model.")
        for n, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
    assert hit == set(linear_layers(load(spec_of(LLAMA), None)))
    assert dataclasses.asdict(choice(folder).config)["base_model"] == LLAMA


@pytest.mark.parametrize(
    ("base", "scale"), [(LLAMA, "smoke"), ("meta-llama/Llama-3.1-8B", "paper")]
)
def test_the_cells_of_an_adapter_are_those_of_its_base_and_the_scale_is_where_that_is(
    base: str, scale: Scale, tmp_path: Path, place: Place
):
    folder, _ = exported(LLAMA, "none", tmp_path / "adapter")
    edit(base_model_name_or_path=base)(folder)
    selection = Selection("3", adapter=str(folder))
    assert choose_scale(selection, "auto", place)[0] == scale
    cells = expand(selection, scale)
    assert {cell.spec.model.name for cell in cells} == {catalogue_name(base)} and not any(
        cell.refusal for cell in cells
    )
    other = expand(
        dataclasses.replace(
            selection, only="gpt2_127m*i-*-tfns-*" if scale == "smoke" else "gpt2_127m-*-tfns-*"
        ),
        scale,
    )
    assert all(cell.refusal and base in cell.refusal for cell in other), (
        "asked for by name, it is refused by name"
    )


def catalogue_name(base: str) -> str:
    """The catalogue's name of a base."""
    return base if base in reader.entries("models") else "llama3_1_8b"
