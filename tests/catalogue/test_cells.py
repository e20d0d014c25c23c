"""Law: a cell's identity is its settings and nothing else; a table's cells are the same on every
machine and in every process.
"""

import contextlib
import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pydantic
import pytest
import yaml
from fixtures.process import forget, one_line, python

from finrepro.arguments import choice, seed_list
from finrepro.catalogue import reader
from finrepro.catalogue.cells import expand
from finrepro.catalogue.resolve import Cell, spec_of_label
from finrepro.catalogue.selection import Selection
from finrepro.catalogue.spec import DESCRIPTIVE, Evaluation, Pretrain, RunSpec, Scale, Train
from finrepro.errors import UsageError
from finrepro.kinds import kind_module, kinds

SMOKE = [
    "gpt2_127m_mini-none-base-tfns-s0",
    "gpt2_127m_mini-none-full-tfns-s0",
    "gpt2_127m_mini-none-full-fin_ner-s0",
    "gpt2_127m_mini-none-lora_r4-tfns-s0",
    "gpt2_127m_mini-none-lora_r8-tfns-s0",
    "gpt2_127m_mini-none-rslora_r8-tfns-s0",
    "gpt2_127m_mini-none-dora_r8-tfns-s0",
    "gpt2_127m_mini-none-loraplus_r8-tfns-s0",
    "gpt2_127m_mini-none-adalora_r8-tfns-s0",
    "gpt2_127m_mini-none-vera_r256-tfns-s0",
    "gpt2_127m_mini-none-iec_r8-tfns-s0",
    "gpt2_127m_mini-none-houlsby_m64-tfns-s0",
    "gpt2_127m_mini-none-pissa_r8-tfns-s0",
    "gpt2_127m_mini-none-loftq_r8-tfns-s0 refused",
    "gpt2_127m_mini-none-rosa_r8-tfns-s0",
    "gpt2_127m_mini-int8-full-tfns-s0 refused",
    "gpt2_127m_mini-nf4-full-tfns-s0 refused",
    "gpt2_127m_mini-nf4-lora_r8-tfns-s0",
    "gpt2_127m_mini-nf4_single-full-tfns-s0 refused",
    "gpt2_127m_mini-fp4-full-tfns-s0 refused",
    "gpt2_127m_mini-icq-full-tfns-s0 refused",
    "gpt2_127m_mini-icq_mse-full-tfns-s0 refused",
    "gpt2_127m_mini_lr-none-lora_r8-tfns-s0",
    "gpt2_127m_mini_lr_r64-nf4-lora_r8-tfns-s0",
    "gpt2_127m_mini_svd_r64-none-lora_r8-tfns-s0",
    "gpt2_1_5b_mini-none-base-tfns-s0",
    "gpt2_1_5b_mini-none-full-tfns-s0",
    "gpt2_1_5b_mini-int8-lora_r8-tfns-s0",
    "gpt2_1_5b_mini-int8-adalora_r8-tfns-s0",
    "gpt2_1_5b_mini-nf4-dora_r8-tfns-s0",
    "gpt2_1_5b_mini-nf4-iec_r8-tfns-s0",
    "gpt2_1_5b_mini-fp4-lora_r4-tfns-s0",
    "gpt2_1_5b_mini-fp4-loftq_r8-tfns-s0",
    "gpt2_1_5b_mini-icq_mse-lora_r4-tfns-s0",
    "llama2_7b_mini-none-base-tfns-s0",
    "llama2_7b_mini-none-lora_r4-tfns-s0",
    "llama2_7b_mini-none-rosa_r8-tfns-s0",
    "llama2_7b_mini-int8-lora_r4-tfns-s0",
    "llama2_7b_mini-nf4-loraplus_r8-tfns-s0",
    "llama2_7b_mini-nf4-pissa_r8-tfns-s0",
    "llama2_7b_mini-nf4_single-lora_r8-tfns-s0",
    "llama2_7b_mini-icq-lora_r4-tfns-s0",
    "llama2_13b_mini-none-base-tfns-s0",
    "llama2_13b_mini-none-lora_r8-tfns-s0",
    "llama2_13b_mini-int8-vera_r256-tfns-s0",
    "llama2_13b_mini-nf4-lora_r4-tfns-s0",
    "llama2_13b_mini-nf4-rslora_r8-tfns-s0",
    "llama2_13b_mini-nf4-loftq_r8-tfns-s0",
    "llama2_13b_mini-fp4-lora_r8-tfns-s0",
    "llama2_13b_mini-icq-lora_r8-tfns-s0",
    "llama3_1_8b_mini-none-base-tfns-s0",
    "llama3_1_8b_mini-none-full-tfns-s0",
    "llama3_1_8b_mini-none-lora_r8-tfns-s0",
    "llama3_1_8b_mini-int8-base-tfns-s0",
    "llama3_1_8b_mini-nf4-base-tfns-s0",
    "llama3_1_8b_mini-nf4-base-nwgi_7-s0",
    "llama3_1_8b_mini-nf4-base-nwgi_3-s0",
    "llama3_1_8b_mini-nf4-base-nwgi_polar-s0",
    "llama3_1_8b_mini-nf4-lora_r8-tfns-s0",
    "llama3_1_8b_mini-nf4-lora_r8-fin_ner-s0",
    "llama3_1_8b_mini-nf4-lora_r8-fpb-s0",
    "llama3_1_8b_mini-nf4-lora_r8-fiqa_sa-s0",
    "llama3_1_8b_mini-nf4-lora_r8-nwgi_7-s0",
    "llama3_1_8b_mini-nf4-lora_r8-nwgi_3-s0",
    "llama3_1_8b_mini-nf4-lora_r8-nwgi_polar-s0",
    "llama3_1_8b_mini-nf4-lora_r8-sentiment_mix-s0",
    "llama3_1_8b_mini-nf4-lora_r8-fingpt_mix-s0",
    "llama3_1_8b_mini-nf4_single-base-tfns-s0",
    "llama3_1_8b_mini-fp4-base-tfns-s0",
    "llama3_1_8b_mini-icq-base-tfns-s0",
    "llama3_1_8b_mini-icq-iec_r8-tfns-s0",
    "llama3_1_8b_mini-icq_mse-base-tfns-s0",
    "llama3_1_70b_mini-none-base-tfns-s0",
    "llama3_1_70b_mini-nf4-lora_r8-tfns-s0",
    "llama3_1_70b_mini-nf4-adalora_r8-tfns-s0",
    "llama3_1_70b_mini-nf4_single-lora_r4-tfns-s0",
    "llama3_1_70b_mini-fp4-houlsby_m64-tfns-s0",
    "llama3_1_70b_mini-icq_mse-lora_r8-tfns-s0",
]
QUICK = {
    "smoke": [
        "gpt2_127m_mini-none-full-tfns-s0",
        "gpt2_127m_mini-nf4-lora_r8-tfns-s0",
        "llama3_1_8b_mini-none-base-tfns-s0",
        "llama3_1_8b_mini-int8-lora_r4-tfns-s0",
        "llama3_1_8b_mini-nf4-lora_r8-fin_ner-s0",
    ],
    "open": [
        "smollm2_135m-none-base-tfns-s0",
        "smollm2_135m-none-full-tfns-s0",
        "smollm2_135m-none-lora_r8-tfns-s0",
        "smollm2_135m-nf4-lora_r8-tfns-s0",
    ],
    "paper": [
        "gpt2_127m-nf4-lora_r8-tfns-s0",
        "gpt2_1_5b-nf4-lora_r8-tfns-s0",
        "llama2_7b-nf4-lora_r8-tfns-s0",
        "llama2_7b_chat-nf4-lora_r8-tfns-s0",
        "llama2_13b-nf4-lora_r8-tfns-s0",
        "llama2_13b_chat-nf4-lora_r8-tfns-s0",
        "llama3_1_8b-nf4-lora_r8-tfns-s0",
        "llama3_1_8b_instruct-nf4-lora_r8-tfns-s0",
        "llama3_1_70b-nf4-lora_r8-tfns-s0",
        "llama3_1_70b_instruct-nf4-lora_r8-tfns-s0",
    ],
}
MATRIX = {
    "smoke": 23814,
    "open": 2058,
    "paper": 31752,
}  # of --full: models x 7 quantizers x 14 adapters x 9 training sets (open: 7) x 3 seeds
DEFAULT = {
    "smoke": Selection("3"),
    "open": Selection("3"),
    "paper": Selection("3", only="gpt2_127m-*"),
}  # few enough to be made often
TFNS_FULL = "gpt2_127m_mini-none-full-tfns-s0"
# What is said about a thing and does not decide a number. The sha256 of a file pins its bytes.
SAID_ONLY = re.compile(
    r"(\.|^)(title|licence|embedded|gated|parameters|miniature_of|compared_with|of|variant|source|path|hub_path|url|report|scale)$"
    r"|^models\.[^.]+\.package\.(?!(project|version|file_sha256)$)"
    r"|^datasets\..*\.hub\.|^models\.[^.]+\.pretrain$"  # the latter a label: it refers, as `of`
)
SCALES: tuple[Scale, ...] = ("smoke", "open", "paper")


