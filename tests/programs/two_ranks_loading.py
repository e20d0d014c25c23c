"""One of two ranks: loads and trains a tiny cell at ZeRO stage 3 and at stage 0, and writes down
what it held and the losses. A program of test_loading.py and test_first_stage.py, started by
torchrun with a quantizer, a folder, an adapter if it is not LoRA, and a model's name if it is
not a tiny Llama."""

import json
import sys
from pathlib import Path
from typing import Any

from finrepro.catalogue import reader
from finrepro.runtime import process, ranks

process.quiet_environment()

from fixtures.model import random_examples, spec_of  # noqa: E402

from finrepro.models.build import build  # noqa: E402
from finrepro.training.checkpoint import Control  # noqa: E402
from finrepro.training.loop import train  # noqa: E402

device = process.setup(0, 1)
adapter = sys.argv[3] if len(sys.argv) > 3 else "lora_r8"
base_model = reader.model(sys.argv[4]) if len(sys.argv) > 4 else "llama3_1_8b_mini"
found: dict[str, Any] = {}
for stage in (3, 0):
    spec = spec_of(
        base_model,
        adapter,
        sys.argv[1],
        zero_stage=stage,
        max_steps=3,
        global_batch_size=4,
        warmup_steps=0,
        lr=1e-2,
    )
    built = build(spec, None, device)
    base = [getattr(p, "ds_tensor", p) for p in built.model.parameters() if not p.requires_grad]
    control = Control(lambda _: None, lambda: False, Path(sys.argv[2]) / str(stage))
    trained = train(built.model, random_examples(0, count=24), spec, device, control)
    found[str(stage)] = {
        "held": sum(each.numel() * each.element_size() for each in base),
        "losses": [row["loss"] for row in trained.losses],
        "base_bytes": built.base_bytes,
        "base_parameters": built.base_parameters,
        "trainable_parameters": built.trainable_parameters,
    }
(Path(sys.argv[2]) / f"rank{ranks.current().rank}.json").write_text(json.dumps(found))

ranks.leave_process_group()
process.end(0)
