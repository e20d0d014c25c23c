"""GPUs as configs/hardware.yaml gives them: peak, measured matrix products, memory, price, each
with its source or absent. No torch.
"""

from functools import cache

from finrepro.catalogue.reader import entry
from finrepro.errors import UsageError
from finrepro.settings import Positive, PositiveFloat, build, settings

NUMBERS = ("peak_bf16", "matmul_bf16", "bandwidth", "memory_bytes", "price")


@settings
class Gpu:
    """One GPU. FLOP/s are dense bfloat16, bandwidth is bytes/s, price US dollars an hour; None
    where no source was read.
    """

    name: str
    title: str
    peak_bf16: PositiveFloat | None
    matmul_bf16: PositiveFloat | None
    bandwidth: PositiveFloat | None
    memory_bytes: Positive | None
    price: PositiveFloat | None
    sources: dict[str, str]

    def __post_init__(self) -> None:
        """Raises `ValueError` for a number without a source, or a source without its number."""
        numbers = {field for field in NUMBERS if getattr(self, field) is not None}
        if numbers != set(self.sources):
            raise ValueError(
                f"sources must be given for exactly {', '.join(sorted(numbers)) or 'nothing'}"
            )

    def require(self, field: str) -> float:
        """A number of the GPU that a caller cannot do without. Raises `UsageError` where it is
        null.
        """
        value = getattr(self, field)
        if value is None:
            raise UsageError(
                f"hardware.{self.name}.{field}: no source was read for it; "
                "enter it with its source."
            )
        return float(value)

    @property
    def rate(self) -> float:
        """FLOP/s that a large matrix product reaches: measured, or else the peak."""
        return self.matmul_bf16 or self.require("peak_bf16")


@cache
def gpu(name: str) -> Gpu:
    """A resolved entry of hardware.yaml. Raises `UsageError` with the nearest match for an
    unknown one.
    """
    return build(Gpu, {"name": name, **entry("hardware", name, "GPU")}, f"hardware.{name}")
