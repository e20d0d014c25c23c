"""The README.md of an export: what it is, its scores as recorded, and how to load it. Every fact
is from result.json or the catalogue.
"""

import math
from datetime import UTC, datetime
from typing import Any

from finrepro.catalogue.spec import RunSpec
from finrepro.exporting.layout import ExportLayout, loading_settings, own_base
from finrepro.exporting.metadata import data_names, dataset_entry, front_matter
from finrepro.exporting.recorded import RecordedRun
from finrepro.exporting.verify import TOLERANCE, Difference
from finrepro.kinds import quantizer_of
from finrepro.settings import plain

# On which precision the numbers hold: they were measured on the base as it was quantized.
PRECISION_NOTES = {
    "peft": (
        "That is what this export is, put on that base. On a base of another precision, or "
        "merged into it, the numbers are others."
    ),
    "merged": (
        "Here the update is added to the weights, which are kept in {dtype}{dequantized}: "
        "what was evaluated, up to rounding. Quantized again, the numbers are others."
    ),
    "base": (
        "The numbers below are those of the base with what was trained on it, which is not "
        "part of this export."
    ),
}


def model_card(
    recorded: RecordedRun,
    planned: ExportLayout,
    difference: Difference,
    effect: float | None,
    answers_note: str,
) -> str:
    """The text, in Markdown with the hub's YAML in front."""
    parts = [
        f"---\n{front_matter(recorded, planned)}\n---",
        f"# {recorded.result['label']} ({planned.format})",
        _what(recorded, planned),
        f"## Loading\n\n```python\n{snippet(recorded, planned)}```",
        _loading_notes(recorded, planned, difference, effect, answers_note),
        _scores(recorded, planned),
        _data(recorded),
        _made(recorded),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _licence(spec: RunSpec) -> str:
    if spec.model.package:
        return f"its licence is {spec.model.package.licence}"
    terms = ": the terms on its page hold" if spec.model.hub else ""
    return f"its licence is not in the catalogue{terms}"


def _what(recorded: RecordedRun, planned: ExportLayout) -> str:
    spec, cell = recorded.spec, recorded.result["cell"]
    hub = spec.model.hub
    address = f" ({hub.id}, revision {hub.revision or 'not pinned'})" if hub else ""
    lines = [
        f"- run: `{recorded.run_id}`, cell `{recorded.result['label']}`, seed {spec.seed}",
        f"- base: {spec.model.name}{address}"
        + (f"; {reason}" if (reason := planned.why_own or own_base(spec)) else "")
        + f"; {_licence(spec)}",
        f"- base stored as: {spec.quantizer.name} ({_settings(spec.quantizer)}), the rest in "
        f"{spec.model.dtype}",
        f"- adapter: {spec.adapter.name} ({_settings(spec.adapter)})",
        f"- trained on: {cell['train_on']}, {spec.train.max_steps} steps of "
        f"{spec.train.global_batch_size} examples, "
        f"learning rate {spec.train.lr:g}; on {cell['devices']} device(s) of the kind "
        f"{cell['device_type'] or 'not recorded'}",
        *(f"- {note}" for note in cell["notes"]),
    ]
    if spec.model.low_rank is not None:
        lines.append(
            "- low-rank: the run's linear layers are B A, of two factors each; here each is "
            "the dense layer of their product"
        )
    if spec.model.scale == "smoke":
        text = "**A smoke result: not to be compared with published ones.**"
        lines += ["", f"{text} {spec.model.name} is a miniature of {spec.model.miniature_of}."]
    if spec.model.scale == "open":
        lines += ["", "**A result at open scale: not to be compared with the paper's.**"]
    if spec.weights == "random":
        lines += [
            "",
            "**The base has random weights**: this export shows that the path works, and "
            "nothing of quality.",
        ]
    if spec.train.short:
        lines += ["", "**Trained too briefly to show quality.**"]
    return "\n".join(lines)


def _settings(choice: Any) -> str:
    return ", ".join(f"{key}: {value}" for key, value in plain(choice).items())


def snippet(recorded: RecordedRun, planned: ExportLayout) -> str:
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
        arguments = ", ".join(f"{key}={value!r}" for key, value in quantized.items())
        lines.append(f"quantization = BitsAndBytesConfig({arguments})")
        options.append("quantization_config=quantization")
    lines += [
        f'base = "{name}"',
        "tokenizer = AutoTokenizer.from_pretrained(base)",
        f"model = AutoModelForCausalLM.from_pretrained(base, {', '.join(options)})",
    ]
    if planned.shift:
        lines.append(
            f'model = PeftModel.from_pretrained(model, "{planned.shift}", adapter_name="shift")'
            "  # part of the base"
        )
        if planned.adapter:
            lines.append(f'model.load_adapter("{planned.adapter}", adapter_name="trained")')
            lines.append(
                'model.base_model.set_adapter(["shift", "trained"])'
                "  # both: the base alone is a shifted model"
            )
    elif planned.adapter:
        lines.append(f'model = PeftModel.from_pretrained(model, "{planned.adapter}")')
    if _is_4_bit(recorded, planned):
        lines += [
            "for module in model.modules():  # see below: some CPUs repack layers of 4 bits",
            '    if hasattr(module, "support_avx512bf16_for_cpu"):',
            "        module.support_avx512bf16_for_cpu = False",
        ]
    return "\n".join([*lines, "model.eval()", ""])


def _is_4_bit(recorded: RecordedRun, planned: ExportLayout) -> bool:
    """Whether the layers that are loaded are bitsandbytes' of 4 bits."""
    return bool(loading_settings(recorded.spec).get("load_in_4bit")) and planned.format != "merged"


def _loading_notes(
    recorded: RecordedRun,
    planned: ExportLayout,
    difference: Difference,
    effect: float | None,
    answers_note: str,
) -> str:
    versions = recorded.result["environment"].get("packages") or {}
    names = [
        "torch",
        "transformers",
        "peft",
        *(["bitsandbytes"] if loading_settings(recorded.spec) else []),
    ]
    packages = ", ".join(f"{name} {versions[name]}" for name in names if versions.get(name))
    lines = [
        f"Run it in this folder{f'; the run was made with {packages}' if packages else ''}. "
        "All tensors are safetensors."
    ]
    if planned.shift:
        lines.append(
            "The base's layers are bitsandbytes' own with W - tau; `shift` is the LoRA that "
            "adds tau back. It is as much a part of the "
            "base as its codes: without it every weight is another."
        )
    model = "base" if planned.format == "base" else "model"
    moved = (
        f" What was trained moves them by {effect:.2g} of their length."
        if effect is not None
        else ""
    )
    lines.append(
        "Checked when it was exported: loaded this way it gives the logits of the run's "
        f"{model}, to {difference.relative:.2g} of their length "
        f"(allowed: {TOLERANCE[recorded.spec.model.dtype]:g}; largest difference "
        f"{difference.largest:.2g}).{moved}"
        + (f" {answers_note[0].upper()}{answers_note[1:]}." if answers_note else "")
    )
    if _is_4_bit(recorded, planned):
        lines.append(
            "On a CPU with AVX512-BF16, bitsandbytes repacks 4-bit layers at the first call "
            "without gradients and computes in bfloat16, whatever the dtype; DoRA's norms, merging "
            "and training then read the repacked codes as if they were the weights. The loop "
            "switches that off, as it was for the comparison; elsewhere it changes nothing."
        )
    if planned.adapter:
        lines.append(
            "Load the adapter with PEFT's `PeftModel`, as above. Transformers' own "
            "`model.load_adapter` and PEFT's conversion `save_as_lora` leave out what is beside A "
            "and B, such as DoRA's magnitudes, and give another model, or refuse."
        )
    if planned.base is not None:
        lines.append("Written for Transformers 4.57 and 5 alike.")
    return "\n\n".join(lines)


def _scores(recorded: RecordedRun, planned: ExportLayout) -> str:
    spec, scores = recorded.spec, recorded.result["scores"]
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
    precision = (
        "That is this export."
        if recorded.is_whole_model and planned.format == "merged"
        else PRECISION_NOTES[planned.format]
    )
    text = f"{trained}, {base}. {precision.format(dtype=spec.model.dtype, dequantized=dequantized)}"
    if not scores:
        return f"## Scores\n\nNone: this run was not scored. {text}"
    level = f"{spec.evaluation.confidence:.0%}"
    rows = [
        "| task | metric | value | interval | rows | best constant answer |",
        "|---|---|---|---|---|---|",
    ]
    rows += [
        f"| {score['task']} | {score['metric']} | {_number(score['value'])} | "
        f"{_number(score['low'])} to {_number(score['high'])} "
        f"| {score['n']} | {_number(score['constant'])} |"
        for score in scores
    ]
    split = (
        f"Split: {spec.evaluation.split}; bootstrap intervals of {level}, "
        "over rows and not over seeds."
    )
    return "\n".join(["## Scores", "", text, "", *rows, "", split])


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.4f}" if math.isfinite(value) else str(value)


