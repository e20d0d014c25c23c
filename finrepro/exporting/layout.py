"""Which folders an export has. By default what a run has trained is a PEFT folder for the base that
everybody gets from the hub.

A method may say otherwise, by optional names of its module:

- adapters and quantizers: `NOT_EXPORTED`, format -> why it is refused;
- quantizers: `loading(config)`, Transformers' settings under which it makes or reads such layers;
  `own_base(config)`, why that gives another base than the run's; `weight(layer)`, the (out, in)
  that a layer stands for; `BESIDE`, the names of a layer's tensors that only this package reads,
  where its method `as_frozen_lora()` gives (A, B) of what it adds to the layer that Transformers
  makes;
- adapters: `own_base(quantizer, config)`, why `apply` leaves another base, on which its export
  stands, or on which `on_own_base(weights, folder)` makes it stand; `read(model, folder)`, which
  puts the export on the base; `merge(model, folder)`, which puts it into the weights;
  `WHOLE_MODEL`, that the export is a model by itself.
"""

from dataclasses import dataclass
from typing import Any

from finrepro.catalogue.spec import RunSpec


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
    has_shift = hasattr(spec.quantizer.module("quantizers"), "BESIDE")
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
    quantizer_reason = getattr(spec.quantizer.module("quantizers"), "own_base", None)
    if quantizer_reason and (reason := quantizer_reason(spec.quantizer.config)):
        return str(reason)
    if spec.weights == "random":
        return f"its weights are random, drawn from seed {spec.seed}"
    if spec.weights == "scratch":
        return f"it is the model's initialisation, drawn from seed {spec.seed}"
    if spec.base_run is not None:
        return f"it was trained here, in run {spec.base_run}, and is on no hub"
    return None


def changed_base(spec: RunSpec) -> str | None:
    """Why the adapter's method left another base than the quantizer made; None if it did not."""
    adapter_reason = getattr(spec.adapter.module("adapters"), "own_base", None)
    return adapter_reason(spec.quantizer, spec.adapter.config) if adapter_reason else None


def loading_settings(spec: RunSpec) -> dict[str, Any]:
    """Arguments of Transformers' BitsAndBytesConfig for the run's base, dtypes by name; empty
    for a base that is not quantized.
    """
    loading = getattr(spec.quantizer.module("quantizers"), "loading", None)
    return dict(loading(spec.quantizer.config)) if loading else {}
