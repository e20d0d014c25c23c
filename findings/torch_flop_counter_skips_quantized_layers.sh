#!/usr/bin/env bash
# A user would expect torch.utils.flop_counter to count a linear layer's operations whatever its
# weights are stored in, or to say what it cannot count.
# What happens: products inside custom operators count as nothing, without a word. An NF4 layer of
# bitsandbytes counts 0 FLOPs forward and half of the truth with its backward; an int8 layer counts
# in full in train() and 0 forward in eval(). An MFU or a comparison of methods computed from it is
# wrong by the quantizer and the mode.
# Seen with: torch 2.13.0, bitsandbytes 0.50.2. Date: 2026-11-30.
# Source: torch 2.13.0, torch/utils/flop_counter.py: operators without an entry in flop_registry.
# Printed:
#   torch 2.13.0+cpu bitsandbytes 0.50.2
#   float32: 1.00 of forward and backward in train(), 1.00 of forward in eval()
#   nf4: 0.50 of forward and backward in train(), 0.00 of forward in eval()
#   int8: 1.00 of forward and backward in train(), 0.00 of forward in eval()
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-}  # an environment that has these versions already
if [ -z "$python" ]; then
    python3 -m venv "$folder/venv"
    "$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
        torch==2.13.0 \
        bitsandbytes==0.50.2
    python=$folder/venv/bin/python
fi
cd "$folder"
"$python" -W ignore - <<'PROGRAM'
import bitsandbytes as bnb
import torch
from torch.utils.flop_counter import FlopCounterMode

SIZE, TOKENS = 256, 32


def layer(kind):
    weight = torch.randn(SIZE, SIZE) / SIZE**0.5
    if kind == "float32":
        return torch.nn.Linear(SIZE, SIZE, bias=False).requires_grad_(False)
    if kind == "nf4":
        module = bnb.nn.Linear4bit(SIZE, SIZE, bias=False, quant_type="nf4")
        module.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    else:
        module = bnb.nn.Linear8bitLt(SIZE, SIZE, bias=False, has_fp16_weights=False)
        module.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    return module.to("cpu")


def counted(module, training, backward):
    inputs = torch.randn(1, TOKENS, SIZE, requires_grad=backward)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        outputs = module.train(training)(inputs)
        if backward:
            outputs.sum().backward()
    return counter.get_total_flops() / (2 * TOKENS * SIZE * SIZE)


print("torch", torch.__version__, "bitsandbytes", bnb.__version__)
shares = {}
for kind in ("float32", "nf4", "int8"):
    module = layer(kind)
    shares[kind] = (counted(module, True, True) / 2, counted(module, False, False))
    print(f"{kind}: {shares[kind][0]:.2f} of forward and backward in train(), ", end="")
    print(f"{shares[kind][1]:.2f} of forward in eval()")
raise SystemExit(shares != {"float32": (1, 1), "nf4": (0.5, 0), "int8": (1, 0)})
PROGRAM