def _data(recorded: RecordedRun) -> str:
    lines = ["## Data", ""]
    for name in data_names(recorded):
        entry = dataset_entry(name)
        title = (
            f"{entry.config.title}; licence: {entry.config.licence}"
            if entry
            else "no longer in the catalogue"
        )
        lines.append(f"- {name}: {title}")
        files = (recorded.result["data"].get("files") or {}).get(name) or {}
        lines += [f"  - {role}: sha256 `{digest}`" for role, digest in sorted(files.items())]
    return "\n".join(lines) if len(lines) > 2 else ""


def _made(recorded: RecordedRun) -> str:
    environment = recorded.result["environment"]
    commit = (
        f"commit `{environment['git_commit']}`"
        if environment.get("git_commit")
        else "commit not recorded"
    )
    ended = datetime.fromtimestamp(recorded.result["ended"], UTC).strftime("%Y-%m-%d")
    lines = [
        "## Made by",
        "",
        f"finrepro, {commit}{' with changes' if environment.get('git_dirty') else ''}, source "
        f"`{environment['source_digest']}`, "
        f"lock `{environment['lock_digest'] or 'none'}`, on {ended}.",
        "`manifest.sha256` lists this folder's files: `sha256sum -c manifest.sha256`.",
    ]
    return "\n".join(lines)
