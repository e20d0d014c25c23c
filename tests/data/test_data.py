"""Law: the examples are the published ones, row for row, or nothing is read; every change of the
data shows in a fingerprint.
"""

import csv
import dataclasses
import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from fixtures.process import one_line
from hypothesis import given, settings
from hypothesis import strategies as st

from finrepro import PROJECT
from finrepro.catalogue import reader
from finrepro.data import files as data
from finrepro.data.examples import Example, fingerprint, normalized, overlap
from finrepro.data.preparing import entries
from finrepro.errors import EnvironmentFault
from finrepro.kinds import format_of
from finrepro.settings import Choice

DATASETS = tuple(reader.entries("datasets"))
TFNS = reader.dataset("tfns")
FPB = reader.dataset("fpb")
CORPORA = [entry for entry in map(entries.corpus_entry, reader.entries("corpora")) if entry.files]
WITH_FILES = [*(reader.dataset(name).config for name in DATASETS), *CORPORA]


def finlora(path: Path) -> list[tuple[str, str]]:
    """(text, label) of FinLoRA's test file: the text stands between 'Input: ' and the last
    'Answer: ' of its prompt.
    """
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        (row["context"].partition("\nInput: ")[2].rpartition("\nAnswer:")[0], row["target"])
        for row in rows
    ]


def to_be_had(dataset: Choice, folder: Path | None) -> tuple[str, ...]:
    """Every split, or the test set alone where nobody has the training file."""
    full = data.dataset_missing_reason(dataset, folder) is None
    return ("train", "development", "test") if full else ("test",)


def undivided(dataset: Choice, folder: Path | None) -> dict[str, tuple[Example, ...]]:
    """The published splits, before the development split is cut."""
    locations = data.locate(dataset, folder, to_be_had(dataset, folder))
    assert locations is not None
    contents = {role: path.read_bytes() for role, (_, path) in locations.items()}
    return format_of(dataset).read(contents, dataset.name)


def test_tfns_has_the_counts_that_its_publisher_states():
    splits = undivided(TFNS, None)
    counts = {name: Counter(example.label for example in rows) for name, rows in splits.items()}
    assert counts["test"] == {"neutral": 1566, "positive": 475, "negative": 347}
    assert counts["train"] == {"neutral": 6178, "positive": 1923, "negative": 1442}


def test_tfns_labels_mean_what_the_tweets_say():
    by_text = {example.text: example.label for example in undivided(TFNS, None)["test"]}
    assert by_text["$SAN: Deutsche Bank cuts to Hold"] == "negative"
    upgrades = [label for text, label in by_text.items() if " upgraded " in text.lower()]
    downgrades = [label for text, label in by_text.items() if " downgraded " in text.lower()]
    assert Counter(upgrades).most_common(1)[0][0] == "positive"
    assert Counter(downgrades).most_common(1)[0][0] == "negative"


def swaps(gold: list[str], predicted: list[str]) -> dict[tuple[str, str], int]:
    """(our label, their label) -> rows, where they differ."""
    return dict(Counter(pair for pair in zip(gold, predicted, strict=True) if pair[0] != pair[1]))


def test_finlora_swaps_the_labels_of_tfns_and_we_do_not(data_dir: Path):
    reference = finlora(data_dir / "finlora" / "test" / "tfns_test.jsonl")
    ours = undivided(TFNS, None)["test"]
    assert len(reference) == len(ours) == 2388
    labels = [example.label for example in ours]
    assert swaps(labels, [label for _, label in reference]) == {
        ("neutral", "positive"): 1566,
        ("positive", "neutral"): 475,
    }
    # The planted mutant: TFNS read with FPB's order of labels is FinLoRA's file, and the detector
    # sees it.
    damaged = dataclasses.replace(
        TFNS.config, labels={"0": "negative", "1": "neutral", "2": "positive"}
    )
    mutant = undivided(dataclasses.replace(TFNS, config=damaged), None)["test"]
    assert swaps([example.label for example in mutant], [label for _, label in reference]) == {}


def test_the_embedded_tfns_is_the_file_of_the_data_folder_byte_for_byte(data_dir: Path):
    for file in TFNS.config.files.values():
        assert (data.EMBEDDED / file.path).read_bytes() == (data_dir / file.path).read_bytes()


def test_fpb_is_the_published_split_in_order_and_label(data_dir: Path):
    reference = finlora(data_dir / "finlora" / "test" / "fpb_test.jsonl")
    splits = undivided(FPB, data_dir)
    assert [(example.text, example.label) for example in splits["test"]] == [
        (t.strip(), label) for t, label in reference
    ]
    assert (len(splits["test"]), len(splits["train"])) == (1212, 3634)
    assert Counter(example.label for example in splits["test"]) == {
        "neutral": 729,
        "positive": 338,
        "negative": 145,
    }


