"""The README.md of an export: what it is, its scores as recorded, and how to load it. Every fact is from result.json or the catalogue."""

import math
from datetime import UTC, datetime
from typing import Any

import yaml

from finrepro.catalogue import reader
from finrepro.errors import UsageError
from finrepro.exporting.layout import Layout, loading_settings, own_base
from finrepro.exporting.recorded import Recorded
from finrepro.exporting.verify import TOLERANCE, Difference
from finrepro.kinds import quantizer_of
from finrepro.settings import plain

LIBRARY = {"peft": "peft", "merged": "transformers", "base": "transformers"}
K5 = {
    "peft": "That is what this export is, put on that base. On a base of another precision, or merged into it, the numbers are others.",
    "merged": "Here the update is added to the weights, which are kept in {dtype}{dequantized}: what was evaluated, up to rounding. "
    "Quantized again, the numbers are others.",
    "base": "The numbers below are those of the base with what was trained on it, which is not part of this export.",
}


def card(
    recorded: Recorded, planned: Layout, apart: Difference, effect: float | None, held: str
) -> str:
    """The text, in Markdown with the hub's YAML in front."""
    parts = [
        f"---\n{yaml.safe_dump(front_matter(recorded, planned), sort_keys=False)}---",
        f"# {recorded.result['label']} ({planned.format})",
        _what(recorded, planned),
        f"## Loading\n\n```python\n{snippet(recorded, planned)}```",
        _loading_notes(recorded, planned, apart, effect, held),
        _scores(recorded, planned),
        _data(recorded),
        _made(recorded),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def front_matter(recorded: Recorded, planned: Layout) -> dict[str, Any]:
    """The hub's fields. No licence: the catalogue knows none of the base's."""
    spec = recorded.spec
    values: dict[str, Any] = (
        {"base_model": spec.model.hub.id} if spec.model.hub and spec.weights == "pretrained" else {}
    )
    hubs = [_dataset(name).config.hub for name in _datasets(recorded) if _dataset(name) is not None]
    if ids := sorted({hub.id for hub in hubs if hub}):
        values["datasets"] = ids
    trained = [] if planned.format == "base" else [spec.adapter.kind]
    tags = [
        "finrepro",
        *trained,
        spec.quantizer.name,
        spec.model.family,
        f"{spec.model.scale}-scale",
    ]
    return values | {
        "library_name": LIBRARY[planned.format],
        "pipeline_tag": "text-generation",
        "tags": tags,
    }


def _what(recorded: Recorded, planned: Layout) -> str:
    spec, cell = recorded.spec, recorded.result["cell"]
    hub = spec.model.hub
    address = f" ({hub.id}, revision {hub.revision or 'not pinned'})" if hub else ""
    lines = [
        f"- run: `{recorded.run_id}`, cell `{recorded.result['label']}`, seed {spec.seed}",
        f"- base: {spec.model.name}{address}"
        + (f"; {reason}" if (reason := planned.why_own or own_base(spec)) else "")
        + f"; its licence is not in the catalogue{': the terms on its page hold' if hub else ''}",
        f"- base stored as: {spec.quantizer.name} ({_settings(spec.quantizer)}), the rest in {spec.model.dtype}",
        f"- adapter: {spec.adapter.name} ({_settings(spec.adapter)})",
        f"- trained on: {cell['train_on']}, {spec.train.max_steps} steps of {spec.train.global_batch_size} examples, "
        f"learning rate {spec.train.lr:g}; on {cell['devices']} device(s) of the kind {cell['device_type'] or 'not recorded'}",
        *(f"- {note}" for note in cell["notes"]),
    ]
    if spec.model.low_rank is not None:
        lines.append(
            "- low-rank: the run's linear layers are B A, of two factors each; here each is the dense layer of their product"
        )
    if spec.model.scale == "smoke":
        text = f"**A smoke result: not to be compared with published ones.** {spec.model.name} is a miniature of {spec.model.miniature_of}."
        lines += ["", text]
    if spec.weights == "random":
        lines += [
            "",
            "**The base has random weights**: this export shows that the path works, and nothing of quality.",
        ]
    if spec.train.short:
        lines += ["", "**Trained too briefly to show quality.**"]
    return "\n".join(lines)


def _settings(choice: Any) -> str:
    return ", ".join(f"{key}: {value}" for key, value in plain(choice).items())


def snippet(recorded: Recorded, planned: Layout) -> str:
    """Python that loads the export, run in its folder, with nothing of this package."""
    spec = recorded.spec
    with_peft = planned.adapter is not None or planned.shift is not None
    quantized = loading_settings(spec) if planned.base is None else {}
    imports = [
        "AutoModelForCausalLM",
        "AutoTokenizer",
        *(["BitsAndBytesConfig"] if quantized else []),
    ]
    lines = ["import torch", *(["from peft import PeftModel"] if with_peft else [])]
    lines += [f"from transformers import {', '.join(imports)}", ""]
    name = spec.model.hub.id if spec.model.hub and planned.base is None else planned.base
    options = [f"dtype=torch.{spec.model.dtype}"]
    if planned.base is None and spec.model.hub and spec.model.hub.revision:
        options.append(f'revision="{spec.model.hub.revision}"')
    if quantized:
        lines += [
            f"quantization = BitsAndBytesConfig({', '.join(f'{key}={value!r}' for key, value in quantized.items())})"
        ]
        options.append("quantization_config=quantization")
    lines += [
        f'base = "{name}"',
        "tokenizer = AutoTokenizer.from_pretrained(base)",
        f"model = AutoModelForCausalLM.from_pretrained(base, {', '.join(options)})",
    ]
    if planned.shift:
        lines.append(
            f'model = PeftModel.from_pretrained(model, "{planned.shift}", adapter_name="shift")  # part of the base'
        )
        if planned.adapter:
            lines.append(f'model.load_adapter("{planned.adapter}", adapter_name="trained")')
            lines.append(
                'model.base_model.set_adapter(["shift", "trained"])  # both: the base alone is a shifted model'
            )
    elif planned.adapter:
        lines.append(f'model = PeftModel.from_pretrained(model, "{planned.adapter}")')
    return "\n".join([*lines, "model.eval()", ""])


def _loading_notes(
    recorded: Recorded, planned: Layout, apart: Difference, effect: float | None, held: str
) -> str:
    versions = recorded.result["environment"].get("packages") or {}
    names = [
        "torch",
        "transformers",
        "peft",
        *(["bitsandbytes"] if loading_settings(recorded.spec) else []),
    ]
    known = ", ".join(f"{name} {versions[name]}" for name in names if versions.get(name))
    lines = [
        f"Run it in this folder{f'; the run was made with {known}' if known else ''}. All tensors are safetensors."
    ]
    if planned.shift:
        lines.append(
            "The base's layers are bitsandbytes' own with W - tau; `shift` is the LoRA that adds tau back. It is as much a part of the "
            "base as its codes: without it every weight is another."
        )
    model = "base" if planned.format == "base" else "model"
    moved = (
        f" What was trained moves them by {effect:.2g} of their length."
        if effect is not None
        else ""
    )
    lines.append(
        f"Checked when it was exported: loaded this way it gives the logits of the run's {model}, to {apart.relative:.2g} of their length "
        f"(allowed: {TOLERANCE[recorded.spec.model.dtype]:g}; largest difference {apart.largest:.2g}).{moved}"
        + (f" {held[0].upper()}{held[1:]}." if held else "")
    )
    if loading_settings(recorded.spec).get("load_in_4bit") and planned.format != "merged":
        lines.append(
            "On a CPU with AVX512-BF16, bitsandbytes repacks 4-bit layers at the first call without gradients and computes in bfloat16, "
            "whatever the dtype. The comparison was made without that: `support_avx512bf16_for_cpu = False` on each of its layers."
        )
    return "\n\n".join(lines)


def _scores(recorded: Recorded, planned: Layout) -> str:
    spec, found = recorded.spec, recorded.result["scores"]
    dequantized = ", dequantized first" if quantizer_of(spec.quantizer).weight else ""
    trained = (
        "The whole model was evaluated as trained"
        if recorded.is_whole_model
        else "Evaluated not merged"
    )
    base = (
        f"on the base as {spec.quantizer.name} stores it"
        if spec.quantizer.kind != "none"
        else f"in {spec.model.dtype}"
    )
    said = (
        "That is this export."
        if recorded.is_whole_model and planned.format == "merged"
        else K5[planned.format]
    )
    text = f"{trained}, {base}. {said.format(dtype=spec.model.dtype, dequantized=dequantized)}"
    if not found:
        return f"## Scores\n\nNone: this run was not scored. {text}"
    level = f"{spec.evaluation.confidence:.0%}"
    rows = [
        "| task | metric | value | interval | rows | best constant answer |",
        "|---|---|---|---|---|---|",
    ]
    rows += [
        f"| {each['task']} | {each['metric']} | {_number(each['value'])} | {_number(each['low'])} to {_number(each['high'])} "
        f"| {each['n']} | {_number(each['constant'])} |"
        for each in found
    ]
    split = f"Split: {spec.evaluation.split}; bootstrap intervals of {level}, over rows and not over seeds."
    return "\n".join(["## Scores", "", text, "", *rows, "", split])


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.4f}" if math.isfinite(value) else str(value)