def shown(cell: Cell) -> str:
    return cell.label + (" refused" if cell.refusal else "")


def test_the_cells_of_table_3_are_the_listed_ones():
    assert [shown(cell) for cell in expand(Selection("3"), "smoke")] == SMOKE


# Of quantizer-adapter on TFNS, by the seeds that they have.
OPEN_THREE = (
    "none-full none-lora_r8 nf4-lora_r8 icq-iec_r8 none-rosa_r8 none-loraplus_r8 none-dora_r8"
)
OPEN_ONE = (
    "none-base none-lora_r4 none-rslora_r8 none-adalora_r8 none-vera_r256 none-iec_r8 "
    "none-houlsby_m64 none-pissa_r8 none-loftq_r8 int8-lora_r8 nf4_single-lora_r8 "
    "fp4-lora_r8 icq-lora_r8 icq_mse-lora_r8 int8-iec_r8 nf4-iec_r8 nf4_single-iec_r8 "
    "fp4-iec_r8 icq_mse-iec_r8"
)


def test_the_default_open_cells_are_the_listed_ones_and_trained_as_the_table_file_says():
    cells = expand(Selection("3"), "open")
    three = {f"{pair}-tfns-s{seed}" for pair in OPEN_THREE.split() for seed in range(3)}
    one = {f"{pair}-tfns-s0" for pair in OPEN_ONE.split()}
    others = {
        f"{pair}-{task}-s0"
        for pair in ("none-base", "none-full", "none-lora_r8", "nf4-lora_r8")
        for task in ("fin_ner", "fpb", "fiqa_sa", "nwgi_7", "nwgi_3", "nwgi_polar")
    }
    assert {cell.label.removeprefix("smollm2_135m-") for cell in cells} == three | one | others
    assert [cell.label for cell in cells if cell.refusal] == ["smollm2_135m-none-loftq_r8-tfns-s0"]
    for spec in (cell.spec for cell in cells if cell.spec.adapter.kind != "base"):
        train = spec.train
        assert train.max_steps * train.global_batch_size == 4000 and not train.short
        assert train.lr == (5e-5 if spec.adapter.kind == "full" else 5e-4)
        assert spec.model.dtype == "float32" and spec.evaluation.split == "test"


