"""Which folders an export has. By default what a run has trained is a PEFT folder for the base that
everybody gets from the hub; a method's contract (`finrepro.contracts`) may give another one.
"""

from dataclasses import dataclass
from typing import Any

from finrepro.catalogue.spec import RunSpec
from finrepro.kinds import adapter_of, quantizer_of


@dataclass(frozen=True)
class ExportLayout:
    """The folders within an export; `.` is the export itself, None that there is no such thing
    in it.
    """

    format: str
    adapter: str | None = None
    base: str | None = None  # a Transformers checkpoint
    shift: str | None = None  # a frozen LoRA that belongs to the base
    why_own: str | None = None  # why the base goes along

    @property
    def base_is_elsewhere(self) -> bool:
        """Whether whoever loads it takes the base from the hub."""
        return self.base is None


def layout_of(spec: RunSpec, export_format: str) -> ExportLayout:
    """The folders of a run's export in the format `export_format`."""
    if export_format == "merged":
        return ExportLayout(export_format, base=".")
    has_shift = bool(quantizer_of(spec.quantizer).BESIDE)
    why = own_base(spec)
    if export_format == "base":
        return (
            ExportLayout(export_format, base="base", shift="shift", why_own=why)
            if has_shift
            else ExportLayout(export_format, base=".")
        )
    if why is None:
        return ExportLayout(export_format, adapter=".")
    return ExportLayout(
        export_format,
        adapter="adapter",
        base="base",
        shift="shift" if has_shift else None,
        why_own=why,
    )


def own_base(spec: RunSpec) -> str | None:
    """Why the base that a run was trained on is not what everybody gets from the hub; None if it
    is.
    """
    if reason := changed_base(spec):
        return reason
    if reason := quantizer_of(spec.quantizer).own_base():
        return reason
    if spec.weights == "random":
        return f"its weights are random, drawn from seed {spec.seed}"
    if spec.weights == "scratch":
        return f"it is the model's initialisation, drawn from seed {spec.seed}"
    if spec.base_run is not None:
        return f"it was trained here, in run {spec.base_run}, and is on no hub"
    if (package := spec.model.package) is not None:
        return (
            f"its weights are decoded from {package.linear} in the package {package.project} "
            f"{package.version}, and are on no hub"
        )
    return None


def changed_base(spec: RunSpec) -> str | None:
    """Why the adapter's method left another base than the quantizer made; None if it did not."""
    return adapter_of(spec.adapter).own_base(spec.quantizer)


def loading_settings(spec: RunSpec) -> dict[str, Any]:
    """Arguments of Transformers' BitsAndBytesConfig for the run's base, dtypes by name; empty
    for a base that is not quantized.
    """
    return quantizer_of(spec.quantizer).loading()