def _datasets(recorded: Recorded) -> list[str]:
    return sorted(recorded.result["data"].get("fingerprints") or {})


def _dataset(name: str) -> Any:
    """The catalogue's entry; None when it is gone."""
    try:
        return reader.dataset(name)
    except UsageError:
        return None


def _data(recorded: Recorded) -> str:
    lines = ["## Data", ""]
    for name in _datasets(recorded):
        entry = _dataset(name)
        title = (
            f"{entry.config.title}; licence: {entry.config.licence}"
            if entry
            else "no longer in the catalogue"
        )
        lines.append(f"- {name}: {title}")
        files = (recorded.result["data"].get("files") or {}).get(name) or {}
        lines += [f"  - {role}: sha256 `{digest}`" for role, digest in sorted(files.items())]
    return "\n".join(lines) if len(lines) > 2 else ""


def _made(recorded: Recorded) -> str:
    made = recorded.result["environment"]
    commit = f"commit `{made['git_commit']}`" if made.get("git_commit") else "commit not recorded"
    ended = datetime.fromtimestamp(recorded.result["ended"], UTC).strftime("%Y-%m-%d")
    lines = [
        "## Made by",
        "",
        f"finrepro, {commit}{' with changes' if made.get('git_dirty') else ''}, source `{made['source_digest']}`, "
        f"lock `{made['lock_digest'] or 'none'}`, on {ended}.",
        "`manifest.sha256` lists this folder's files: `sha256sum -c manifest.sha256`.",
    ]
    return "\n".join(lines)