def test_a_group_runs_at_its_own_seeds_unless_seeds_are_asked_for():
    only = "*-none-vera_*-tfns-*"
    assert [cell.spec.seed for cell in expand(Selection("3", only=only), "open")] == [0]
    asked = expand(Selection("3", only=only, seeds=(1, 5)), "open")
    assert [cell.spec.seed for cell in asked] == [1, 5]
    assert len(expand(Selection("3", only=only, full=True), "open")) == 3


def test_a_table_without_a_scale_names_those_that_it_has():
    with pytest.raises(UsageError) as refused:
        expand(Selection("2"), "open")
    assert one_line(refused.value) == (
        "table 2 has no cells at scale open: give --scale smoke or paper."
    )


@pytest.mark.parametrize("scale", SCALES)
def test_full_is_the_whole_matrix_over_three_seeds(scale: Scale):
    cells = expand(Selection("3", full=True), scale)
    assert len(cells) == len({cell.label for cell in cells}) == MATRIX[scale]
    default = {cell.label for cell in expand(Selection("3"), scale)}
    assert default < {cell.label for cell in cells}


def test_the_default_smoke_cells_hold_every_entry_of_every_axis_and_lora_on_every_quantizer():
    """Every training set too, though only with the data that are not embedded."""
    default, whole = (
        [cell.spec for cell in expand(Selection("3", full=flag), "smoke") if cell.refusal is None]
        for flag in (False, True)
    )
    for axis in ("model", "quantizer", "adapter", "train_on"):
        covered, wanted = (
            {getattr(spec, axis).name for spec in specs} for specs in (default, whole)
        )
        assert covered == wanted
    pairs, wanted = (
        {(spec.quantizer.name, spec.adapter.name) for spec in specs} for specs in (default, whole)
    )
    assert {pair for pair in wanted if pair[1] in ("lora_r4", "lora_r8")} <= pairs


