"""Law: Table 1 is arithmetic on the models' sizes - the numbers are the models' own, the claims
are judged by them, and nothing runs.
"""

import json
from typing import Any

import pytest
from fixtures.model import broken, process  # noqa: F401
from fixtures.process import one_line
from test_flops import REAL, counted

from finrepro.campaigns import campaign, computed
from finrepro.catalogue import reader
from finrepro.catalogue.cells import expand
from finrepro.catalogue.selection import Selection
from finrepro.errors import UsageError
from finrepro.evidence.place import Place
from finrepro.reporting.table import Table, to_json
from finrepro.reporting.tables import table1
from finrepro.sizes import flops, memory
from finrepro.sizes.shapes import block_sizes, depth

SETTINGS: Any = reader.table("1").computed
ACCOUNTS = [computed.account_of(name, SETTINGS) for name in SETTINGS.models]
TABLE = table1.build(ACCOUNTS, SETTINGS)


def of(name: str) -> dict[str, Any]:
    return next(each for each in ACCOUNTS if each["model"] == name)


def text(quantity: str, name: str, table: Table = TABLE) -> str:
    line = next(line for line in table.lines if line.texts[0] == quantity)
    return line.texts[table.columns.index(name)]


def test_all_six_real_models_are_in_it():
    assert SETTINGS.models == REAL and TABLE.columns == ("Quantity", *REAL)
    assert [reader.model(name).scale for name in REAL] == ["paper"] * 6


# Computed by hand from the configurations: linear weights [M], share of size, GB at 16 bit, int8,
# nf4, KiB of cache a token.
KNOWN = {
    "gpt2_127m": (84.93, 0.683, 0.25, 0.16, 0.12, 36),
    "gpt2_1_5b": (1474.56, 0.947, 3.12, 1.64, 0.93, 300),
    "llama2_7b": (6476.0, 0.961, 13.48, 7.00, 3.87, 512),
    "llama2_13b": (12687.8, 0.975, 26.03, 13.34, 7.20, 800),
    "llama3_1_8b": (6979.3, 0.869, 16.06, 9.08, 5.70, 128),
    "llama3_1_70b": (68451.0, 0.970, 141.11, 72.66, 39.52, 320),
}


@pytest.mark.parametrize("name", REAL)
def test_sizes_and_bytes_are_the_known_ones(name: str):
    linear, share, half, byte, four, cache = KNOWN[name]
    found = of(name)
    assert found["linear_parameters"] / 1e6 == pytest.approx(linear, abs=0.06)
    assert found["linear_share"] == pytest.approx(share, abs=6e-4)
    stored = [found["bytes"][each] / 1e9 for each in ("none", "int8", "nf4")]
    assert stored == pytest.approx(
        [half, byte, four], abs=0.03
    )  # the hand computation leaves out some of int8's scales
    assert found["cache_bytes_per_token"] == cache * 1024
    assert (
        found["bytes"]["none"] == found["nominal_bytes"][16]
        and found["bytes"]["nf4"] > found["nominal_bytes"][4]
    )


def test_the_stored_bytes_are_what_the_planner_stores():
    from finrepro.catalogue import footprint

    for label in ("gpt2_127m-int8-lora_r8-tfns-s0", "llama3_1_70b-nf4-lora_r8-tfns-s0"):
        (cell,) = expand(Selection("3", full=True, seeds=(0,), only=label), "paper")
        assert (
            footprint.base_bytes(cell.spec)
            == of(cell.spec.model.name)["bytes"][cell.spec.quantizer.name]
        )


def judged(table: Table, claim: str, expected: dict[str, str]) -> None:
    found = next(line for line in table.lines if line.texts[0].startswith(claim))
    assert dict(zip(table.columns[1:], found.texts[1:], strict=True)) == expected


H2 = {
    "gpt2_127m": "no (yes)",
    "gpt2_1_5b": "no (yes)",
    "llama2_7b": "no (no)",
    "llama2_13b": "no (yes)",
    "llama3_1_8b": "no (no)",
    "llama3_1_70b": "no (yes)",
}
H1 = {name: "no (yes)" if name == "gpt2_127m" else "yes (yes)" for name in REAL}


def test_the_claims_are_judged_model_by_model():
    judged(TABLE, "H1", H1)
    judged(TABLE, "H2", H2)
    wrong = [
        each | {"linear_share": 0.992} if each["model"] == "llama2_7b" else each
        for each in ACCOUNTS
    ]
    broken(judged, table1.build(wrong, SETTINGS), "H2", H2)