def test_fpb_has_the_counts_of_the_release(data_dir: Path):
    rows = [example for split in undivided(FPB, data_dir).values() for example in split]
    assert Counter(example.label for example in rows) == {
        "neutral": 2879,
        "positive": 1363,
        "negative": 604,
    }
    assert sorted(int(example.id.rpartition("/")[2]) for example in rows) == list(range(4846))


def test_the_overlap_of_fpb_is_the_one_that_was_counted_by_hand(data_dir: Path):
    splits = undivided(FPB, data_dir)
    report = overlap(splits)
    assert report["test/also_in_train"] == 5
    assert report["test/nearly_in_train"] == 15
    both = overlap({"all": splits["train"] + splits["test"]})
    assert both["all/duplicates"] == 8


def test_tfns_repeats_three_texts_but_for_white_space_and_nothing_of_the_test_set():
    report = overlap(undivided(TFNS, None))
    assert (
        report["train/duplicates"],
        report["test/duplicates"],
        report["test/also_in_train"],
    ) == (3, 0, 0)


def folder_of(name: str, request: pytest.FixtureRequest) -> Path | None:
    return None if reader.dataset(name).config.embedded else request.getfixturevalue("data_dir")


def unit_of(example: Example, unit: str) -> str:
    return {"row": example.id, "text": example.text, "source": example.source}[unit]


@pytest.mark.parametrize("name", DATASETS)
def test_the_development_split_is_cut_from_train_and_nothing_is_lost(
    name: str, request: pytest.FixtureRequest
):
    dataset, folder = reader.dataset(name), folder_of(name, request)
    full, loaded = (
        undivided(dataset, folder),
        data.load(dataset, folder, to_be_had(dataset, folder)),
    )
    splits = loaded.splits
    assert splits["test"] == full["test"], "the test set is never touched"
    assert data.load(dataset, folder, tuple(splits)).fingerprints == loaded.fingerprints
    if "train" not in full:
        assert set(splits) == {"test"} and dataset.config.files["train"].sha256 is None
        return
    ids = {split: [example.id for example in rows] for split, rows in splits.items()}
    assert not set(ids["train"]) & set(ids["development"])
    assert set(ids["train"]) | set(ids["development"]) == {example.id for example in full["train"]}
    order = [example.id for example in full["train"]]
    assert ids["train"] == [key for key in order if key in set(ids["train"])], (
        "both keep the file's order"
    )
    assert len(set(ids["train"] + ids["development"] + ids["test"])) == sum(
        map(len, splits.values())
    )
    rule = dataset.config.development
    units = Counter(unit_of(example, rule.unit) for example in full["train"])
    held_out = {unit_of(example, rule.unit) for example in splits["development"]}
    assert not held_out & {unit_of(example, rule.unit) for example in splits["train"]}, (
        "what is drawn is never divided"
    )
    expected = round(len(full["train"]) * rule.fraction)
    assert expected <= len(ids["development"]) < expected + max(units[key] for key in held_out)


@pytest.mark.parametrize("name", DATASETS)
def test_another_seed_cuts_another_development_split(name: str, request: pytest.FixtureRequest):
    dataset, folder = reader.dataset(name), folder_of(name, request)
    rule = dataset.config.development
    full = undivided(dataset, folder)
    first, second = (
        data.cut_development(full, dataclasses.replace(rule, seed=seed)) for seed in (0, 1)
    )
    if "train" not in full:
        assert first == second == full
        return
    assert first["development"] != second["development"]
    assert rule.unit != "row" or len(first["development"]) == len(second["development"])


def test_rows_of_one_text_would_be_divided_by_drawing_rows(data_dir: Path):
    """The planted mutant: FiQA has sentences of several rows, and drawing rows puts some in both
    splits.
    """
    dataset = reader.dataset("fiqa_sa")
    assert data.load(dataset, data_dir).overlap["development/also_in_train"] == 0
    by_row = data.Development(fraction=0.1, seed=0, unit="row")
    assert (
        overlap(data.cut_development(undivided(dataset, data_dir), by_row))[
            "development/also_in_train"
        ]
        > 0
    )


@pytest.mark.parametrize("name", DATASETS)
def test_a_part_of_a_dataset_is_the_same_part(name: str, request: pytest.FixtureRequest):
    dataset, folder = reader.dataset(name), folder_of(name, request)
    full = data.load(dataset, folder, to_be_had(dataset, folder))
    for split, rows in full.splits.items():
        partial = data.load(dataset, folder, (split,))
        assert (
            partial.splits == {split: rows}
            and partial.fingerprints[split] == full.fingerprints[split]
        )
        assert set(partial.files) == set(data.roles(dataset, (split,)))
    assert full.files == {role: dataset.config.files[role].sha256 for role in full.files}


