"""The model and the tokenizer of a finished run, for whoever goes on with them in Python."""

import logging
import os
from typing import TYPE_CHECKING, Any

from finrepro.errors import EnvironmentFault, UsageError
from finrepro.evidence.place import Place
from finrepro.exporting.recorded import find_run
from finrepro.kinds import adapter_of
from finrepro.runtime import process

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def load_run(run_id: str, place: Place) -> tuple[Any, "PreTrainedTokenizerFast"]:
    """A run's model, frozen and ready to be asked, on the GPU where there is one; and its
    tokenizer.

    It is made again as for an export: its base as the run stored it, quantized where it was, and
    what the run trained on top. Threads and seeds of this process become the run's, and its kernels
    deterministic. Raises `UsageError` for a run that is not there or not done, `EnvironmentFault`
    where its base or its weights are not what the run recorded.
    """
    result = place.store.result(run_id) or {}
    if result.get("spec", {}).get("adapter", {}).get("kind") == "peft_folder":
        raise UsageError(
            f"run {run_id} ({result['label']}) scored an adapter made elsewhere: load its own "
            "folder with PEFT."
        )
    recorded = find_run(place.store, run_id, None)
    spec = recorded.spec
    has_weights = any(recorded.weights.glob("*.safetensors"))
    if adapter_of(spec.adapter).trainable_parameters(spec.model) and not has_weights:
        raise EnvironmentFault(f"run {run_id} ({spec.label}) has no weights in {recorded.weights}.")
    process.quiet_environment()
    device = process.setup(spec.seed, spec.threads)
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # Transformers imports DeepSpeed
    logging.getLogger("bitsandbytes").setLevel("ERROR")  # a notice at each int8 layer
    from finrepro.exporting import rebuild

    with rebuild.on_its_base(recorded) as run:
        start = rebuild.starting_point(run, place, "peft" if has_weights else "base")
        base = None if run.is_whole_model else rebuild.base_model(run, start, device)
        model = rebuild.trained_model(run, base, device) if has_weights else base
    return model, start.tokenizer