def test_a_cell_is_trained_to_show_quality_or_marked_short_or_not_trained():
    for cell in expand(Selection("3"), "smoke"):
        train = cell.spec.train
        assert cell.refusal or (train.max_steps == 0) == (cell.spec.adapter.kind == "base")
        assert train.short == (0 < train.max_steps < 100)


def test_one_cell_of_the_table_runs_on_two_devices():
    many = [cell.label for cell in expand(Selection("3"), "smoke") if cell.spec.world_size > 1]
    assert many == ["llama2_13b_mini-none-lora_r8-tfns-s0"]
    assert {cell.spec.world_size for cell in expand(Selection("3", world_size=3), "smoke")} == {3}


def test_a_mix_trains_on_its_parts_as_often_as_it_says_and_is_scored_on_its_tasks():
    (cell,) = expand(Selection("3", only="*-fingpt_mix-*"), "smoke")
    parts = {part.task.task.name: part.repeat for part in cell.spec.train_on.parts}
    assert parts == {"fpb": 6, "fiqa_sa": 21, "tfns": 2, "nwgi_7": 1}
    assert [each.task.name for each in cell.spec.tasks] == ["fpb", "fiqa_sa", "tfns", "nwgi_3"]


def test_a_table_of_costs_scores_nothing_and_crosses_batches():
    cells = expand(Selection("5"), "smoke")
    assert {cell.spec.train.global_batch_size for cell in cells} == {4, 8}
    assert all(cell.spec.tasks == () and cell.spec.train.short for cell in cells)
    assert {cell.label for cell in cells} >= {
        f"gpt2_127m_mini-nf4-lora_r8-tfns-b{batch}-s0" for batch in (4, 8)
    }


@pytest.mark.parametrize(
    ("where", "wrong"),
    [({"model": "gpt3*"}, "gpt3*"), ({"size": "x"}, "axis 'size'")],
)
def test_an_override_that_can_hold_for_no_cell_is_refused(
    configs: Path, where: dict[str, str], wrong: str
):
    path = configs / "tables" / "table3.yaml"
    table = yaml.safe_load(path.read_text())
    table["smoke"]["overrides"].append({"where": where, "train": {"lr": 1.0e-3}})
    path.write_text(yaml.safe_dump(table))
    forget()
    with pytest.raises(UsageError) as refused:
        expand(Selection("3"), "smoke")
    assert wrong in one_line(refused.value)


@pytest.mark.parametrize("scale", SCALES)
def test_the_quick_cells_are_the_listed_ones_and_marked_short_or_default_ones(scale: Scale):
    cells = expand(Selection("3", quick=True), scale)
    assert [cell.label for cell in cells] == QUICK[scale]
    assert all(cell.refusal is None for cell in cells)
    if scale == "open":  # quick is a part of the whole, which then goes on from it
        default = {cell.spec.run_id for cell in expand(Selection("3"), scale)}
        assert {cell.spec.run_id for cell in cells} < default
    else:
        assert all(cell.spec.train.short == (cell.spec.train.max_steps > 0) for cell in cells)


def test_the_quick_smoke_cells_cover_both_architectures_and_both_ways_of_answering():
    specs = [cell.spec for cell in expand(Selection("3", quick=True), "smoke")]
    assert {spec.model.family for spec in specs} == {"gpt2", "llama"}
    assert {each.task.kind for spec in specs for each in spec.tasks} == {
        "classification",
        "entities",
    }
    assert {spec.quantizer.name for spec in specs} == {"none", "int8", "nf4"}


def test_full_runs_three_seeds_and_given_seeds_replace_them():
    assert {cell.spec.seed for cell in expand(Selection("3", full=True), "smoke")} == {0, 1, 2}
    assert {cell.spec.seed for cell in expand(Selection("3", full=True, seeds=(7,)), "smoke")} == {
        7
    }


@pytest.mark.parametrize("scale", SCALES)
def test_every_refused_cell_carries_its_reason_in_one_line(scale: Scale):
    refused = [
        cell for cell in expand(Selection("3", full=True), scale) if cell.refusal is not None
    ]
    assert refused
    for cell in refused:
        assert cell.refusal and "\n" not in cell.refusal
        named = (cell.spec.quantizer.name, f"ZeRO-{cell.spec.train.zero_stage}")
        assert any(name in cell.refusal for name in named) or len(cell.spec.train_on.parts) > 1