EXAMPLES = st.lists(
    st.builds(
        Example,
        id=st.text(max_size=5),
        text=st.text(max_size=20),
        label=st.sampled_from(["a", "b"]),
    ),
    min_size=1,
    max_size=6,
)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    examples=EXAMPLES,
    row=st.integers(0, 5),
    field=st.sampled_from(["id", "text", "label", "source"]),
    new=st.text(max_size=3),
)
def test_any_change_of_any_row_changes_the_fingerprint(
    examples: list[Example], row: int, field: str, new: str
):
    row %= len(examples)
    before = fingerprint(examples)
    assert before == fingerprint(tuple(examples))
    changed = dataclasses.replace(
        examples[row], **{field: getattr(examples[row], field) + "x" + new}
    )
    assert fingerprint([*examples[:row], changed, *examples[row + 1 :]]) != before
    assert fingerprint(examples[:-1]) != before
    assert fingerprint([*examples, examples[0]]) != before


def test_the_fingerprint_sees_the_end_of_long_data_and_the_order():
    long = [Example(id=f"x/{i}", text="word " * 3000, label="a") for i in range(50)]
    before = fingerprint(long)
    late = [*long[:-1], dataclasses.replace(long[-1], text=long[-1].text[:-1] + "!")]
    assert fingerprint(late) != before
    assert fingerprint(long[::-1]) != before


def test_the_fingerprint_keeps_fields_apart():
    first, second = Example(id="a", text="bc", label="d"), Example(id="ab", text="c", label="d")
    assert fingerprint([first]) != fingerprint([second])


def test_a_source_that_is_not_stated_leaves_the_fingerprint_as_it_was():
    assert data.load(TFNS, None).fingerprints["test"].startswith("a3815b670245"), (
        "of results recorded before"
    )


