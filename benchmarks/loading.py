"""Loading a sharded checkpoint into NF4, part by part against whole: peak resident memory and
seconds, each in processes of their own.

Plain Transformers writes a random Llama in bf16, in shards. `streamed` is what a run does; `whole`
is `from_pretrained`, then every layer quantized. Both must store the same bits. Peaks are counted
above what the process held before, so that imports do not blur them; mapped pages of the files
count as memory here, as the kernel counts them, though it can drop them at any time.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from finrepro.kinds import kind_module
from finrepro.runtime import memory, process

process.quiet_environment()

import torch  # noqa: E402
from _measure import DRY_OPTION, sized, write  # noqa: E402

from finrepro.catalogue import reader  # noqa: E402
from finrepro.models import build, loading  # noqa: E402

ARCHITECTURE = {
    "vocab_size": sized(32000, 128),
    "hidden_size": sized(1536, 64),
    "intermediate_size": sized(4096, 128),
    "num_hidden_layers": sized(24, 2),
    "num_attention_heads": sized(16, 4),
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
SHARD, REPEATS, MIB = sized("250MB", "50KB"), sized(3, 1), 2**20
WARM_UP_ROUNDS = sized(1, 0)
WAYS, CHILD = ("streamed", "whole"), "--child"


def configuration() -> Any:
    """The Llama that is loaded."""
    from transformers import AutoConfig

    return AutoConfig.for_model("llama", **ARCHITECTURE)


def write_checkpoint(folder: Path) -> dict[str, Any]:
    """Random weights in shards, written by Transformers alone; what lies on the disk."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(configuration(), dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size=SHARD)
    sizes = [path.stat().st_size for path in sorted(folder.glob("*.safetensors"))]
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "shard_bytes": sizes,
        "architecture": ARCHITECTURE,
    }


def resident(key: str) -> int:
    """A line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def streamed(folder: Path, quantizer: Any) -> tuple[Any, int]:
    """As a run loads it."""
    model = loading.skeleton(configuration(), torch.bfloat16)
    source = loading.Checkpoint(model, folder, "the benchmark's Llama")
    return model, loading.stream(model, source, quantizer, torch.device("cpu"))


def quantized_at_the_end(folder: Path, quantizer: Any) -> tuple[Any, int]:
    """All of it first, then the quantizer."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    build.quantize(model, quantizer)
    return model, 0


def child(way: str, folder: Path) -> None:
    """Load once and print what it took."""
    process.setup(0, 2)
    quantizer = reader.quantizer("nf4", "bfloat16")
    kind_module("quantizers", quantizer.kind).encode(
        torch.zeros(64, 64), quantizer.config
    )  # its library is loaded before the count begins
    configuration()
    import accelerate  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    before, anonymous, loaded = resident("VmRSS"), resident("RssAnon"), threading.Event()
    highest = [anonymous]

    def watch() -> None:
        while not loaded.wait(0.002):
            highest.append(resident("RssAnon"))

    memory.reset_peak_memory(torch.device("cpu"))
    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    load = {"streamed": streamed, "whole": quantized_at_the_end}[way]
    model, stored = load(folder, quantizer)
    seconds = time.perf_counter() - began
    peak = resident("VmHWM")
    loaded.set()
    watcher.join()
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    print(
        json.dumps(
            {
                "seconds": seconds,
                "peak_bytes": peak - before,
                "peak_anonymous_bytes": max(highest) - anonymous,
                "stored_bytes": stored,
                "sha256": digest.hexdigest(),
            }
        )
    )


def main() -> None:
    """Both ways in turn, a warm-up round first."""
    raw: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = write_checkpoint(folder)
        for turn in range(WARM_UP_ROUNDS + REPEATS):
            for way in WAYS:
                child_process = subprocess.run(
                    [sys.executable, __file__, CHILD, way, name, *DRY_OPTION],
                    env=os.environ,
                    capture_output=True,
                    text=True,
                    check=True,
                )
                if turn >= WARM_UP_ROUNDS:
                    raw[way].append(json.loads(child_process.stdout.splitlines()[-1]))
    assert len({load["sha256"] for way in WAYS for load in raw[way]}) == 1, (
        "the two ways store different bits"
    )
    stored = raw["streamed"][0]["stored_bytes"]
    summary: dict[str, Any] = {
        "checkpoint_mib": round(sum(checkpoint["shard_bytes"]) / MIB),
        "largest_shard_mib": round(max(checkpoint["shard_bytes"]) / MIB),
        "stored_mib": round(stored / MIB),
    }
    for way in WAYS:
        for key in ("peak_bytes", "peak_anonymous_bytes"):
            highest = max(load[key] for load in raw[way])
            summary[f"{way}_{key.removesuffix('_bytes')}_mib"] = round(highest / MIB)
        summary[f"{way}_seconds"] = [round(load["seconds"], 2) for load in raw[way]]
    write("loading", {"checkpoint": checkpoint, "repeats": REPEATS, "raw": raw, "summary": summary})


if __name__ == "__main__":
    if sys.argv[1:2] == [CHILD]:
        child(sys.argv[2], Path(sys.argv[3]))
    else:
        main()