def test_a_miniature_names_its_pretraining_run_as_base_and_random_weights_have_none():
    for cell in expand(Selection("3"), "smoke"):
        assert cell.base is not None and cell.spec.base_run == cell.base.run_id
        assert cell.base.base_run is None
    assert all(cell.base is None for cell in expand(Selection("3", weights="random"), "smoke"))


def test_run_ids_are_twelve_hex_digits_and_all_different():
    specs = [
        cell.spec
        for cell in expand(Selection("3", full=True, seeds=(0, 1), only="*1*b_mini-*"), "smoke")
    ]
    specs += [
        cell.spec
        for quick in (False, True)
        for cell in expand(Selection("3", quick=quick), "paper")
    ]
    specs += [cell.base for cell in expand(Selection("3"), "smoke") if cell.base]
    ids = {spec.run_id for spec in specs}
    assert all(re.fullmatch("[0-9a-f]{12}", run_id) for run_id in ids)
    assert len(ids) == len({(spec.label, spec.run_id) for spec in specs})


def test_weights_seed_and_devices_are_part_of_the_identity():
    (one,) = expand(Selection("3", only=TFNS_FULL), "smoke")
    others = [
        *expand(Selection("3", only=TFNS_FULL, weights="random"), "smoke"),
        *expand(Selection("3", only=TFNS_FULL, world_size=2), "smoke"),
        *expand(Selection("3", only="gpt2_127m*-none-full-tfns-s1", seeds=(1,)), "smoke"),
    ]
    assert len({cell.spec.run_id for cell in [one, *others]}) == 4


SCRIPT = """
from finrepro.arguments import choice, seed_list
from finrepro.catalogue.cells import expand
from finrepro.catalogue.selection import Selection
for scale in ("smoke", "open", "paper"):
    for cell in expand(Selection("3"), scale):
        print(cell.label, cell.spec.run_id, cell.base.run_id if cell.base else None)
"""


def test_run_ids_are_the_same_in_every_process_and_for_every_hash_seed(tmp_path: Path):
    with ThreadPoolExecutor(2) as pool:
        runs = list(
            pool.map(
                lambda seed: python("-c", SCRIPT, PYTHONHASHSEED=seed), ["0", "1", "2", "random"]
            )
        )
    assert [run.stderr for run in runs] == [""] * 4
    here = "".join(
        f"{cell.label} {cell.spec.run_id} {cell.base.run_id if cell.base else None}\n"
        for scale in SCALES
        for cell in expand(Selection("3"), scale)
    )
    assert {run.stdout for run in runs} == {here}


PATTERNS = {
    "models": ("*-nf4*-lora_r8*-tfns-s0", "*-none-full-tfns-s0"),
    "adapters": ("gpt2_127m*-none-*-tfns-s0", "llama3_1_70b*-none-*-tfns-s0"),
    "quantizers": ("gpt2_127m*-lora_r8*-tfns-s0",),
    "tasks": ("gpt2_127m*-none-lora_r8*-s0",),
    "datasets": ("gpt2_127m*-none-lora_r8*-s0",),
}
# What is not on table 3's axes.
PRETRAINING = {
    "smoke": ("*-none-full-*-adamw-*", "gpt2_1_5b_deep_mini-none-relora-*-adamw-*"),
    "paper": ("*-none-full-*-adamw-*",),
}
MODELS = re.compile(r"^(gpt2_127m|llama3_1_70b)\*")  # of smoke and paper; open has a single one
ALL = tuple(dict.fromkeys(pattern for patterns in PATTERNS.values() for pattern in patterns))


