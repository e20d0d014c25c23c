"""Law: a configuration is either read with exactly the types that are declared, or refused in
one line that says where and what.
"""

import copy
import datetime
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from fixtures.process import forget, one_line
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from finrepro.catalogue import reader
from finrepro.catalogue.cells import expand
from finrepro.catalogue.selection import Selection
from finrepro.errors import UsageError, unknown
from finrepro.evidence.place import Place
from finrepro.evidence.store import Store
from finrepro.kinds import HOMES, choose, kind_module, kinds
from finrepro.planning import plan
from finrepro.settings import build, plain, read_yaml
from finrepro.settings import settings as typed

PACKAGES = ("adapters", "quantizers", "optimizers", "tasks", "datasets", "report")


@typed
class Inner:
    ratio: float


@typed
class Sample:
    count: int
    lr: float
    name: str
    on: bool
    mode: Literal["a", "b"]
    betas: tuple[float, float] = (0.9, 0.99)
    inner: Inner | None = None


GOOD: dict[str, Any] = {"count": 3, "lr": 0.1, "name": "x", "on": True, "mode": "a"}


def test_good_values_become_a_frozen_object_with_tuples_for_lists():
    sample = build(Sample, GOOD | {"betas": [0.5, 1], "inner": {"ratio": 2}}, "here")
    assert sample.betas == (0.5, 1.0) and isinstance(sample.betas, tuple)
    assert isinstance(sample.inner, Inner) and sample.inner.ratio == 2.0
    with pytest.raises((AttributeError, TypeError)):
        sample.count = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("lr: 1e-4", "lr"),  # YAML 1.1 reads a string
        ("lr: '0.1'", "lr"),
        ("lr: true", "lr"),
        ("count: 3.5", "count"),
        ("count: '3'", "count"),
        ("count: yes", "count"),
        ("count: null", "count"),
        ("name: off", "name"),  # YAML 1.1 reads false
        ("name: 12", "name"),
        ("name: 2024-01-02", "here"),  # YAML reads a date
        ("on: 1", "on"),
        ("on: 'true'", "on"),
        ("mode: c", "mode"),
        ("betas: 0.5", "betas"),
        ("betas: [0.5]", "betas"),
        ("betas: [0.5, 0.6, 0.7]", "betas"),
        ("betas: [0.5, x]", "betas.1"),
        ("inner: 3", "inner"),
        ("inner: {}", "inner"),
        ("inner: {ratio: 1, extra: 2}", "inner"),
    ],
)
def test_a_value_of_another_type_is_refused_by_name_in_one_line(text: str, field: str):
    with pytest.raises(UsageError) as refused:
        build(Sample, GOOD | yaml.safe_load(text), "here")
    message = one_line(refused.value)
    assert message.startswith("here") and field in message
    assert refused.value.exit_code == 2


def test_a_missing_setting_is_named():
    with pytest.raises(UsageError, match=r"^here\.count: "):
        build(Sample, {key: value for key, value in GOOD.items() if key != "count"}, "here")


def test_an_unknown_setting_is_refused_with_the_nearest_and_all_known_ones():
    with pytest.raises(UsageError) as refused:
        build(Sample, GOOD | {"cuont": 3}, "here")
    message = one_line(refused.value)
    assert "'cuont'" in message and "Did you mean 'count'?" in message
    assert all(name in message for name in ("betas", "count", "inner", "lr", "mode", "name", "on"))


def test_unknown_names_nothing_near_when_nothing_is_near():
    message = one_line(unknown("model", "zzz", ["gpt2", "llama"]))
    assert "Did you mean" not in message and "gpt2, llama" in message


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_of_kinds_has_some_and_each_can_be_imported(package: str):
    assert kinds(package)
    for kind in kinds(package):
        assert kind_module(package, kind).__name__ == f"{HOMES[package]}.{kind}"


def test_an_unknown_kind_names_the_known_ones():
    with pytest.raises(
        UsageError,
        match=r"^adapters\.x: unknown kind 'ful'\. Did you mean 'full'\? Allowed: .*full",
    ):
        choose("adapters", "x", {"kind": "ful"}, "adapters.x")


@pytest.mark.parametrize(
    "entry", [{}, {"kind": 3}, {"kind": None}, {"kind": ["lora"]}, [], "lora", None]
)
def test_an_entry_without_a_usable_kind_names_the_known_ones(entry: Any):
    with pytest.raises(UsageError) as refused:
        choose("adapters", "x", entry, "adapters.x")
    assert "lora" in one_line(refused.value)


def test_plain_keeps_the_kind_and_drops_the_catalogue_name():
    first = choose("adapters", "one", {"kind": "full"}, "x")
    second = choose("adapters", "two", {"kind": "full"}, "x")
    assert plain(first) == plain(second) == {"kind": "full"}


