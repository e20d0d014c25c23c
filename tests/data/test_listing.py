"""Law: the list of datasets names every dataset, its licence and source, what is here, and one
step for what is not; it fits a terminal.
"""

from pathlib import Path

import pytest

from finrepro.catalogue import reader
from finrepro.data import files, listing

NAMES = tuple(reader.entries("datasets"))


def entry(name: str, folder: Path | None) -> list[str]:
    lines = listing.datasets(folder)
    start = next(number for number, line in enumerate(lines) if line.startswith(f"{name}: "))
    rest = lines[start:]
    return rest[: rest.index("")] if "" in rest else rest


@pytest.fixture(autouse=True)
def nothing_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))


@pytest.mark.parametrize("name", NAMES)
def test_every_dataset_says_what_it_is_and_how_it_is_had(name: str):
    config, text = reader.dataset(name).config, " ".join(" ".join(entry(name, None)).split())
    assert config.title in text and config.licence in text
    for role, file in config.files.items():
        state = "here (embedded)" if config.embedded else "not here"
        assert f"{role}: {state}" in text
        assert file.sha256 is None or file.sha256[:12] in text
        assert file.rows is None or f"{file.rows:,} rows" in text
    pinned = all(file.sha256 for file in config.files.values())
    assert ("sha256 not pinned" in text) == (not pinned)
    if config.hub:
        assert config.hub.id in text and (config.hub.revision or "revision not pinned") in text
    assert (f"invoke data --fetch {name}" in text) == (not config.embedded)
    users = [task for task, values in reader.entries("tasks").items() if values["dataset"] == name]
    assert users and f"tasks: {', '.join(users)}" in text


def test_what_is_in_the_data_folder_needs_no_step(data_dir: Path):
    for name in NAMES:
        text = " ".join(entry(name, data_dir))
        is_complete = files.dataset_missing_reason(reader.dataset(name), data_dir) is None
        assert ("to get it" not in text) == is_complete
    assert "train:     not here" in "\n".join(entry("nwgi", data_dir))
    assert "test:      here (data directory)" in "\n".join(entry("nwgi", data_dir))


def test_a_line_fits_the_terminal_unless_it_is_one_word(tmp_path: Path):
    for folder in (None, tmp_path):
        for line in listing.datasets(folder):
            assert len(line) <= listing.WIDTH or len(line.split()) <= 2
            assert line == line.rstrip()
