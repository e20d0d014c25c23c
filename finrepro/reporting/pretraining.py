"""Facts of a pretraining cell that need no run: parameters, bytes and FLOPs a token, against the
dense model's.
"""

import dataclasses
from typing import Any

from finrepro.catalogue import footprint, reader
from finrepro.catalogue.compatibility import unstorable
from finrepro.catalogue.spec import Model, RunSpec
from finrepro.sizes import flops
from finrepro.sizes.shapes import rank

STORED = ("none", "int8", "nf4")  # 16, 8 and 4 bits
CONVENTIONS: tuple[flops.Convention, ...] = ("palm", "causal")


def facts(spec: RunSpec) -> dict[str, Any]:
    """Parameters, compression against the model that the entry names in `compared_with`, bytes
    stored at 16, 8 and 4 bits (scales, embeddings and head as they really are), FLOPs a trained
    token by both conventions, how many times fewer they are, and
    the text that the loss is of."""
    model, dense, length = spec.model, reference(spec.model), spec.train.max_seq_len
    dense_flops, model_flops = (
        flops.model_flops(entry, length, "palm") for entry in (dense, model)
    )
    return {
        "parameters": model.parameters,
        "reference": dense.name,
        "compression": dense.parameters / model.parameters,
        "stored_bytes": {name: _bytes(spec, name) for name in STORED},
        "flops_per_token": {name: flops.model_flops(model, length, name) for name in CONVENTIONS},
        "flop_bound": dense_flops / model_flops,
        "rank": rank(model) if model.low_rank else None,
        "scored_on": list(dict.fromkeys(task.dataset.config.title for task in spec.tasks)),
    }


def reference(model: Model) -> Model:
    """The dense model that an entry is compared with: itself, unless it names another."""
    return reader.model(model.compared_with) if model.compared_with else model


def _bytes(spec: RunSpec, quantizer: str) -> int | None:
    """Stored bytes of the model in 16 bits, whatever dtype the miniature runs in, with its blocks'
    linear layers quantized; None where the quantizer cannot store them.
    """
    model = dataclasses.replace(spec.model, dtype="bfloat16")
    choice = reader.quantizer(quantizer, "bfloat16")
    if unstorable(model, choice, 0):
        return None
    return footprint.base_bytes(dataclasses.replace(spec, model=model, quantizer=choice))