BROKEN_FILES = {
    "a bracket that is not closed": b"a: [1, 2\nb: 3\n",
    "a tab as indentation": b"a:\n\tb: 1\n",
    "a list": b"- a\n- b\n",
    "nothing": b"",
    "a number": b"3\n",
    "bytes that are not UTF-8": b"a: \xff\xfe\n",
    "a control character": b"a: \x00\n",
    "an unknown tag": b"a: !thing 1\n",
    "a tag for Python objects": b"a: !!python/object/apply:os.getcwd []\n",
    "an alias without anchor": b"a: *nowhere\n",
    "a key that is a list": b"? [a, b]\n: 1\n",
    "a date that is none": b"a: 2024-13-45\n",
    "a number that is none": b"a: !!int x\n",
    "a truth value that is none": b"a: !!bool x\n",
    "a binary number without digits": b"a: 0b_\n",
    "a time stamp that is none": b"a: !!timestamp x\n",
    "two documents": b"a: 1\n---\nb: 2\n",
    "deep nesting": b"a: " + b"[" * 20000,
    "the same key twice": b"a: {b: 1}\nc: {}\na: {b: 2}\n",
    "the same setting twice": b"a: {b: 1, c: 2, b: 3}\n",
}


@pytest.mark.parametrize("content", BROKEN_FILES.values(), ids=BROKEN_FILES)
def test_a_malformed_file_is_one_line_with_its_path(tmp_path: Path, content: bytes):
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    with pytest.raises(UsageError) as refused:
        read_yaml(path)
    assert one_line(refused.value).startswith(str(path))


def test_a_malformed_file_is_reported_with_its_line(tmp_path: Path):
    path = tmp_path / "broken.yaml"
    path.write_text("a: 1\nb: 2\nc: {d: ]\n")
    with pytest.raises(UsageError, match="line 3"):
        read_yaml(path)


def test_a_missing_file_and_a_folder_are_one_line(tmp_path: Path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(UsageError) as refused:
            read_yaml(path)
        assert one_line(refused.value).startswith(str(path))


# Fuzz: whatever is written into the project's own files, the answer is a set of cells or one line.

NAMES = ("models", "adapters", "quantizers", "datasets", "tasks", "tables/table3")
RESOLVE: dict[str, Any] = {
    "adapters": reader.adapter,
    "datasets": reader.dataset,
    "models": reader.model,
    "quantizers": lambda name: reader.quantizer(name, "float32"),
    "tasks": lambda name: reader.task(name, "short"),
}
FUZZ: dict[str, Any] = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "phases": (Phase.generate,),
    "suppress_health_check": list(HealthCheck),
}


def use_everything(store: Path) -> None:
    """Resolve every entry, expand the tables at every scale in every selection, and plan the
    cells.
    """
    for name, resolve in RESOLVE.items():
        for key in reader.entries(name):
            resolve(key)
    for scale in ("smoke", "open", "paper"):
        for selection in (Selection("3", seeds=(0,)), Selection("3", quick=True), Selection("5")):
            for cell in expand(selection, scale):  # type: ignore[arg-type]
                plan.cannot_run(cell.spec, Place(Store(store)))


def answer(store: Path) -> str:
    """ "" when everything resolves, else the one line that says why not."""
    forget()
    try:
        use_everything(store)
    except UsageError as error:
        return one_line(error)
    return ""


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-2, 2),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["1e-4", "model", "lora", "tfns", "s0", "*"]),
    st.dates(),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(
        st.one_of(st.text(max_size=4), st.booleans(), st.integers()), st.integers(), max_size=2
    ),
)