def test_shares_are_of_the_whole_and_fall_with_the_length():
    for each in ACCOUNTS:
        for key in ("training_shares", "serving_shares"):
            assert list(each[key]) == [
                n for n in SETTINGS.lengths if n <= flops.positions(reader.model(each["model"]))
            ]
            assert all(sum(share.values()) == pytest.approx(1) for share in each[key].values())
            linear = [share["linear"] for share in each[key].values()]
            assert linear == sorted(linear, reverse=True) and len(set(linear)) == len(linear)
    assert text("Linear share, training, 8,192 tokens", "gpt2_127m") == "-"
    assert text("Linear share, training, 1,024 tokens", "gpt2_127m") == "63.9 % (92.9 %)"


def test_what_training_costs_is_ordered_as_it_must_be():
    for each in ACCOUNTS:
        cost = each["flops"]
        assert cost["full"] == pytest.approx(3 * cost["forward"])
        assert (
            cost["forward"]
            < cost["lora"]
            < cost["full"]
            < cost["full_checkpointed"]
            < 4 * cost["forward"]
        )
        assert cost["lora"] < cost["lora_checkpointed"] < cost["full_checkpointed"]
        used = {name: parts["total"] for name, parts in each["memory"].items()}
        assert used["qlora"] < used["lora"] < used["full"] > 16 * each["parameters"]
        assert each["low_rank"]["linear"]["linear_compression"] == pytest.approx(
            SETTINGS.compression, rel=0.005
        )
        assert each["low_rank"]["whole_model"]["compression"] == pytest.approx(
            SETTINGS.compression, rel=0.005
        )


def test_the_published_compression_is_put_to_the_test():
    notes = "\n".join(TABLE.notes)
    assert (
        "r 413 and 590.5 M parameters: 0.59 GB at a nominal byte each, but 0.68 GB as LLM.int8"
        in notes
    )
    assert (
        "r 455 and 642.2 M parameters, 0.64 GB" in notes
        and "2.43x of the model" in notes
        and "2.60x" in notes
    )
    assert "allow 2.30x" in notes and "56.6 % of the first" in notes
    without = [each for each in ACCOUNTS if each["model"] != "gpt2_1_5b"]
    assert "0.59 GB" not in "\n".join(table1.build(without, SETTINGS).notes)


# A published peak, the formulas against it, and how far they may be off.
PEAKS = [("llama3_1_8b", "nf4", 7.4, 0.05), ("llama3_1_8b", "none", 16.2, 0.08)]


@pytest.mark.parametrize(("name", "quantizer", "gib", "off"), PEAKS)
def test_the_estimate_of_memory_is_near_a_published_peak(
    name: str, quantizer: str, gib: float, off: float
):
    """torchtune, Llama-3.1-8B (Q)LoRA on a 4090, two packed sequences of 2,048 tokens, chunked
    loss: no logits are kept.
    """
    model = reader.model(name)
    tokens = 2 * 2048
    used = memory.lora_bytes(model, reader.quantizer(quantizer, model.dtype), 8, tokens)
    chunked = used.total - tokens * memory.LOGITS * model.architecture["vocab_size"]
    assert chunked / 2**30 == pytest.approx(gib, rel=off)


def test_evidence_holds_every_number_unrounded():
    table = json.loads(to_json(TABLE))
    for line in table["lines"]:
        ((key, values),) = line["evidence"].items()
        assert list(values) == list(REAL) and key in ACCOUNTS[0], line["texts"][0]
    size = next(line for line in table["lines"] if line["texts"][0] == "Parameters")
    assert size["evidence"]["parameters"]["llama3_1_70b"] == 70553706496


def test_the_files_are_written_once_and_are_the_same_bytes_again(place: Place):
    computed.write("1", place)
    folder = place.store.results / "tables" / "paper"
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert set(first) == {f"table1.{suffix}" for suffix in ("md", "tex", "json", "svg", "png")}
    computed.write("table1", place)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first
    assert not list((place.store.results / "runs").iterdir()) and not place.store.campaigns()


