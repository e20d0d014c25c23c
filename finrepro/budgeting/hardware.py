"""GPUs as configs/hardware.yaml gives them: peak, measured matrix products, memory, price, each
with its source or absent. No torch.
"""

from functools import cache

from finrepro.catalogue.reader import catalogue, entry
from finrepro.errors import UsageError
from finrepro.settings import Positive, PositiveFloat, build, settings

NUMBERS = ("peak_bf16", "matmul_bf16", "bandwidth", "memory_bytes", "price")


@settings
class Hardware:
    """One GPU. FLOP/s are dense bfloat16, bandwidth is bytes/s, price US dollars an hour; None
    where no source was read.
    """

    name: str
    title: str
    names: tuple[str, ...]
    peak_bf16: PositiveFloat | None
    matmul_bf16: PositiveFloat | None
    bandwidth: PositiveFloat | None
    memory_bytes: Positive | None
    price: PositiveFloat | None
    sources: dict[str, str]

    def __post_init__(self) -> None:
        """Raises `ValueError` for a number without a source, or a source without its number."""
        known = {each for each in NUMBERS if getattr(self, each) is not None}
        if known != set(self.sources):
            raise ValueError(
                f"sources must be given for exactly {', '.join(sorted(known)) or 'nothing'}"
            )

    def known(self, number: str) -> float:
        """A number of the GPU. Raises `UsageError` where it is null."""
        value = getattr(self, number)
        if value is None:
            raise UsageError(
                f"hardware.{self.name}.{number}: no source was read for it; enter it with its source."
            )
        return float(value)

    @property
    def rate(self) -> float:
        """FLOP/s that a large matrix product reaches: measured, or else the peak."""
        return self.matmul_bf16 or self.known("peak_bf16")


@cache
def hardware(name: str) -> Hardware:
    """A resolved entry of hardware.yaml. Raises `UsageError` with the nearest match for an
    unknown one.
    """
    return build(Hardware, {"name": name, **entry("hardware", name, "GPU")}, f"hardware.{name}")


def of_card(card: str) -> Hardware | None:
    """The entry of a card by what nvidia-smi calls it, None where there is none."""
    entries = (hardware(name) for name in catalogue("hardware"))
    return next((each for each in entries if any(part in card for part in each.names)), None)
