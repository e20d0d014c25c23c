"""Law: a cell is trained on a prepared corpus where its task names one, with the tokenizer that
is kept there, or says what is missing.
"""

import dataclasses
import shutil
from pathlib import Path

import pytest
from fixtures.corpora import edit_index

from finrepro.catalogue import cells, reader, resolve
from finrepro.catalogue.selection import Selection
from finrepro.catalogue.spec import RunSpec
from finrepro.data.corpora.folders import folder_of, unprepared_reason
from finrepro.data.corpora.windows import Windows
from finrepro.data.preparing import command, entries
from finrepro.data.tokens import train_tokenizer
from finrepro.errors import Unavailable, UsageError
from finrepro.evidence.place import Place
from finrepro.evidence.store import open_store
from finrepro.planning import availability
from finrepro.running import base, inputs, text

TEXTS = [
    f"paragraph {number} of a corpus , with its own words : {number * 7919} ."
    for number in range(400)
]
NAME = "openwebtext"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory that holds a corpus under the name of the catalogue's."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    train_tokenizer(TEXTS, "gpt2", 300).save_pretrained(folder / "tokenizer")
    out = folder_of(NAME, folder)
    assert out is not None
    command.prepare_corpus(
        str(folder / "text.txt"),
        folder / "tokenizer",
        out,
        workers=1,
        documents="lines",
        validation=0.1,
    )
    claim(out)
    return folder


def claim(out: Path) -> None:
    """Have the corpus say that it was made from what the catalogue names: the hub is out of
    reach here.
    """
    entry = entries.corpus_entry(NAME)
    assert entry.hub is not None
    hub = {
        "hub": entry.hub.id,
        "revision": entry.hub.revision,
        "split": entry.split,
        "field": entry.field,
        "subset": None,
    }
    edit_index(out, source={"train": [hub], "validation": []})


@pytest.fixture
def copied(prepared: Path, tmp_path: Path) -> Path:
    """The data directory again, to be damaged."""
    return Path(shutil.copytree(prepared, tmp_path / "data"))


def cell() -> RunSpec:
    spec_of_cell = resolve.spec_of_label(
        Selection(table="2", full=True), "paper", f"gpt2_127m-none-full-{NAME}-adamw-s0"
    )
    return dataclasses.replace(
        spec_of_cell, train=dataclasses.replace(spec_of_cell.train, max_seq_len=32)
    )


def test_windows_and_tokenizer_are_those_of_the_prepared_corpus(prepared: Path, tmp_path: Path):
    spec, place = cell(), Place(open_store(tmp_path), prepared, None)
    folder, tokenizer, origin = base.open_base(spec, place)
    assert folder is None and origin == "corpus" and len(tokenizer) == 300
    windows = inputs.training_examples(spec, {}, tokenizer, text.open_corpora(spec, place))
    corpus = text.open_corpora(spec, place)[NAME]
    assert (
        isinstance(windows, Windows)
        and windows.num_supervised == len(corpus.stream()) - corpus.stream().documents
    )
    assert tokenizer.decode(windows[0].pieces[0].ids[1:]) in " ".join(TEXTS)


def test_the_scored_dataset_is_read_and_its_training_split_is_not(prepared: Path, tmp_path: Path):
    loaded = inputs.load_data(cell(), Place(open_store(tmp_path), prepared, None))
    assert set(loaded) == {"wikitext2"} and set(loaded["wikitext2"].splits) == {"test"}


def test_without_the_corpus_the_cell_is_skipped_with_the_command_that_makes_it(tmp_path: Path):
    place = Place(open_store(tmp_path), tmp_path, None)
    reason = availability.missing_data(cell(), place)
    assert str(reason).startswith(
        f"{unprepared_reason(NAME, tmp_path)}, or put the tokenizer of"
    ) and "invoke data --prepare openwebtext" in str(reason)
    with pytest.raises(Unavailable, match="is not prepared"):
        base.open_base(cell(), place)
    assert "--data-dir" in str(unprepared_reason(NAME, None))


def test_a_corpus_of_more_tokens_than_the_model_has_rows_is_refused(prepared: Path, tmp_path: Path):
    spec = cell()
    small = dataclasses.replace(
        spec.model, architecture=spec.model.architecture | {"vocab_size": 200}
    )
    with pytest.raises(Unavailable, match="200 embeddings"):
        text.open_corpora(
            dataclasses.replace(spec, model=small), Place(open_store(tmp_path), prepared, None)
        )


def test_a_corpus_of_another_source_is_not_the_one_of_this_name(copied: Path, tmp_path: Path):
    place = Place(open_store(tmp_path / "store"), copied, None)
    source = {"train": [{"files": {"text.txt": 1}}], "validation": []}
    edit_index(copied / "corpora" / NAME, source=source)
    with pytest.raises(Unavailable, match=f"is not {NAME}"):
        base.open_base(cell(), place)


def test_another_tokenizer_beside_the_shards_is_refused(copied: Path, tmp_path: Path):
    train_tokenizer(TEXTS, "gpt2", 290).save_pretrained(copied / "corpora" / NAME / "tokenizer")
    with pytest.raises(Unavailable, match="another tokenizer"):
        base.open_base(cell(), Place(open_store(tmp_path / "store"), copied, None))


def test_a_damaged_shard_costs_the_cell_and_not_the_campaign(copied: Path, tmp_path: Path):
    shard = next((copied / "corpora" / NAME).glob("train-*.tokens"))
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(Unavailable, match="it is damaged"):
        base.open_base(cell(), Place(open_store(tmp_path / "store"), copied, None))


def test_a_result_says_what_the_text_was(prepared: Path, tmp_path: Path):
    facts = text.corpora_facts(
        cell(), text.open_corpora(cell(), Place(open_store(tmp_path), prepared, None))
    )[NAME]
    assert (
        facts["source"]["train"][0]["hub"] == "Skylion007/openwebtext" and facts["documents"] > 300
    )
    assert len(facts["index"]) == 64 and facts["tokens"] > facts["documents"]


@pytest.mark.parametrize(
    "changed", [{"weights": "random"}, {"adapter": "/somewhere/made_elsewhere"}]
)
def test_what_makes_no_sense_from_scratch_is_refused(
    changed: dict[str, str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(resolve, "foreign_adapter", lambda _: reader.adapter("lora_r8"))
    with pytest.raises(
        UsageError, match=f"trains from scratch: --{next(iter(changed))} does not apply"
    ):
        cells.expand(Selection(table="2", **changed), "smoke")  # type: ignore[arg-type]


def test_a_corpus_is_not_made_inside_of_its_own_source(prepared: Path):
    with pytest.raises(UsageError, match="inside of its own source"):
        command.prepare_corpus(str(prepared), prepared / "tokenizer", prepared / "more", workers=1)