def test_the_figure_has_a_chart_a_model_and_its_curves_fill_the_whole():
    charts = table1.charts(ACCOUNTS)
    assert [chart.title for chart in charts] == list(REAL)
    for chart in charts:
        assert [curve.name for curve in chart.curves] == list(table1.TERMS.values())
        assert all(
            sum(parts) == pytest.approx(1)
            for parts in zip(*(curve.y for curve in chart.curves), strict=True)
        )
        assert chart.curves[0].x[-1] <= flops.positions(reader.model(chart.title))


REFUSED: dict[str, tuple[Selection, dict[str, Any]]] = {
    "--quick": (Selection("1", quick=True), {}),
    "--full": (Selection("1", full=True), {}),
    "--only": (Selection("1", only="*"), {}),
    "--seeds": (Selection("1", seeds=(0,)), {}),
    "--weights": (Selection("1", weights="random"), {}),
    "--devices": (Selection("1", world_size=2), {}),
    "--adapter": (Selection("1", adapter="/x"), {}),
    "--jobs": (Selection("1"), {"jobs": 2}),
    "--keep": (Selection("1"), {"keep": True}),
    "--scale smoke": (Selection("1"), {"scale": "smoke"}),
    "--scale open": (Selection("1"), {"scale": "open"}),
}


@pytest.mark.parametrize("option", REFUSED)
def test_an_option_that_needs_cells_is_refused_in_one_line(option: str, place: Place):
    selection, asked = REFUSED[option]
    with pytest.raises(UsageError) as raised:
        computed.reproduce(selection, place, campaign.CampaignOptions(**asked))
    assert f"{option} does not apply" in one_line(raised.value) and "table 1" in str(raised.value)
    assert not (place.store.results / "tables" / "paper").exists()


def test_it_has_no_cells_and_says_so(place: Place, capsys: pytest.CaptureFixture[str]):
    for call in (
        lambda: expand(Selection("1"), "paper"),
        lambda: campaign.reproduce(Selection("1"), place, campaign.CampaignOptions("paper")),
    ):
        with pytest.raises(UsageError) as raised:
            call()
        assert "table 1 is computed from the models' sizes: it has no cells" in one_line(
            raised.value
        )
    computed.plan_table(Selection("table1"), place, campaign.CampaignOptions()).show()
    assert capsys.readouterr().out.startswith(
        "Table 1 is computed from the models' sizes: no cell runs."
    )
    assert not (place.store.results / "tables" / "paper").exists()


def test_a_table_needs_cells_at_both_scales_or_is_computed(monkeypatch: pytest.MonkeyPatch):
    read = reader.read_yaml
    for dropped, added in (
        (("smoke",), {}),
        ((), {"computed": read(reader.CONFIGS / "tables" / "table1.yaml")["computed"]}),
    ):
        values = {
            k: v
            for k, v in read(reader.CONFIGS / "tables" / "table3.yaml").items()
            if k not in dropped
        } | added
        monkeypatch.setattr(reader, "read_yaml", lambda _, values=values: values)
        reader.table.cache_clear()
        with pytest.raises(UsageError, match="needs both smoke and paper, or computed alone"):
            reader.table("3")
    monkeypatch.undo()
    reader.table.cache_clear()


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name == "llama3_1_70b" else ()) for name in REAL],
)
def test_a_model_without_storage_has_these_parameters_and_operations(name: str):
    """At full depth, as transformers makes it on the meta device."""
    import torch
    from transformers import AutoModelForCausalLM

    from finrepro.methods.layers.linear import features, linear_layers
    from finrepro.models.build import configuration

    model = reader.model(name)
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(configuration(model))
    assert sum(each.numel() for each in made.parameters()) == of(name)["parameters"]
    layers = linear_layers(made)
    assert len(layers) == depth(model) * len(block_sizes(model))
    assert sum(i * o for i, o in map(features, layers.values())) == of(name)["linear_parameters"]
    assert made.get_output_embeddings().weight.numel() == flops.head_parameters(model)
    assert of(name)["flops"]["forward"] == counted(model, backward=False, tokens=SETTINGS.tokens)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2_127m", "llama3_1_8b"])
def test_a_model_at_full_depth_trains_for_these_operations(name: str):
    model, cost = reader.model(name), of(name)["flops"]
    for key, options in {"full_checkpointed": {"checkpointing": True}, "lora": {"rank": 8}}.items():
        assert cost[key] == counted(model, tokens=SETTINGS.tokens, **options)  # type: ignore[arg-type]