def test_near_duplicates_differ_in_case_digits_and_punctuation_only():
    assert normalized("Sales rose 3.1 % in Q2!") == normalized("sales ROSE 4,2% in q")
    assert normalized("Sales rose") != normalized("Sales fell")


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A data folder with a TFNS of its own, which is found before the embedded one."""
    folder = tmp_path / "data"
    shutil.copytree(data.EMBEDDED / "tfns", folder / "tfns")
    return folder


def changed_bytes(content: bytes) -> dict[str, bytes]:
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    return {
        "truncated": content[:-100],
        "empty": b"",
        "one bit": flipped,
        "appended": content + b"\n",
    }


@pytest.mark.parametrize("damage", ["truncated", "empty", "one bit", "appended"])
def test_a_file_that_is_not_the_recorded_one_is_refused_in_one_line(copied: Path, damage: str):
    path = copied / TFNS.config.files["test"].path
    path.write_bytes(changed_bytes(path.read_bytes())[damage])
    with pytest.raises(EnvironmentFault) as refused:
        data.load(TFNS, copied)
    message = one_line(refused.value)
    assert str(path) in message and "sha256" in message and refused.value.exit_code == 3


def test_a_whole_file_is_read_from_the_data_folder_and_says_so(copied: Path):
    loaded = data.load(TFNS, copied)
    assert set(loaded.origin.values()) == {"data directory"}
    assert data.load(TFNS, None).fingerprints == loaded.fingerprints
    assert set(data.load(TFNS, None).origin.values()) == {"embedded"}


def test_a_missing_dataset_is_one_line_that_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    for folder in (None, tmp_path):
        with pytest.raises(EnvironmentFault) as refused:
            data.load(FPB, folder)
        message = one_line(refused.value)
        assert (
            "--data-dir" in message
            and "invoke data --fetch fpb" in message
            and FPB.config.licence in message
        )
        assert refused.value.exit_code == 3


def test_what_is_missing_for_a_split_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    dataset = reader.dataset("nwgi")
    content = b'{"context": "Instruction: x\\nInput: Up.\\nAnswer: ", "target": "neutral"}\n'
    file = dataclasses.replace(dataset.config.files["test"], sha256=None, rows=1)
    config = dataclasses.replace(dataset.config, files={**dataset.config.files, "test": file})
    dataset = dataclasses.replace(dataset, config=config)
    (tmp_path / file.path).parent.mkdir(parents=True)
    (tmp_path / file.path).write_bytes(content)
    assert data.dataset_missing_reason(dataset, tmp_path, ("test",)) is None
    loaded = data.load(dataset, tmp_path, ("test",))
    assert [(e.text, e.label) for e in loaded.splits["test"]] == [("Up.", "neutral")]
    assert loaded.files == {"test": hashlib.sha256(content).hexdigest()}, (
        "of a file that is not pinned too"
    )
    for splits in (None, ("train",), ("development", "test")):
        with pytest.raises(EnvironmentFault, match=r"lacks nwgi/train\.jsonl") as refused:
            data.load(dataset, tmp_path, splits)
        assert "invoke data --fetch nwgi" in one_line(refused.value)


def test_a_folder_in_the_place_of_a_file_is_not_the_file(copied: Path):
    path = copied / TFNS.config.files["test"].path
    path.unlink()
    path.mkdir()
    assert data.load(TFNS, copied).origin["test"] == "embedded"


def test_a_fetched_file_is_found_and_still_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    file = FPB.config.files["all"]
    place = data.fetched_folder() / file.sha256 / Path(file.path).name
    place.parent.mkdir(parents=True)
    place.write_bytes(b"not the corpus")
    assert data.locate(FPB, None) == {"all": ("fetched", place)}
    with pytest.raises(EnvironmentFault, match="sha256"):
        data.load(FPB, None)


@pytest.mark.parametrize(
    "change",
    [
        {"text_column": "tweet"},
        {"label_column": "sentiment"},
        {"labels": {"0": "negative", "1": "positive"}},
    ],
)
def test_a_column_or_label_that_the_file_does_not_have_is_one_line(change: dict):
    damaged = dataclasses.replace(TFNS, config=dataclasses.replace(TFNS.config, **change))
    with pytest.raises(EnvironmentFault) as refused:
        data.load(damaged, None)
    assert "tfns" in one_line(refused.value)


def test_another_number_of_rows_is_one_line():
    files = TFNS.config.files
    fewer = files | {"test": dataclasses.replace(files["test"], rows=2387)}
    damaged = dataclasses.replace(TFNS, config=dataclasses.replace(TFNS.config, files=fewer))
    with pytest.raises(EnvironmentFault, match="2388 rows, expected 2387"):
        data.load(damaged, None)


def test_the_csv_reader_keeps_line_breaks_inside_a_field():
    locations = data.locate(TFNS, None)
    assert locations is not None
    with locations["train"][1].open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))[1:]
    broken = [row[0] for row in rows if "\n" in row[0].strip()]
    assert broken, "the file holds texts of several lines"
    texts = {example.text for example in undivided(TFNS, None)["train"]}
    assert {text.strip() for text in broken} <= texts


def test_every_embedded_folder_belongs_to_a_dataset_that_may_be_embedded():
    allowed = {
        Path(file.path)
        for config in WITH_FILES
        for file in config.files.values()
        if config.embedded
    }
    locations = {
        path.relative_to(data.EMBEDDED) for path in data.EMBEDDED.rglob("*") if path.is_file()
    }
    assert {
        path for path in locations if path.suffix not in (".md", "") and path.name != "LICENSE"
    } == allowed


@pytest.mark.parametrize("folder", sorted(p.name for p in data.EMBEDDED.iterdir() if p.is_dir()))
def test_every_embedded_folder_names_its_source_and_licence(folder: str):
    texts = [
        p.read_text(encoding="utf-8")
        for p in (data.EMBEDDED / folder).iterdir()
        if p.suffix == ".md" or p.name == "LICENSE"
    ]
    assert texts, f"finrepro/data/embedded/{folder} has neither README.md nor LICENSE"
    text = "\n".join(texts)
    described = [
        each
        for each in WITH_FILES
        if any(file.path.startswith(f"{folder}/") for file in each.files.values())
    ]
    for config in described:
        assert "licen" in text.lower() and config.licence.split()[0].rstrip(",") in text
        assert (
            all((file.sha256 or "") in text for file in config.files.values())
            or config not in CORPORA
        )
        sources = [config.hub.id] if config.hub else []
        for file in config.files.values():
            owner, repository, commit = (file.url or "///////").split("/")[3:6]
            sources += [f"{owner}/{repository}", commit] if file.url else []
        assert sources and all(source in text for source in sources)
    assert described


def test_nothing_that_may_not_be_embedded_lies_in_the_package():
    texts = {example.text for example in undivided(TFNS, None)["test"]}
    assert texts
    names = {path.name.lower() for path in (PROJECT / "finrepro").rglob("*")}
    assert not any(
        "agree" in name or "phrasebank" in name
        for name in names - {"phrasebank.py", "phrasebank.cpython-311.pyc"}
    )