def identities(patterns: tuple[str, ...] = ALL, more: bool = True) -> Iterator[tuple[str, str]]:
    """(label, run id) of enough cells, bases included, that every entry and every setting takes
    part; with the default ones, or without.
    """
    for scale in SCALES:
        here = [MODELS.sub("*", only) if scale == "open" else only for only in patterns]
        some = {f"full {only} ": Selection("3", full=True, seeds=(0,), only=only) for only in here}
        rest = {"quick ": Selection("3", quick=True), "": DEFAULT[scale]} if more else {}
        rest |= {
            f"pretraining {only} ": Selection("2", full=True, seeds=(0,), only=only)
            for only in PRETRAINING.get(scale, ())
        }
        for name, selection in (some | rest).items():
            for cell in expand(selection, scale):
                yield name + cell.label, cell.spec.run_id
                if cell.base is not None:
                    yield cell.base.label, cell.base.run_id
    for name in reader.entries("models"):
        if isinstance(reader.model(name).pretrain, Pretrain):
            yield f"base {name}", reader.pretraining(reader.model(name)).run_id


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], Any]]:
    """(path, value) of everything in nested mappings and lists that holds no more."""
    if isinstance(value, dict | list):
        inside = value.items() if isinstance(value, dict) else enumerate(value)
        return [leaf for key, item in inside for leaf in leaves(item, (*path, key))]
    return [(path, value)]


def others(value: Any) -> list[Any]:
    """Other values of the same type, to be tried until one is allowed."""
    if value is None:
        return ["0" * 40]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value - 1]
    if isinstance(value, float):
        return [value * 1.5 + 0.01, value * 0.5]
    known = (
        "random fp4 uint16 bfloat16 float32 cosine linear bins padded test development llama ddp"
    )
    return [value + "x", "x" + value, *known.split()]


def places(name: str, content: Any) -> list[tuple[tuple[Any, ...], Any]]:
    """The leaves to change: of a table, its training settings only, since its axes decide which
    cells there are. What is on no axis is in no cell, but for a model's own pretraining."""
    kept = ("train", "evaluation", "threads", "template")
    inside = leaves(content)
    if name in ("adapters", "quantizers", "models"):
        tables = [each for each in reader.tables() if not reader.table(each).computed]
        grids = [reader.grid(each, scale) for each in tables for scale in reader.scales(each)]
        on_axes = {each for grid in grids for each in getattr(grid.axes, name.removesuffix("s"))}
        inside = [
            (path, value)
            for path, value in inside
            if path[0] in on_axes or "pretrain" in content[path[0]]
        ]
    if not name.startswith(
        "tables"
    ):  # entries of one kind are read by one class: each of its settings once
        like = {
            key: tuple(str(entry.get(part)) for part in ("kind", "family", "scale"))
            for key, entry in content.items()
        }
        return list({(like[path[0]], path[1:]): (path, value) for path, value in inside}.values())
    return [
        (p, v)
        for p, v in inside
        if len(p) > 1 and (p[1] in kept or (p[1] in ("overrides", "quick") and "train" in p))
    ]


