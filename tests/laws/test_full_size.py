"""GPT-2 at full size, 124,439,808 parameters, from a checkpoint that plain Transformers wrote,
with GPT-2's own tokenizer: the walk of a real cell. That everything is the model's own size is what
is held here; nothing is scored, since the weights are random and it would take minutes. In float32:
without instructions for bfloat16 a CPU multiplies such matrices 75 times more slowly."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.model import process  # noqa: F401

from finrepro.catalogue import footprint, reader
from finrepro.catalogue.cells import expand
from finrepro.catalogue.selection import Selection
from finrepro.evidence.manifest import file_digest
from finrepro.evidence.place import Place
from finrepro.evidence.store import open_store
from finrepro.models import checkpoints
from finrepro.models.build import load_tokenizer
from finrepro.planning import plan
from finrepro.running.cell import run_cell

pytestmark = pytest.mark.slow
PARAMETERS, BLOCKS, WIDTH = 124_439_808, 12, 768


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Path:
    """<hub id>/ with configuration, weights in shards, vocabulary and merges, as a user's own
    folder would hold them.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    root = tmp_path_factory.mktemp("models")
    folder = root / "openai-community" / "gpt2"
    torch.manual_seed(0)
    made = GPT2LMHeadModel(GPT2Config())
    assert sum(each.numel() for each in made.parameters()) == PARAMETERS
    made.save_pretrained(folder, max_shard_size="200MB")
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(data_dir / "gpt2_tokenizer" / name, folder)
    return root


def test_a_full_size_cell_walks_from_its_checkpoint_to_its_seal(
    models_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    (cell,) = expand(Selection("3", only="gpt2_127m-nf4-lora_r8-fiqa_sa-s0"), "paper")
    train = dataclasses.replace(
        cell.spec.train,
        max_steps=3,
        warmup_steps=0,
        global_batch_size=4,
        max_tokens=512,
        lr=1e-3,
        layout="padded",
    )
    model = dataclasses.replace(cell.spec.model, dtype="float32")
    spec = dataclasses.replace(cell.spec, model=model, train=train, tasks=(), threads=2)
    place = Place(open_store(tmp_path / "store"), data_dir, models_dir)
    folder = models_dir / "openai-community" / "gpt2"
    checkpoints.check(spec.model, folder)
    assert checkpoints.locate(spec.model, models_dir) == folder
    assert len(load_tokenizer(folder, spec.model)) == spec.model.architecture["vocab_size"] == 50257
    assert plan.cannot_run(spec, place) is None

    result: dict[str, Any] = run_cell(spec, place, lambda _: None, lambda: False)
    assert result["status"] == "done", result["reason"]
    costs = result["costs"]
    assert costs["total_params"] == PARAMETERS == reader.model("gpt2_127m").parameters
    assert costs["trainable_params"] == 8 * BLOCKS * 16 * WIDTH
    assert costs["base_bytes"] == footprint.base_bytes(spec)
    assert costs["base_bytes"] < 2 * PARAMETERS, "float32 would be four bytes each"
    assert costs["peak_memory_bytes"] > costs["base_bytes"]
    wanted = {path.name: file_digest(path) for path in folder.glob("*.safetensors")}
    assert len(wanted) > 1 and result["data"]["base"]["files"] == wanted
    assert result["data"]["tokenizer"]["sha256"]
    assert costs["final_loss"] > 0
