"""Law: a cell is trained on a prepared corpus where its task names one, with the tokenizer that is kept there, or says what is missing."""

import dataclasses
from pathlib import Path

import pytest

from finrepro import cells, inputs, plan
from finrepro.corpora import command
from finrepro.corpora.place import folder_of, missing_reason
from finrepro.corpora.windows import Windows
from finrepro.errors import Unavailable
from finrepro.place import Place
from finrepro.selection import Selection
from finrepro.spec import RunSpec
from finrepro.store import open_store
from finrepro.tokens import train_tokenizer

TEXTS = [f"paragraph {number} of a corpus , with its own words : {number * 7919} ." for number in range(400)]
NAME = "openwebtext"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory that holds a corpus under the name of the catalogue's."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    train_tokenizer(TEXTS, "gpt2", 300).save_pretrained(folder / "tokenizer")
    out = folder_of(NAME, folder)
    assert out is not None
    code = command.make(str(folder / "text.txt"), folder / "tokenizer", out, None, workers="1", on_error="stop", field="",
                        documents="lines", validation="0.1")  # fmt: skip
    assert code == 0
    return folder


def cell() -> RunSpec:
    found = cells.find(Selection(table="2", full=True), "paper", f"gpt2_127m-none-full-{NAME}-adamw-s0")
    return dataclasses.replace(found, train=dataclasses.replace(found.train, max_seq_len=32))


def test_windows_and_tokenizer_are_those_of_the_prepared_corpus(prepared: Path, tmp_path: Path):
    spec, place = cell(), Place(open_store(tmp_path), prepared, None)
    folder, tokenizer, origin = inputs.base(spec, place)
    assert folder is None and origin == "corpus" and len(tokenizer) == 300
    windows = inputs.training_examples(spec, {}, tokenizer, place)
    corpus = inputs.corpora(spec, place)[NAME]
    assert isinstance(windows, Windows) and windows.num_supervised == len(corpus.stream()) - corpus.stream().documents
    assert tokenizer.decode(windows[0].pieces[0].ids[1:]) in " ".join(TEXTS)


def test_the_scored_dataset_is_read_and_its_training_split_is_not(prepared: Path, tmp_path: Path):
    loaded = inputs.load_data(cell(), Place(open_store(tmp_path), prepared, None))
    assert set(loaded) == {"wikitext2"} and set(loaded["wikitext2"].splits) == {"test"}


def test_without_the_corpus_the_cell_is_skipped_with_the_command_that_makes_it(tmp_path: Path):
    place = Place(open_store(tmp_path), tmp_path, None)
    reason = plan.missing_data(cell(), place)
    assert reason == missing_reason(NAME, tmp_path) and "invoke data --prepare openwebtext" in str(reason)
    with pytest.raises(Unavailable, match="is not prepared"):
        inputs.base(cell(), place)
    assert "--data-dir" in str(missing_reason(NAME, None))


def test_a_corpus_of_more_tokens_than_the_model_has_rows_is_refused(prepared: Path, tmp_path: Path):
    spec = cell()
    small = dataclasses.replace(spec.model, architecture=spec.model.architecture | {"vocab_size": 200})
    with pytest.raises(Exception, match="200 embeddings"):
        inputs.corpora(dataclasses.replace(spec, model=small), Place(open_store(tmp_path), prepared, None))