def variants(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, copy of `value` with that one setting changed) for every setting inside."""
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            for where, new in variants(getattr(value, field.name), f"{path}.{field.name}"):
                with contextlib.suppress(
                    pydantic.ValidationError
                ):  # this value is not allowed there
                    yield where, dataclasses.replace(value, **{field.name: new})  # type: ignore[type-var]
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from (
                (where, value | {key: new}) for where, new in variants(item, f"{path}.{key}")
            )
    elif isinstance(value, tuple | list):
        for row, item in enumerate(value):
            yield from (
                (where, type(value)([*value[:row], new, *value[row + 1 :]]))
                for where, new in variants(item, f"{path}.{row}")
            )
    else:
        yield from ((path, new) for new in others(value) if new != value)


SAID_FIELDS = {
    "name",
    "title",
    "licence",
    "embedded",
    "gated",
    "parameters",
    "miniature_of",
    "compared_with",
    "of",
    "source",
    "path",
    "hub_path",
    "url",
    "scale",
    "hub",
    "pretrain",
    "variant",
    "label",
}


@pytest.mark.parametrize(
    "label", ["llama3_1_8b_mini-nf4-lora_r8-tfns-s0", "gpt2_127m_mini-none-full-fin_ner-s0"]
)
def test_every_setting_of_a_spec_changes_its_run_id_and_what_is_only_said_does_not(label: str):
    (cell,) = expand(Selection("3", only=label), "smoke")
    seen = set()
    for path, changed in variants(cell.spec):
        if path not in seen:
            seen.add(path)
            said = bool(SAID_FIELDS & set(path.split(".")))
            assert (changed.run_id == cell.spec.run_id) == said, path
    whole = {f".train.{field.name}" for field in dataclasses.fields(Train)} - {".train.optimizer"}
    whole |= {f".evaluation.{field.name}" for field in dataclasses.fields(Evaluation)}
    whole |= {
        ".seed",
        ".threads",
        ".world_size",
        ".weights",
        ".base_run",
        ".train.optimizer.config.weight_decay",
    }
    assert whole <= seen, whole - seen


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "name",
    [
        "quantizers",
        *(
            pytest.param(name, marks=SLOW)
            for name in ("adapters", "tasks", "datasets", "models", "tables/table3")
        ),
    ],
)
def test_every_setting_of_the_files_changes_some_run_id_and_what_is_only_said_changes_none(
    configs: Path, name: str
):
    where = (
        PATTERNS.get(name, ALL),
        name not in PATTERNS,
    )  # a table's own settings show in its default cells alone
    file = configs / f"{name}.yaml"
    original = yaml.safe_load(file.read_text())
    if name.startswith("tables"):  # a tenth of the cells, in which every setting still takes part
        for scale in SCALES:
            axes = original[scale]["axes"]
            axes["model"] = [
                each
                for each in axes["model"]
                if re.match("gpt2_127m|llama2_13b|llama3_1_(8b|70b)|smollm2", each)
            ]
            axes["quantizer"] = ["none", "int8", "nf4"]
        file.write_text(yaml.safe_dump(original))
        forget()
    before = dict(identities(*where))
    tried = dict.fromkeys(("decides", "said only"), 0)
    for path, value in places(name, original):
        dotted = f"{name}." + ".".join(map(str, path))
        for new in (new for new in others(value) if new != value):
            content = yaml.safe_load(yaml.safe_dump(original))
            spot = content
            for key in path[:-1]:
                spot = spot[key]
            spot[path[-1]] = new
            file.write_text(yaml.safe_dump(content))
            forget()
            try:  # the first that differs is enough
                changed = any(before.get(label, now) != now for label, now in identities(*where))
            except UsageError:
                continue  # this value is not allowed there
            kind = "said only" if SAID_ONLY.search(dotted) else "decides"
            assert changed == (kind == "decides"), (
                f"{dotted}: {value!r} -> {new!r} changed {'a' if changed else 'no'} run id"
            )
            tried[kind] += 1
            break
    assert tried["decides"] >= (8 if name.startswith(("tables", "models", "datasets")) else 3), (
        tried
    )


def test_renaming_entries_keeps_every_result(configs: Path):
    before = sorted(dict(identities()).values())
    for name in ("adapters", "quantizers", "models", "tasks", "datasets"):
        file = configs / f"{name}.yaml"
        text = file.read_text()
        for old, new in RENAMED.items():
            text = re.sub(rf"^{old}(?=:)", new, text, flags=re.MULTILINE)
            text = re.sub(rf"((?:compared_with|of): ){old}(?=[,}}\n])", rf"\1{new}", text)
        file.write_text(text)
    for table in (configs / "tables" / "table2.yaml", configs / "tables" / "table3.yaml"):
        text = table.read_text()
        for old, new in RENAMED.items():
            text = re.sub(rf"(?<![\w./]){old}(?=[,\]}}-])", new, text)
        table.write_text(text)
    forget()
    labels = [cell.label for cell in expand(Selection("3"), "smoke")]
    assert "gpt2_127mx_mini-nf4x-lora_r8x-tfns-s0" in labels
    assert sorted(dict(identities()).values()) == before


RENAMED = {"lora_r8": "lora_r8x", "gpt2_127m_mini": "gpt2_127mx_mini", "nf4": "nf4x"}


def spec() -> RunSpec:
    return expand(Selection("3"), "smoke")[0].spec


@pytest.mark.parametrize("scale", SCALES)
def test_a_run_id_is_the_hash_of_the_canonical_form(scale: Scale):
    """It is put together from texts that the parts keep; whoever has a result.json can make it
    from the whole.
    """
    for cell in expand(DEFAULT[scale], scale):
        text = json.dumps(cell.spec.canonical(), sort_keys=True, separators=(",", ":"))
        assert cell.spec.run_id == hashlib.sha256(text.encode()).hexdigest()[:12]
        other = dataclasses.replace(
            cell.spec, adapter=dataclasses.replace(cell.spec.adapter, kind="other")
        )
        assert other.run_id != cell.spec.run_id


def test_two_kinds_with_equal_settings_are_two_cells():
    one = spec()
    two = dataclasses.replace(one, adapter=dataclasses.replace(one.adapter, kind="other"))
    assert one.adapter.config == two.adapter.config
    assert one.run_id != two.run_id
    # The planted mutant: asdict of the settings alone takes them for the same thing.
    assert dataclasses.asdict(one.adapter.config) == dataclasses.asdict(two.adapter.config)


@pytest.mark.parametrize("package", ["adapters", "quantizers", "optimizers", "tasks", "datasets"])
def test_no_kind_has_a_setting_that_the_hash_would_drop(package: str):
    """What is left out is left out at any depth: a setting called `scale` or `source` would
    decide numbers and no identity.
    """
    said = {"datasets": {"title", "licence", "embedded", "hub"}, "adapters": {"path"}}.get(
        package, set()
    )  # sha256 stands for a path
    for kind in kinds(package):
        named = {field.name for field in dataclasses.fields(kind_module(package, kind).Config)}
        assert not named & DESCRIPTIVE - said, kind
    assert (
        not {field.name for part in (Train, Evaluation) for field in dataclasses.fields(part)}
        & DESCRIPTIVE
    )


def test_the_kind_is_in_the_hash_for_every_choice_of_a_spec():
    canonical = spec().canonical()
    assert canonical["adapter"]["kind"] in kinds("adapters")
    assert canonical["quantizer"]["kind"] in kinds("quantizers")
    assert canonical["train"]["optimizer"]["kind"] in kinds("optimizers")
    (part,) = canonical["train_on"]["parts"]
    assert part["task"]["task"]["kind"] in kinds("tasks")
    assert part["task"]["dataset"]["kind"] in kinds("datasets")


def test_jobs_and_places_are_no_part_of_a_spec():
    def keys(value: Any) -> set[str]:
        if isinstance(value, dict):
            return set(value) | {key for item in value.values() for key in keys(item)}
        return {key for item in value for key in keys(item)} if isinstance(value, list) else set()

    assert not keys(spec().canonical()) & {
        "jobs",
        "store",
        "data_dir",
        "models_dir",
        "name",
        "title",
        "hub",
    }


@pytest.mark.parametrize("only", ["nothing", "", "GPT2*", "gpt2_127m_mini-none-full-tfns"])
def test_a_pattern_that_matches_nothing_is_refused_with_the_way_to_the_labels(only: str):
    with pytest.raises(UsageError) as refused:
        expand(Selection("3", only=only), "smoke")
    assert "invoke cells" in one_line(refused.value)


def test_a_pattern_of_cells_outside_the_default_ones_names_full():
    with pytest.raises(UsageError, match="add --full"):
        expand(Selection("3", only="llama2_7b_mini-fp4-lora_r8-tfns-s0"), "smoke")


def test_a_pattern_near_a_label_names_it():
    with pytest.raises(UsageError, match="Nearest: gpt2_127m_mini-none-full-tfns-s0"):
        expand(Selection("3", only="gpt2_127m_mini-none-ful-tfns-s0"), "smoke")


def test_a_cell_and_its_base_are_found_by_label():
    cell = expand(Selection("3"), "smoke")[0]
    assert spec_of_label(Selection("3"), "smoke", cell.label) == cell.spec
    assert cell.base is not None
    assert spec_of_label(Selection("3"), "smoke", cell.base.label) == cell.base
    with pytest.raises(UsageError, match="unknown cell"):
        spec_of_label(Selection("3"), "smoke", "nothing")


@pytest.mark.parametrize(
    "text", ["", "a", "1,", "1,1", "-1", "0.5", "1;2", "0x1", "4294967296", "9" * 5000]
)
def test_seeds_that_are_no_different_small_whole_numbers_are_refused(text: str):
    with pytest.raises(UsageError) as refused:
        seed_list(text)
    assert "--seeds" in one_line(refused.value)


def test_seeds_are_read():
    assert seed_list("0,1,2") == (0, 1, 2)
    assert seed_list([7]) == (7,)


def test_a_choice_is_one_of_the_allowed():
    assert choice("scale", "smoke", ("auto", "smoke")) == "smoke"
    with pytest.raises(UsageError, match="Did you mean 'smoke'"):
        choice("scale", "smok", ("auto", "smoke"))


def test_the_paper_cells_carry_the_pinned_revision_of_their_weights():
    for cell in expand(Selection("3"), "paper"):
        hub = reader.model(cell.spec.model.name).hub
        assert (hub is None) == (cell.spec.base_run is not None)
        assert hub is None or cell.spec.base_checkpoint == f"{hub.id}@{hub.revision}"
