"""Exports. The law: what `invoke export` writes, loaded by PEFT and Transformers alone, computes
what the run computes; where it does not, or the run is not whole, nothing is left behind."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fixtures import results
from fixtures.model import MINIATURES, broken, make, process, spec_of, stir, tokenizer  # noqa: F401
from fixtures.planted import plant
from fixtures.process import environment, forget, one_line
from safetensors.torch import load_file, save_file

import finrepro
from finrepro.catalogue import reader
from finrepro.catalogue.cells import expand
from finrepro.catalogue.compatibility import refusal
from finrepro.catalogue.selection import Selection
from finrepro.catalogue.spec import RunSpec
from finrepro.data import files as data
from finrepro.data.tokenizer_files import tokenizer_digest
from finrepro.errors import EnvironmentFault, UsageError
from finrepro.evaluation import evaluate
from finrepro.evidence import store
from finrepro.evidence.files import write_json, write_lines
from finrepro.evidence.manifest import damaged_files, file_digest
from finrepro.evidence.place import Place
from finrepro.evidence.result import header
from finrepro.evidence.run_faults import spec_id
from finrepro.evidence.store import open_store
from finrepro.exporting import card, rebuild, verify, write
from finrepro.exporting.command import export
from finrepro.exporting.layout import ExportLayout, layout_of
from finrepro.exporting.recorded import Damaged, RecordedRun, find_run
from finrepro.kinds import adapter_of
from finrepro.methods.adapters import lora
from finrepro.models import checkpoints
from finrepro.models.build import load, load_tokenizer
from finrepro.runtime import process as runtime
from finrepro.settings import Choice

GPT2, LLAMA = MINIATURES
SCORE = results.score("tfns", "accuracy", 0.625, low=0.55, high=0.7)


TFNS = data.load(reader.dataset("tfns"), None, ("development",))


def recorded_answers(spec: RunSpec, model: Any, folder: Path | None) -> list[dict[str, Any]]:
    """Some rows of predictions.jsonl, as evaluation writes them; none where the tests' base has
    no tokenizer of its own.
    """
    if folder is None or spec.weights == "random":
        return []
    examples = TFNS.splits["development"][:3]
    return evaluate.answer(
        model.eval(),
        load_tokenizer(folder),
        spec.tasks[0],
        examples,
        spec.evaluation,
        spec.train.max_seq_len,
    )


def seal(place: Place, spec: RunSpec, checkpoint: Path | None = None, **facts: Any) -> str:
    """A finished run of `spec` as a cell leaves it, its trained parameters drawn; its id."""
    folder = place.store.run_folder(spec.base_run) / "weights" if spec.base_run else checkpoint
    model = stir(make(spec, folder).model)
    with place.store.new_run(spec.run_id) as target:
        (target / "weights").mkdir()
        adapter_of(spec.adapter).export(model, target / "weights")
        if spec.weights == "scratch":
            tokenizer(spec.model.family).save_pretrained(target / "weights")
        base: dict[str, Any] = {
            "files": checkpoints.digests(checkpoint, file_digest) if checkpoint else {}
        }
        if spec.base_run:
            base = {"run_id": spec.base_run, "weights": place.store.weights_digest(spec.base_run)}
        digest = tokenizer_digest(folder or target / "weights")
        result = header(spec, store.DONE, None, time.time(), "cpu") | {
            "scores": [SCORE],
            "data": results.data(
                fingerprints={"tfns": TFNS.fingerprints},
                files={"tfns": {"train": "d" * 64}},
                base=base,
                tokenizer={"origin": "", "sha256": digest},
            ),
        }
        write_json(target / "result.json", result | facts)
        write_lines(target / "predictions.jsonl", recorded_answers(spec, model, folder))
    return spec.run_id


def miniature(name: str, adapter: str | Choice, quantizer: str = "none", **changes: Any) -> RunSpec:
    return dataclasses.replace(spec_of(reader.model(name), adapter, quantizer), **changes)


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


def test_the_card_of_an_open_run_says_that_its_model_is_none_of_the_papers():
    (cell,) = expand(Selection("3", only="*-none-lora_r8-tfns-s0"), "open")
    facts = {"train_on": "tfns", "devices": 1, "device_type": "cpu", "notes": []}
    result = {"run_id": cell.spec.run_id, "label": cell.label, "cell": facts}
    said = card._what(RecordedRun(result, Path("run"), cell.spec), layout_of(cell.spec, "merged"))
    assert "**A result at open scale: not to be compared with the paper's.**" in said
    assert "decoded from Q4_1" in said and "smoke" not in said


FRESH = """
import json, sys
sys.modules["finrepro"] = None  # whoever imports it fails
{snippet}
assert not any(getattr(m, "support_avx512bf16_for_cpu", False) for m in model.modules())
prompts = json.loads(sys.argv[1])
with torch.no_grad():
    logits = [model(input_ids=torch.tensor([ids])).logits[0].float() for ids in prompts]