def spots(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of everything in nested mappings and lists."""
    inside = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return [path, *(spot for key, item in inside for spot in spots(item, (*path, key)))]


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy of nested mappings and lists with one spot replaced."""
    if not path:
        return new
    whole = copy.deepcopy(value)
    spot = whole
    for key in path[:-1]:
        spot = spot[key]
    spot[path[-1]] = new
    return whole


def test_the_untouched_files_resolve(configs: Path, tmp_path: Path):
    assert answer(tmp_path) == ""


@settings(max_examples=30, **FUZZ)
@given(data=st.data())
def test_any_value_anywhere_in_the_files_gives_cells_or_one_line(
    configs: Path, tmp_path: Path, data: st.DataObject
):
    path = configs / f"{data.draw(st.sampled_from(NAMES))}.yaml"
    original = path.read_text()
    content = yaml.safe_load(original)
    changed = replaced(content, data.draw(st.sampled_from(spots(content))), data.draw(VALUES))
    try:
        path.write_text(
            yaml.safe_dump(changed, allow_unicode=True), encoding="utf-8", errors="surrogatepass"
        )
        answer(tmp_path)
    finally:
        path.write_text(original)


@settings(max_examples=12, **FUZZ)
@given(data=st.data())
def test_a_file_with_any_bytes_changed_gives_cells_or_one_line(
    configs: Path, tmp_path: Path, data: st.DataObject
):
    path = configs / f"{data.draw(st.sampled_from(NAMES))}.yaml"
    original = path.read_bytes()
    start = data.draw(st.integers(0, len(original)))
    end = start + data.draw(st.integers(0, 3))
    new = data.draw(
        st.one_of(
            st.binary(max_size=3), st.sampled_from([b":", b"{", b"[", b"&a ", b"*a", b"\n", b"\n "])
        )
    )
    try:
        path.write_bytes(original[:start] + new + original[end:])
        answer(tmp_path)
    finally:
        path.write_bytes(original)


WRONG: list[tuple[str, tuple[Any, ...], Any, str]] = [
    ("adapters", ("lora_r8", "r"), "8", "adapters.lora_r8.r"),
    ("adapters", ("lora_r8", "rank"), 8, "adapters.lora_r8: unknown setting 'rank'"),
    ("adapters", ("lora_r8", "target_modules"), "all", "adapters.lora_r8.target_modules"),
    ("adapters", ("lora_r8",), None, "adapters.lora_r8"),
    ("adapters", (False,), {"kind": "full"}, "adapters"),
    ("quantizers", ("nf4", "block_size"), "64", "quantizers.nf4.block_size"),
    ("quantizers", ("nf4", "double_quant"), "on", "quantizers.nf4.double_quant"),
    ("quantizers", ("nf4", "kind"), "bnb", "quantizers.nf4: unknown kind 'bnb'"),
    ("models", ("gpt2_127m", "family"), "gpt", "models.gpt2_127m.family"),
    ("models", ("gpt2_127m", "architecture"), {"n_layer": 12}, "architecture needs"),
    ("models", ("gpt2_127m", "architecture", "n_embd"), "768", "architecture needs"),
    (
        "models",
        ("gpt2_127m_mini", "pretrain", "train", "lr"),
        "4e-3",
        "models.gpt2_127m_mini.pretrain.train.lr",
    ),
    (
        "models",
        ("gpt2_127m_mini", "pretrain", "task"),
        "tfns_txt",
        "unknown training set 'tfns_txt'",
    ),
    ("datasets", ("fpb", "files", "all", "rows"), "4846", "datasets.fpb.files.all.rows"),
    ("datasets", ("tfns", "labels"), {"0": "negative", "1": 2}, "datasets.tfns.labels.1"),
    ("tasks", ("tfns", "dataset"), "tfms", "unknown dataset 'tfms'"),
    ("tasks", ("tfns", "labels"), "negative", "tasks.tfns.labels"),
    ("tasks", ("tfns", "templates"), "short", "tasks.tfns"),
    ("tasks", ("tfns", "templates"), ["short", "fingpt"], "tasks.tfns"),
    ("tables/table3", ("smoke", "train", "lr"), "1e-3", "train.lr"),
    ("tables/table3", ("smoke", "train", "layout"), "packed", "train.layout"),
    ("tables/table3", ("smoke", "train", "optimizer", "kind"), "adam", "unknown kind 'adam'"),
    ("tables/table3", ("smoke", "train", "max_step"), 3, "Did you mean 'max_steps'?"),
    ("tables/table3", ("smoke", "axes", "model"), ["gpt2_mini"], "unknown model 'gpt2_mini'"),
    ("tables/table3", ("smoke", "axes", "adapter"), ["lora_r9"], "Did you mean 'lora_r8'?"),
    ("tables/table3", ("smoke", "template"), "long", "unknown template 'long'"),
    (
        "tables/table3",
        ("smoke", "overrides"),
        [{"where": {"adaptor": "full"}, "train": {}}],
        "unknown axis 'adaptor'",
    ),
    (
        "tables/table3",
        ("smoke", "overrides"),
        [{"where": {"adapter": "lora_r9"}, "train": {}}],
        "lora_r9",
    ),
    ("tables/table3", ("smoke", "full"), {"sed": [0, 1]}, "sed"),
    ("tables/table3", ("smoke", "evaluation", "split"), "train", "evaluation.split"),
    ("tables/table3", ("smoke", "axes", "seed"), [datetime.date(2024, 1, 2)], "table3"),
    ("tables/table3", ("smoke", "quick", 0, "train", "max_steps"), "1e2", "train.max_steps"),
    (
        "tables/table3",
        ("smoke", "default", 0, "train"),
        {"engine": "ddp", "zero_stage": 2},
        "zero_stage must be 0",
    ),
    ("tables/table3", ("smoke", "axes", "train_on"), ["fingpt_mx"], "Did you mean 'fingpt_mix'?"),
    ("tables/table5", ("beside",), "table33", "unknown table"),
    ("mixes", ("fingpt_mix", "parts"), {"fpb": 0}, "mixes.fingpt_mix.parts.fpb"),
    ("mixes", ("fingpt_mix", "tasks"), ["fbp"], "unknown task 'fbp'"),
    ("tables/table3", ("report",), "table33", "unknown kind 'table33'"),
]


@pytest.mark.parametrize(
    ("name", "path", "value", "said"), WRONG, ids=lambda value: str(value)[:40]
)
def test_a_mistake_in_a_file_is_named_where_it_stands(
    configs: Path, tmp_path: Path, name: str, path: tuple[Any, ...], value: Any, said: str
):
    file = configs / f"{name}.yaml"
    file.write_text(yaml.safe_dump(replaced(yaml.safe_load(file.read_text()), path, value)))
    message = answer(tmp_path)
    assert said in message, message
