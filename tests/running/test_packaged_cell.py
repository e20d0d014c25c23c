"""A cell on weights of a package: it walks the same way as any other, and its result says which
package and which file they were.
"""

import dataclasses
from pathlib import Path

import pytest
from fixtures.gguf_files import install, tiny_model, write_gguf

from finrepro.catalogue.cells import expand
from finrepro.catalogue.resolve import named_weights
from finrepro.catalogue.selection import Selection
from finrepro.catalogue.spec import RunSpec
from finrepro.errors import EnvironmentFault, Unavailable
from finrepro.evidence.place import Place
from finrepro.models import packaged
from finrepro.running.cell import run_cell


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunSpec:
    """Two steps of LoRA on a tiny packaged model, not scored."""
    file = tmp_path / "site" / "tiny.gguf"
    file.parent.mkdir()
    write_gguf(file)
    install(tmp_path / "site", monkeypatch)
    (cell,) = expand(Selection("5", only="llama3_1_8b_mini-nf4-lora_r8-tfns-b4-s0"), "smoke")
    model = tiny_model(file)
    train = dataclasses.replace(cell.spec.train, max_steps=2, warmup_steps=0)
    return dataclasses.replace(
        cell.spec,
        model=model,
        base_run=None,
        base_checkpoint=named_weights(model),
        train=train,
        threads=1,
    )


@pytest.mark.slow
def test_the_result_names_package_and_file(spec: RunSpec, place: Place) -> None:
    result = run_cell(spec, place, lambda _: None, lambda: False)
    assert result["status"] == "done", result["reason"]
    found = place.store.found(spec.run_id, weights=True)
    assert found.state == "done" and not found.faults and found.result
    package, base = spec.model.package, found.result["data"]["base"]
    assert package is not None and base["package"]["file_sha256"] == package.file_sha256
    assert base["package"]["wheel_sha256"] == package.wheel_sha256
    assert list(base["files"]) == ["model.safetensors"]
    checkpoint = found.result["spec"]["base_checkpoint"]
    assert checkpoint == f"tiny-weights==1.0@sha256:{package.file_sha256}"


def test_a_file_that_is_faulty_ends_the_command_and_seals_nothing(
    spec: RunSpec, place: Place, tmp_path: Path
) -> None:
    file = tmp_path / "site" / "tiny.gguf"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(EnvironmentFault, match="truncated") as caught:
        run_cell(spec, place, lambda _: None, lambda: False)
    assert not isinstance(caught.value, Unavailable)
    assert place.store.result(spec.run_id) is None
    assert not list(place.store.cache.glob("converted/*[!k]"))
    assert packaged.is_source(spec)