from safetensors.torch import save_file
save_file({{str(number): tensor for number, tensor in enumerate(logits)}}, sys.argv[2])
assert not [name for name in sys.modules if name.startswith("finrepro.")]
ids = tokenizer("a b")["input_ids"]
print(type(model).__name__, tokenizer.decode(ids, skip_special_tokens=True))
"""


def snippet(folder: Path) -> str:
    """The card's own lines."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    return str(code)


def elsewhere(folder: Path, prompts: list[list[int]], tmp_path: Path) -> list[torch.Tensor]:
    """The logits of an export, loaded by its card's lines in a process without this package, in
    a folder that was moved.
    """
    moved = Path(shutil.copytree(folder, tmp_path / "moved" / folder.name))
    program = FRESH.format(snippet=snippet(moved))
    kept = {key: value for key, value in environment().items() if key != "PYTHONPATH"}
    answer = subprocess.run(
        [sys.executable, "-c", program, json.dumps(prompts), str(tmp_path / "logits")],
        cwd=moved,
        env=kept,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    return [each for _, each in sorted(load_file(tmp_path / "logits").items())]


def run_logits(
    place: Place, run_id: str, wanted: str = "peft"
) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Prompts, and the logits of the run's model made by training's own code and not by the
    export's.
    """
    found = find_run(place.store, run_id, wanted)
    start = rebuild.starting_point(found, place, wanted)
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
            assert (
                str(folder.parent) not in path.read_text()
                and "finrepro_isolated" not in path.read_text()
            )


slow = pytest.mark.slow


@dataclasses.dataclass(frozen=True)
class Exported:
    """An export, and the run's own logits. Not to be changed: copy the folder."""

    spec: RunSpec
    planned: ExportLayout
    folder: Path
    prompts: list[list[int]]
    expected: list[torch.Tensor]


def exported(place: Place, run_id: str, wanted: str, folder: Path) -> Exported:
    spec = find_run(place.store, run_id, wanted).spec
    made = export(run_id, wanted, folder, place)
    return Exported(spec, layout_of(spec, wanted), made, *run_logits(place, run_id, wanted))


@pytest.fixture(scope="module")
def shifted(begun: Place, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A run of IR-QLoRA: IEC on ICQ."""
    runtime.setup(0, 2)  # the fixture that does so is a test's own
    run_id = on_base(begun, LLAMA, "iec_r8", "icq")
    return exported(begun, run_id, "peft", tmp_path_factory.mktemp("shifted") / "out")


def computes_the_same_elsewhere(made: Exported, tmp_path: Path) -> None:
    safe(made.folder)
    found = elsewhere(made.folder, made.prompts, tmp_path)
    equal(found, made.expected)
    broken(equal, [each * 1.001 for each in found], made.expected)


@pytest.mark.slow
def test_ir_qlora_loads_where_this_package_is_not(shifted: Exported, tmp_path: Path):
    """I5: by the lines of its own card, in another process and another folder."""
    computes_the_same_elsewhere(shifted, tmp_path)


@slow
@pytest.mark.parametrize(
    ("name", "adapter", "quantizer", "wanted"),
    [
        (GPT2, "lora_r4", "nf4", "merged"),
        (GPT2, "rslora_r8", "nf4", "peft"),
        (LLAMA, "lora_r4", "int8", "peft"),
        (LLAMA, "dora_r8", "nf4", "peft"),
    ],
)
def test_an_export_loads_where_this_package_is_not(
    name: str, adapter: str, quantizer: str, wanted: str, begun: Place, tmp_path: Path
):
    run_id = on_base(begun, name, adapter, quantizer)
    computes_the_same_elsewhere(exported(begun, run_id, wanted, tmp_path / "out"), tmp_path)


FAST = {(GPT2, "lora_r4", "nf4"), (GPT2, "pissa_r8", "nf4")}
LINEAR = {
    GPT2: ("lora_r4", "dora_r8", "pissa_r8", "loftq_r8"),
    LLAMA: ("iec_r8", "vera_r256", "adalora_r8", "rosa_r8"),
}


@pytest.mark.parametrize(
    ("name", "adapter", "quantizer"),
    [
        pytest.param(
            name, adapter, quantizer, marks=() if (name, adapter, quantizer) in FAST else slow
        )
        for name, adapters in LINEAR.items()
        for adapter in adapters
        for quantizer in ("none", "nf4", "icq", "int8")
        if (adapter, quantizer) != ("dora_r8", "int8")  # tested below
        and refusal(spec_of(name, adapter, quantizer)) is None
    ],
)
def test_every_linear_method_is_exported_in_every_format(
    name: str,
    adapter: str,
    quantizer: str,
    begun: Place,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    """G2: merged and unmerged alike."""
    run_id = on_base(begun, name, adapter, quantizer)
    for wanted in ("peft", "merged"):
        if (adapter in ("vera_r256", "adalora_r8") and (quantizer, wanted) == ("icq", "peft")) or (
            quantizer,
            wanted,
        ) == ("int8", "merged"):
            with pytest.raises(UsageError, match=r"possible: (peft|merged) or base"):
                export(run_id, wanted, tmp_path / wanted, begun)
            continue
        safe(export(run_id, wanted, tmp_path / wanted, begun))
        assert "logits equal the run's" in capsys.readouterr().out
    assert not list(tmp_path.glob(".*"))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_whole_model_is_exported_as_it_was_trained(begun: Place, tmp_path: Path):
    run_id = on_base(begun, GPT2, "full")
    folder = export(run_id, "merged", tmp_path / "out", begun)
    safe(folder)
    trained = load_file(begun.store.run_folder(run_id) / "weights" / "model.safetensors")
    written = tensors(folder)
    assert trained.keys() == written.keys() and all(
        torch.equal(trained[key], written[key]) for key in trained
    )


@pytest.mark.parametrize(
    ("adapter", "quantizer"), [pytest.param("base", "icq", marks=slow), ("houlsby_m64", "nf4")]
)
def test_the_base_alone_is_exported_whatever_was_trained_on_it(
    adapter: str, quantizer: str, begun: Place, tmp_path: Path
):
    folder = export(on_base(begun, LLAMA, adapter, quantizer), "base", tmp_path / "out", begun)
    safe(folder)
    config = json.loads(
        (folder / ("base" if quantizer == "icq" else ".") / "config.json").read_text()
    )
    assert config["quantization_config"]["bnb_4bit_quant_type"] == "nf4" and config["use_cache"]
    assert (folder / "shift").is_dir() == (quantizer == "icq")


# What does not compute the same is found, and leaves nothing.


def double_alpha(written: Path) -> None:
    for path in written.rglob("adapter_config.json"):
        if path.parent.name != "shift":
            values = json.loads(path.read_text())
            path.write_text(json.dumps(values | {"lora_alpha": 2 * values["lora_alpha"]}))


def no_shift(written: Path) -> None:
    path = written / "shift" / "adapter_model.safetensors"
    save_file({name: tensor * 0 for name, tensor in load_file(path).items()}, path)


def lost_shift(written: Path) -> None:
    shutil.rmtree(written / "shift")


def lost_tensor(written: Path) -> None:
    path = next(written.rglob("model.safetensors"))
    kept = load_file(path)
    del kept[min(name for name in kept if "norm" in name)]
    save_file(kept, path, metadata={"format": "pt"})


def computes_what_the_run_computes(made: Exported, folder: Path) -> None:
    try:
        found = verify.reload(
            made.spec, folder, made.planned, None, torch.device("cpu"), made.prompts
        )
        verify.check(made.spec, made.expected, found)
    except verify.NotEqual as error:
        raise AssertionError(one_line(error)) from None


@pytest.mark.parametrize(
    "spoil", [double_alpha, no_shift, lost_shift, lost_tensor], ids=lambda each: each.__name__
)
def test_what_does_not_compute_the_same_is_found(
    spoil: Callable[[Path], None], shifted: Exported, tmp_path: Path
):
    spoiled = Path(shutil.copytree(shifted.folder, tmp_path / "spoiled"))
    computes_what_the_run_computes(shifted, spoiled)
    spoil(spoiled)
    broken(computes_what_the_run_computes, shifted, spoiled)


def test_a_loader_that_takes_one_of_the_two_adapters_is_found(
    shifted: Exported, monkeypatch: pytest.MonkeyPatch
):
    import peft

    monkeypatch.setattr(peft.tuners.lora.LoraModel, "set_adapter", lambda *_, **__: None)
    broken(computes_what_the_run_computes, shifted, shifted.folder)


def test_what_does_not_compute_the_same_leaves_nothing(
    begun: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run_id, load = on_base(begun, GPT2, "lora_r4"), verify.load

    def spoil_and_load(spec: Any, written: Path, *others: Any) -> Any:
        double_alpha(written)
        return load(spec, written, *others)

    monkeypatch.setattr(verify, "load", spoil_and_load)
    with pytest.raises(verify.NotEqual, match="nothing is kept") as caught:
        export(run_id, "peft", tmp_path / "out", begun)
    assert caught.value.exit_code == 4 and not list(tmp_path.iterdir())


def test_a_merge_with_the_wrong_scaling_is_found(
    begun: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run_id, merge = on_base(begun, GPT2, "lora_r4", "nf4"), write.merge_peft

    def twice(dense: Any, folder: Path) -> Any:
        return merge(merge(dense, folder), folder)

    monkeypatch.setattr(write, "merge_peft", twice)
    with pytest.raises(verify.NotEqual, match="allowed is 1e-05"):
        export(run_id, "merged", tmp_path / "out", begun)
    assert not list(tmp_path.iterdir())


@slow
def test_what_the_libraries_cannot_compute_with_is_no_export(begun: Place, tmp_path: Path):
    """PEFT's DoRA on bitsandbytes' own int8 layer fails on a CPU; ours, which the run trained
    with, does not.
    """
    with pytest.raises(verify.NotEqual, match="cannot use what was written"):
        export(on_base(begun, LLAMA, "dora_r8", "int8"), "peft", tmp_path / "out", begun)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stop", ["Ctrl-C", "SIGTERM"])
def test_an_interrupted_export_leaves_nothing(
    stop: str, begun: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def interrupted(*_: Any) -> None:
        assert list(tmp_path.glob(".out.*/adapter")), "nothing had been written"
        if stop == "Ctrl-C":
            raise KeyboardInterrupt
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(verify, "reload", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(on_base(begun, GPT2, "lora_r4"), "peft", tmp_path / "out", begun)
    assert not list(tmp_path.iterdir()) and signal.getsignal(signal.SIGTERM) is before


# Runs that are not exported.


@pytest.fixture
def copied(begun: Place, tmp_path: Path) -> Iterator[tuple[Place, str]]:
    """A store of its own with a finished run, to be spoiled."""
    run_id = on_base(begun, GPT2, "lora_r4")
    shutil.copytree(begun.store.root, tmp_path / "store")
    yield Place(open_store(tmp_path / "store")), run_id
    assert not (tmp_path / "store" / "exports").exists() or not list(
        (tmp_path / "store" / "exports").iterdir()
    )


def reseal(folder: Path, **changes: Any) -> None:
    from finrepro.evidence.manifest import write_manifest

    path = folder / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    write_manifest(folder)


def test_a_run_that_was_tampered_with_is_not_exported(copied: tuple[Place, str]):
    place, run_id = copied
    path = place.store.run_folder(run_id) / "weights" / "adapter_model.safetensors"
    save_file({name: tensor * 1.01 for name, tensor in load_file(path).items()}, path)
    with pytest.raises(
        Damaged, match=r"is damaged, .*: weights/adapter_model\.safetensors"
    ) as caught:
        export(run_id, "peft", None, place)
    assert caught.value.exit_code == 4


def test_a_run_on_another_base_than_the_one_that_is_here_is_not_exported(copied: tuple[Place, str]):
    place, run_id = copied
    base = json.loads((place.store.run_folder(run_id) / "result.json").read_text())["spec"][
        "base_run"
    ]
    folder = place.store.run_folder(base)
    path = folder / "weights" / "model.safetensors"
    save_file(
        {name: tensor * 1.01 for name, tensor in load_file(path).items()},
        path,
        metadata={"format": "pt"},
    )
    reseal(folder)
    with pytest.raises(EnvironmentFault, match="was trained on another base"):
        export(run_id, "peft", None, place)
    shutil.rmtree(folder)
    with pytest.raises(EnvironmentFault, match=f"run {base}, is not in"):
        export(run_id, "merged", None, place)


def test_a_run_that_is_unknown_unfinished_or_without_weights_is_not_exported(
    copied: tuple[Place, str],
):
    place, run_id = copied
    wrong = run_id[:-1] + ("0" if run_id[-1] != "0" else "1")
    with pytest.raises(UsageError, match=f"Did you mean '{run_id}'"):
        export(wrong, "peft", None, place)
    folder = place.store.run_folder(run_id)
    shutil.rmtree(folder / "weights")
    reseal(folder)
    with pytest.raises(EnvironmentFault, match="has no weights"):
        export(run_id, "peft", None, place)
    reseal(folder, status="diverged", reason="loss is nan")
    with pytest.raises(UsageError, match=r"is diverged: loss is nan\.$"):
        export(run_id, "peft", None, place)


def test_a_run_of_another_version_is_not_exported(copied: tuple[Place, str]):
    place, run_id = copied
    spec = json.loads((place.store.run_folder(run_id) / "result.json").read_text())["spec"]

    def made_with(changed: dict[str, Any]) -> str:
        made = spec_id(changed)
        folder = shutil.copytree(place.store.run_folder(run_id), place.store.run_folder(made))
        reseal(folder, spec=changed, run_id=made)
        return made

    later = made_with(spec | {"adapter": spec["adapter"] | {"new_setting": 1}})
    with pytest.raises(
        EnvironmentFault,
        match=r"settings of another version: adapter: unknown setting 'new_setting'",
    ):
        export(later, "peft", None, place)
    spec["model"]["architecture"]["n_embd"] = 64
    other = made_with(spec)
    with pytest.raises(EnvironmentFault, match="another 'gpt2_127m_mini' than the catalogue's"):
        export(other, "peft", None, place)


def test_a_folder_that_is_there_is_left_alone(begun: Place, tmp_path: Path):
    run_id = on_base(begun, GPT2, "lora_r4")
    (tmp_path / "mine").write_text("x")
    with pytest.raises(UsageError, match="is there already"):
        export(run_id, "peft", tmp_path / "mine", begun)
    with pytest.raises(EnvironmentFault, match="Not a directory"):
        export(run_id, "peft", tmp_path / "mine" / "out", begun)
    assert (tmp_path / "mine").read_text() == "x"


@pytest.mark.parametrize(
    ("adapter", "wanted", "said"),
    [
        ("full", "peft", "which no adapter holds; possible: merged or base"),
        ("houlsby_m64", "peft", "PEFT has no bottleneck adapters"),
        (
            "houlsby_m64",
            "merged",
            "is not linear, and nothing folds it into the weights; possible: base",
        ),
        ("base", "merged", "nothing was trained; possible: base"),
    ],
)
def test_a_format_that_is_not_possible_is_refused_with_those_that_are(
    adapter: str, wanted: str, said: str, begun: Place, tmp_path: Path
):
    with pytest.raises(UsageError, match=re.escape(said)) as caught:
        export(on_base(begun, GPT2, adapter), wanted, tmp_path / "out", begun)
    assert one_line(caught.value)


# A base from the hub, and a base that a method changes.


@pytest.fixture
def from_hub(configs: Path, tmp_path: Path) -> Callable[[str], tuple[Place, RunSpec, Path]]:
    """`from_hub(dtype)`: a store and a --models-dir with a small model that has an address on
    the hub, and its spec and checkpoint.
    """

    def make_hub(dtype: str) -> tuple[Place, RunSpec, Path]:
        path = configs / "models.yaml"
        entries = yaml.safe_load(path.read_text())
        small = {
            key: value
            for key, value in entries[LLAMA].items()
            if key not in ("pretrain", "miniature_of")
        }
        architecture = small["architecture"] | {"vocab_size": 512, "initializer_range": 0.1}
        hub = {"id": "someone/tiny", "revision": "c" * 40, "source": "a test"}
        more = {
            "scale": "paper",
            "dtype": dtype,
            "hub": hub,
            "gated": False,
            "architecture": architecture,
        }
        path.write_text(yaml.safe_dump(entries | {"tiny": small | more}))
        forget()
        folder = tmp_path / "models" / "someone" / "tiny"
        drawn: Any = make(spec_of(reader.model("tiny"), "full")).model
        drawn.save_pretrained(folder)
        tokenizer("llama").save_pretrained(folder)
        spec = miniature("tiny", "lora_r4", "nf4", weights="pretrained")
        return Place(open_store(tmp_path / "store"), None, tmp_path / "models"), spec, folder

    return make_hub


@slow
def test_random_weights_go_along(place: Place, tmp_path: Path):
    folder = export(seal(place, miniature(GPT2, "lora_r4", "nf4")), "peft", tmp_path / "out", place)
    safe(folder)
    assert (folder / "base" / "tokenizer.json").is_file()
    assert "**The base has random weights**" in (folder / "README.md").read_text()


def unreachable(model: Any) -> Path:
    raise EnvironmentFault(f"could not fetch {model.hub.id}: no network.")


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=slow)])
def test_a_base_that_everybody_gets_does_not_go_along(
    dtype: str,
    from_hub: Callable[[str], tuple[Place, RunSpec, Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    place, spec, folder = from_hub(dtype)
    run_id = seal(place, spec, folder)
    out = export(run_id, "peft", None, place)
    assert out == place.store.root / "exports" / f"{run_id}-peft"
    safe(out)
    kept = place.store.run_folder(run_id) / "weights"
    for path in kept.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()
    assert {path.name for path in out.iterdir()} == {p.name for p in kept.iterdir()} | {
        "README.md",
        "manifest.sha256",
    }
    code = snippet(out)
    assert (
        'base = "someone/tiny"' in code
        and f"dtype=torch.{dtype}" in code
        and f'revision="{"c" * 40}"' in code
    )
    assert (
        "bnb_4bit_use_double_quant=True" in code
        and str(tmp_path) not in (out / "README.md").read_text()
    )
    _, front, _ = (out / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["base_model"] == "someone/tiny"
    merged = export(run_id, "merged", None, place)
    assert next(iter(tensors(merged).values())).dtype == getattr(torch, dtype)
    shutil.rmtree(folder)
    monkeypatch.setattr(checkpoints, "fetch", unreachable)
    with pytest.raises(EnvironmentFault, match="could not fetch someone/tiny"):
        export(run_id, "peft", tmp_path / "again", place)


def test_a_base_that_a_method_changes_goes_along(
    from_hub: Callable[[str], tuple[Place, RunSpec, Path]], monkeypatch: pytest.MonkeyPatch
):
    """As LoftQ's, whose LoRA stands on codes of its own; here every scale of the base is halved."""
    place, spec, folder = from_hub("float32")
    apply = lora.apply

    def halve(model: Any, config: Any, seed: int) -> Any:
        for name, parameter in model.named_parameters():
            if hasattr(parameter, "quant_state") and "q_proj" in name:
                parameter.quant_state.state2.absmax.mul_(0.5)
                parameter.quant_state.offset.mul_(0.5)
        return apply(model, config, seed)

    monkeypatch.setattr(lora, "apply", halve)
    run_id = seal(place, spec, folder)
    with pytest.raises(verify.NotEqual, match="is not the one that run"):
        export(
            run_id, "peft", None, place
        )  # a method that does not say so is found by its recorded answers
    folder_of_run = place.store.run_folder(run_id)
    (folder_of_run / "predictions.jsonl").unlink()
    reseal(folder_of_run)
    unchanged = {path.name for path in export(run_id, "peft", None, place).iterdir()}
    assert "base" not in unchanged, (
        "without them it is not: the planted mutant of the comparison below"
    )

    def own_base(quantizer: Choice) -> str:
        return "its codes are others"

    plant(monkeypatch, lora, own_base=own_base)
    out = export(run_id, "peft", place.store.root / "with", place)
    safe(out)
    assert {"base", "adapter"} <= {path.name for path in out.iterdir()}
    assert "its codes are others" in (out / "README.md").read_text()
    prompts, expected = run_logits(place, run_id)
    found = find_run(place.store, run_id, "peft")
    planned = layout_of(found.spec, "peft")
    equal(verify.reload(found.spec, out, planned, None, torch.device("cpu"), prompts), expected)
    again = verify.reload(
        found.spec,
        place.store.root / "exports" / f"{run_id}-peft",
        ExportLayout("peft", adapter="."),
        folder,
        torch.device("cpu"),
        prompts,
    )
    broken(equal, again, expected)


def test_another_kind_of_peft_folder_needs_nothing_of_its_own(tmp_path: Path):
    """AdaLoRA as PEFT saves it, with ranks that were pruned."""
    import peft

    ids, spec = [[5, 9, 200, 31]], spec_of(GPT2)
    config = peft.AdaLoraConfig(
        task_type="CAUSAL_LM",
        init_r=6,
        target_r=2,
        total_step=4,
        target_modules=["c_attn"],
        fan_in_fan_out=True,
    )
    model: Any = stir(peft.get_peft_model(load(spec, None), config))
    model(input_ids=torch.tensor(ids), labels=torch.tensor(ids)).loss.backward()
    model.base_model.update_and_allocate(3)
    expected = rebuild.logits(model, ids)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    adapted = rebuild.read_peft(load(spec, None), tmp_path)
    equal(rebuild.logits(adapted, ids), expected)
    merged = write.merge_peft(rebuild.stripped(adapted), tmp_path)
    equal(rebuild.logits(merged, ids), expected)
    broken(equal, rebuild.logits(load(spec, None), ids), expected)


def test_the_card_says_what_the_scoredsays_and_nothing_else(begun: Place, tmp_path: Path):
    run_id = on_base(begun, LLAMA, "lora_r4", "nf4")
    text = (export(run_id, "peft", tmp_path / "out", begun) / "README.md").read_text()
    result = json.loads((begun.store.run_folder(run_id) / "result.json").read_text())
    _, front, body = text.split("---\n", 2)
    values = yaml.safe_load(front)
    (model,) = values["model-index"]
    (scored,) = model["results"]
    (metric,) = scored["metrics"]
    assert model["name"] == result["label"] and scored["dataset"]["split"] == "development"
    assert (metric["type"], metric["value"]) == (SCORE["metric"], SCORE["value"])
    assert metric["args"] == {"low": 0.55, "high": 0.7, "confidence": 0.95, "rows": 9}
    assert "The model made again gives the log-probabilities of 3 recorded answers" in body
    assert (
        values["library_name"] == "peft" and "license" not in values and "base_model" not in values
    )
    for fact in (
        run_id,
        result["label"],
        "0.6250",
        "0.5500 to 0.7000",
        "d" * 64,
        "MIT (hub card)",
        "not to be compared with published ones",
        "double_quant: True",
        "lora_alpha: 8",
        "Evaluated not merged, on the base as nf4 stores it",
        result["environment"]["source_digest"],
        f"run {result['spec']['base_run']}",
        "split: development".capitalize(),
        "bootstrap intervals of 95%",
    ):
        assert fact in body, fact


@slow
def test_the_command_exports_and_says_how_far_it_is(
    begun: Place, tmp_path: Path, invoke: Callable[..., Any]
):
    run_id = on_base(begun, GPT2, "lora_r4", "nf4")
    out = tmp_path / "out"
    answer = invoke("export", "--run", run_id, "--out", str(out), "--store", str(begun.store.root))
    assert answer.returncode == 0 and answer.stderr == "", answer.stderr
    assert "logits equal the run's" in answer.stdout and str(out) in answer.stdout and out.is_dir()


LOW_RANK = "gpt2_127m_mini_lr_r64"


@pytest.fixture(scope="module")
def low_rank(tmp_path_factory: pytest.TempPathFactory) -> tuple[Place, dict[str, str]]:
    """A store with a low-rank model, and a LoRA on its factors in 4 bits; name -> run id."""
    runtime.setup(0, 2)
    place = Place(open_store(tmp_path_factory.mktemp("low_rank") / "store"))
    full = seal(place, miniature(LOW_RANK, "full", weights="scratch"))
    spec = miniature(LOW_RANK, "lora_r4", "nf4", weights="pretrained", base_run=full)
    return place, {"full": full, "nf4": seal(place, spec)}


@pytest.mark.parametrize(
    ("run", "wanted"),
    [
        ("full", "merged"),
        ("nf4", "merged"),
        pytest.param("lora", "merged", marks=slow),
        pytest.param("lora", "base", marks=slow),
    ],
)
def test_a_low_rank_run_is_exported_as_the_dense_model_that_computes_the_same(
    run: str, wanted: str, low_rank: tuple[Place, dict[str, str]], tmp_path: Path
):
    """Transformers' own GPT-2, with nothing of ours in it."""
    place, ids = low_rank
    if run == "lora":
        ids |= {
            run: seal(
                place,
                miniature(
                    LOW_RANK, "lora_r4", weights="pretrained", base_run=ids["full"], seed=len(ids)
                ),
            )
        }
    folder = export(ids[run], wanted, tmp_path / "out", place)
    safe(folder)
    names = set(load_file(folder / "model.safetensors"))
    assert not any(".a." in name or ".b." in name for name in names)
    assert "low_rank" not in (folder / "config.json").read_text()
    card = (folder / "README.md").read_text()
    assert (
        "logits of the run's" in card and "the dense layer of their product" in card
    )  # held against them when it was written


def test_a_low_rank_model_multiplied_wrongly_is_no_export(
    low_rank: tuple[Place, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from finrepro.models import factorize

    right = factorize.dense_weight
    monkeypatch.setattr(
        factorize, "dense_weight", lambda layer: (right(layer)[0] * 1.01, right(layer)[1])
    )
    with pytest.raises(verify.NotEqual):
        export(low_rank[1]["full"], "merged", tmp_path / "out", low_rank[0])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("run", "wanted", "says"),
    [
        ("full", "peft", "possible: merged or base"),
        ("nf4", "peft", "no library builds its low-rank layers.*possible: merged"),
        ("nf4", "base", "factors stored by bnb_4bit.*possible: merged"),
    ],
)
def test_what_a_low_rank_run_cannot_be_exported_as_is_said(
    run: str, wanted: str, says: str, low_rank: tuple[Place, dict[str, str]], tmp_path: Path
):
    with pytest.raises(UsageError, match=says) as refused:
        export(low_rank[1][run], wanted, tmp_path / "out", low_rank[0])
    one_line(refused.value)


@pytest.mark.parametrize(
    ("adapter", "quantizer"),
    [("lora_r4", "nf4"), ("full", "none"), ("houlsby_m64", "none"), ("base", "nf4")],
)
def test_a_run_is_loaded_as_it_was_scored(adapter: str, quantizer: str, begun: Place):
    run_id = on_base(begun, GPT2, adapter, quantizer)
    prompts, expected = run_logits(begun, run_id, "base")
    model, reader_of_text = finrepro.load(run_id, store=begun.store.root)
    equal(rebuild.logits(model, prompts), expected)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert rebuild.encoded_prompts(reader_of_text) == prompts


def test_what_cannot_be_loaded_is_one_line(copied: tuple[Place, str]):
    place, run_id = copied
    with pytest.raises(UsageError, match="unknown run 'nothing'"):
        finrepro.load("nothing", store=place.store.root)
    (place.store.run_folder(run_id) / "weights" / "adapter_model.safetensors").unlink()
    from finrepro.evidence.manifest import write_manifest

    write_manifest(place.store.run_folder(run_id))
    with pytest.raises(EnvironmentFault) as fault:
        finrepro.load(run_id, store=place.store.root)
    assert "has no weights" in one_line(fault.value)


def modes(folder: Path) -> set[int]:
    return {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()}


def test_an_export_is_written_for_both_versions_of_transformers_and_for_every_account(
    begun: Place, tmp_path: Path
):
    run_id = on_base(begun, LLAMA, "full")
    folder = export(run_id, "merged", tmp_path / "out", begun)
    rope = dict(reader.model(LLAMA).architecture["rope_parameters"])
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_parameters"] == rope
    assert config["rope_theta"] == rope.pop("rope_theta") and config["rope_scaling"] == rope
    words = json.loads((folder / "tokenizer_config.json").read_text())
    assert words["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not {"is_local", "local_files_only"} & set(words)
    (new := tmp_path / "new").touch()
    assert modes(folder) == {new.stat().st_mode & 0o777}
    assert "Written for Transformers 4.57 and 5 alike" in (folder / "README.md").read_text()


@pytest.mark.parametrize(("quantizer", "loops"), [("nf4", True), ("none", False)])
def test_the_card_switches_the_repacking_of_4_bit_layers_off(
    quantizer: str, loops: bool, begun: Place, tmp_path: Path
):
    folder = export(on_base(begun, GPT2, "lora_r4", quantizer), "peft", tmp_path / "out", begun)
    assert ("module.support_avx512bf16_for_cpu = False" in snippet(folder)) == loops
    assert "PEFT's `PeftModel`" in (folder / "README.md").read_text()


OLDER = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
assert transformers.__version__ == "4.57.6"
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
with torch.no_grad():
    logits = [model(input_ids=torch.tensor([ids])).logits[0] for ids in json.loads(sys.argv[2])]
from safetensors.torch import save_file
save_file({str(number): tensor for number, tensor in enumerate(logits)}, sys.argv[3])
print(json.dumps(tokenizer("Profits rose.")["input_ids"]))
"""


@pytest.fixture(scope="module")
def transformers_4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with Transformers 4.57.6, and this one's torch."""
    folder = tmp_path_factory.mktemp("older") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, timeout=120)
    python = folder / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for packages in (
        ["--no-deps", "transformers==4.57.6"],
        ["huggingface_hub==0.36.2", "tokenizers==0.22.2"],
    ):
        installed = subprocess.run(
            [*pip, *packages], capture_output=True, text=True, timeout=300, check=False
        )
        if installed.returncode:
            pytest.skip(f"Transformers 4.57.6 cannot be installed: {installed.stderr[-200:]}")
    (own,) = folder.glob("lib/python*/site-packages")
    (own / "torch_of_the_tests.pth").write_text(f"{Path(torch.__file__).parent.parent}\n")
    return python


@slow
def test_an_exported_llama_is_the_same_model_in_transformers_4(
    begun: Place, tmp_path: Path, transformers_4: Path
):
    made = exported(begun, on_base(begun, LLAMA, "full"), "merged", tmp_path / "out")

    def older(folder: Path) -> tuple[list[torch.Tensor], list[int]]:
        answer = subprocess.run(
            [str(transformers_4), "-c", OLDER, str(folder), json.dumps(made.prompts),
             str(tmp_path / "logits")],
            env={key: value for key, value in environment().items() if key != "PYTHONPATH"},
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert answer.returncode == 0, answer.stderr[-2000:]
        logits = [each for _, each in sorted(load_file(tmp_path / "logits").items())]
        return logits, json.loads(answer.stdout)

    logits, ids = older(made.folder)
    equal(logits, made.expected)
    assert ids == load_tokenizer(made.folder)("Profits rose.")["input_ids"]
    config = json.loads((made.folder / "config.json").read_text())
    for key in ("rope_theta", "rope_scaling"):
        del config[key]
    (made.folder / "config.json").write_text(json.dumps(config))
    broken(equal, older(made.folder)[0], made.expected)
