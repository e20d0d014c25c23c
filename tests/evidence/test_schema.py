"""Law: every key of a result is described, with one source for types, JSON Schema and page; a
result of a format that is not known is refused, and never taken for none.
"""

import copy
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest
from fixtures.json_schema import exported, faults, result_faults

from finrepro import PROJECT
from finrepro.catalogue.cells import expand
from finrepro.catalogue.selection import Selection
from finrepro.catalogue.spec import DESCRIPTIVE, Evaluation, Model, RunSpec, Train
from finrepro.errors import EnvironmentFault
from finrepro.evidence import schema, schema_page, store
from finrepro.evidence.manifest import write_manifest
from finrepro.evidence.place import Place
from finrepro.evidence.result import header, seal_unfinished
from finrepro.evidence.schema_spec import EvaluationSpec, ModelSpec, Spec, TrainSpec

OLD_RUN = PROJECT / "tests/evidence/store_of_2bd6da0/results/runs/aaec0a61dac3"


def some_spec() -> RunSpec:
    return expand(Selection("3", only="gpt2_127m_mini-none-full-tfns-s0"), "smoke")[0].spec


def finished() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((OLD_RUN / "result.json").read_text(encoding="utf-8"))
    return content


def test_the_page_and_the_schema_in_docs_are_those_of_the_code(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    schema_page.write(tmp_path)
    for name in (schema_page.PAGE, schema_page.SCHEMA):
        assert (tmp_path / name).read_text() == (PROJECT / name).read_text(), (
            f"{name}: run python -m finrepro.evidence.schema_page"
        )


def test_every_key_of_the_schema_says_what_it_means() -> None:
    parts = {"Result": exported(), **exported()["$defs"]}
    for name, part in parts.items():
        assert part["description"] and part["additionalProperties"] is False, name
        for key, shape in part["properties"].items() if "properties" in part else ():
            assert shape["description"], f"{name}.{key}"
            if key.endswith(("_bytes", "_seconds", "_tokens")):
                assert shape["unit"] in ("bytes", "s", "tokens"), f"{name}.{key}"
            assert f"`{key}`" in schema_page.page()


@pytest.mark.parametrize(
    ("described", "settings"),
    [(TrainSpec, Train), (EvaluationSpec, Evaluation), (ModelSpec, Model), (Spec, RunSpec)],
)
def test_the_settings_that_are_hashed_are_described(described: Any, settings: Any) -> None:
    fields = {field.name for field in dataclasses.fields(settings)}
    assert set(described.__annotations__) == fields - DESCRIPTIVE - {"label"}


def test_every_state_of_a_result_is_as_described(place: Place) -> None:
    spec = some_spec()
    layout = {"used": "bins", "seconds": {"bins": 0.1, "padded": 0.2}}
    attention = {"train": None, "evaluate": "sdpa"}
    assert result_faults(finished()) == []
    assert result_faults(header(spec, store.DONE, None, 0.0)) == []
    assert result_faults(header(spec, store.DONE, None, 0.0, "cpu", layout, attention)) == []  # type: ignore[arg-type]
    for status in (store.FAILED, store.DIVERGED, store.SKIPPED):
        seal_unfinished(spec, place.store, status, "the reason", time.time())
        assert result_faults(place.store.result(spec.run_id)) == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda result: result.pop("scores"), "result.scores is missing"),
        (lambda result: result.update(verdict="good"), "result.verdict is not described"),
        (lambda result: result.update(status="ok"), "result.status"),
        (lambda result: result.update(format=2), "result.format"),
        (lambda result: result["costs"].update(train_tokens=1.5), "result.costs.train_tokens"),
        (lambda result: result["costs"].update(peak_tea_bytes=1), "result.costs.peak_tea_bytes"),
        (lambda result: result["costs"].update(bytes_as_nf4="1"), "result.costs.bytes_as_nf4"),
        (lambda result: result["scores"][0].update(value=None), "result.scores[0].value"),
        (lambda result: result["data"]["files"].update(tfns="x"), "result.data.files.tfns"),
        (lambda result: result["spec"]["train"].pop("lr"), "result.spec.train.lr is missing"),
    ],
)
def test_what_is_not_as_described_is_found(change: Any, fault: str) -> None:
    result = copy.deepcopy(finished())
    change(result)
    assert [found for found in result_faults(result) if found.startswith(fault)]


@pytest.mark.parametrize(("size", "fault"), [(12, ""), ("12", "costs.bytes_as_nf4: is '12'")])
def test_a_result_scored_in_other_quantizers_is_read_with_its_sizes(
    size: Any, fault: str, tmp_path: Path
) -> None:
    result = copy.deepcopy(finished())
    result["costs"] |= {"bytes_as_int8": 34, "bytes_as_nf4": size}
    path = tmp_path / "result.json"
    path.write_text(json.dumps(result))
    content, found = schema.examine(path)
    assert content == result and found.startswith(fault) and bool(found) == bool(fault)


def test_the_lines_of_a_run_are_as_described() -> None:
    described = {
        "LossLine": {"step": 0, "loss": 0.5, "grad_norm": 0.1, "lr": 1e-4, "seconds": 0.2},
        "ChosenLine": {"task": "t", "id": "t/test/0", "gold": "a", "prediction": None}
        | {"logprobs": {"a": -1.5}},
        "GeneratedLine": {"task": "t", "id": "t/test/0", "gold": "a", "output": " b"}
        | {"prediction": "b"},
        "TextLine": {"task": "t", "id": "t/test/0", "logprob": -3.5, "tokens": 2, "bytes": 9},
    }
    for name, line in described.items():
        assert faults(line, name) == []
        assert faults({**line, "more": 1}, name) == ["result.more is not described"]
    for path, name in (("loss.jsonl", "LossLine"), ("system.jsonl", "SystemLine")):
        for text in (OLD_RUN / path).read_text().splitlines():
            assert faults(json.loads(text), name) == []


@pytest.mark.parametrize("format", [2, 99, "1", 0, None])
def test_a_result_of_another_format_is_refused_by_name_and_kept(place: Place, format: Any) -> None:
    spec = some_spec()
    seal_unfinished(spec, place.store, store.FAILED, "the reason", time.time())
    path = place.store.run_folder(spec.run_id) / "result.json"
    path.write_text(json.dumps({"format": format, "quite": "different"}))
    write_manifest(path.parent)
    before = path.read_bytes()
    for read in (lambda: place.store.result(spec.run_id), lambda: place.store.state(spec)):
        with pytest.raises(EnvironmentFault, match=rf"result format {format}, .*reads 1") as caught:
            read()
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(EnvironmentFault):
        seal_unfinished(spec, place.store, store.FAILED, "the reason", time.time())
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '"text"', '{"format": 1}', "{}"])
def test_what_is_no_result_is_damage_also_where_it_is_sealed(place: Place, content: str) -> None:
    spec = some_spec()
    seal_unfinished(spec, place.store, store.FAILED, "the reason", time.time())
    path = place.store.run_folder(spec.run_id) / "result.json"
    path.write_text(content)
    write_manifest(path.parent)
    assert schema.read(path) is None and place.store.state(spec) == store.DAMAGED
