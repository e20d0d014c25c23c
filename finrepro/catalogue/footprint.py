"""What of a cell's costs follows from its architecture alone, without a run."""

from finrepro.catalogue.spec import RunSpec
from finrepro.kinds import adapter_of
from finrepro.sizes import memory


def base_bytes(spec: RunSpec) -> int:
    """Bytes of the base as it is stored, quantization constants included: exact, from the
    architecture.
    """
    return memory.stored_bytes(spec.model, spec.quantizer)


def sizes(spec: RunSpec) -> dict[str, int]:
    """What of a cell's costs needs no run: trained parameters, bytes of the base, and of the
    numbers in the file that training writes.

    The file has a header besides, about a hundred bytes a tensor. A whole model is written in its
    own dtype, an adapter in float32.
    """
    method, bits = adapter_of(spec.adapter), 16 if spec.model.dtype == "bfloat16" else 32
    numbers = method.exported_parameters(spec.model, spec.train.max_steps)
    width = bits // 8 if method.WHOLE_MODEL else 4
    return {
        "total_params": spec.model.parameters,
        "trainable_params": method.trainable_parameters(spec.model),
        "base_bytes": base_bytes(spec),
        "trained_file_bytes": numbers * width,
    }
