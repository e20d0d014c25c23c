#!/usr/bin/env bash
# A Linear8bitLt has no dropout and no running statistics. A user would expect the same output from
# train() and eval(), as of every other linear layer, so that losses of the two can be compared.
# What happens: on a CPU train() multiplies dequantized weights in floating point, eval() quantizes
# the inputs to int8 as well: outputs differ by 0.7 % of their norm a layer. A validation loss in
# eval mode is that of another arithmetic than the training loss, with the same weights.
# Seen with: bitsandbytes 0.50.2. Date: 2026-11-30.
# Source: bitsandbytes 0.50.2, bitsandbytes/autograd/_functions.py, `matmul`: `state.is_training`
# on "cpu" or "xpu" takes MatMul8bitFp; a comment there gives speed as the reason.
# Printed:
#   bitsandbytes 0.50.2
#   train() and train() again: 0.0000 of the outputs' norm apart
#   train() and eval():        0.0070 of the outputs' norm apart
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

SIZE = 256
torch.manual_seed(0)
weight, inputs = torch.randn(SIZE, SIZE) / SIZE**0.5, torch.randn(32, SIZE)
layer = bnb.nn.Linear8bitLt(SIZE, SIZE, bias=False, has_fp16_weights=False)
layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
layer = layer.to("cpu")


@torch.no_grad()
def outputs(training):
    return layer.train(training)(inputs)


train, evaluated = outputs(True), outputs(False)
again = float((outputs(True) - train).norm() / train.norm())
apart = float((evaluated - train).norm() / train.norm())
print("bitsandbytes", bnb.__version__)
print(f"train() and train() again: {again:.4f} of the outputs' norm apart")
print(f"train() and eval():        {apart:.4f} of the outputs' norm apart")
raise SystemExit(not (again == 0 and 1e-3 < apart < 0.1))
PROGRAM
