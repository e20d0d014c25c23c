"""Loading an export as anybody would, with Transformers and PEFT alone, and holding its logits
against the run's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finrepro.catalogue.spec import RunSpec
from finrepro.errors import FinreproError
from finrepro.exporting.layout import ExportLayout, loading_settings
from finrepro.exporting.rebuild import logits, quiet_peft

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}  # of the logits' length


class NotEqual(FinreproError):
    """What was written does not compute what the run computes."""


@dataclass(frozen=True)
class Difference:
    """`largest` between two logits, and the longest distance over a prompt as a share of the
    run's `relative`.
    """

    largest: float
    relative: float


def reload(
    spec: RunSpec,
    written: Path,
    layout: ExportLayout,
    base: Path | None,
    device: torch.device,
    prompts: Sequence[Sequence[int]],
) -> list[Tensor]:
    """The logits of the exported model, as `load` gives it. Raises `NotEqual` when the libraries
    cannot load it or compute with it.
    """
    try:
        return logits(load(spec, written, layout, base, device), prompts)
    except FinreproError:
        raise
    except Exception as error:  # whatever they raise: the export is of no use to anybody
        lines = str(error).strip().splitlines() or [""]
        raise NotEqual(
            "Transformers and PEFT cannot use what was written, nothing is kept: "
            f"{type(error).__name__}: {lines[0]}"
        ) from error


def load(
    spec: RunSpec, written: Path, layout: ExportLayout, base: Path | None, device: torch.device
) -> Any:
    """The exported model through the public loaders; `base` is where the hub's checkpoint lies, for
    an export without one.

    It raises what the loaders raise, and `NotEqual` when they make up weights or leave some over.
    """
    import peft
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {"dtype": getattr(torch, spec.model.dtype), "device_map": str(device)}
    if layout.base_is_elsewhere and (settings := loading_settings(spec)):
        options["quantization_config"] = BitsAndBytesConfig(**settings)
    checkpoint = base if layout.base is None else written / layout.base
    model, loading_info = AutoModelForCausalLM.from_pretrained(
        checkpoint,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
        **options,
    )
    for kind in ("missing_keys", "mismatched_keys") if layout.base_is_elsewhere else loading_info:
        if loading_info.get(kind):
            raise NotEqual(
                f"Transformers reports {kind.replace('_', ' ')}: "
                f"{sorted(map(str, loading_info[kind]))[:2]}."
            )
    with quiet_peft():
        if layout.shift:
            model = peft.PeftModel.from_pretrained(
                model, written / layout.shift, adapter_name="shift"
            )
            if layout.adapter:
                model.load_adapter(written / layout.adapter, adapter_name="trained")
                model.base_model.set_adapter(["shift", "trained"])
        elif layout.adapter:
            model = peft.PeftModel.from_pretrained(model, written / layout.adapter)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes' inference on CPUs with AVX512-BF16 computes in bfloat16 whatever was
            # asked for, and repacks the codes to do so.
            module.support_avx512bf16_for_cpu = False
    return model.eval()


def difference(expected: Sequence[Tensor], computed: Sequence[Tensor]) -> Difference:
    """Between the logits of the same prompts."""
    largest, relative = 0.0, 0.0
    for reference, exported in zip(expected, computed, strict=True):
        if reference.shape != exported.shape or not torch.isfinite(exported).all():
            return Difference(float("inf"), float("inf"))
        error = (reference - exported).double()
        largest = max(largest, float(error.abs().max()))
        relative = max(relative, float(error.norm() / reference.double().norm()))
    return Difference(largest, relative)


def check(spec: RunSpec, expected: Sequence[Tensor], computed: Sequence[Tensor]) -> Difference:
    """The difference; raises `NotEqual` when it is more than the run's dtype explains."""
    distance, allowed = difference(expected, computed), TOLERANCE[spec.model.dtype]
    if not distance.relative <= allowed:
        raise NotEqual(
            "what was written does not compute what the run computes: logits differ by up to "
            f"{distance.largest:.3g}, {distance.relative:.3g} of their length, allowed is "
            f"{allowed:g}; nothing is kept."
        )
    return distance
