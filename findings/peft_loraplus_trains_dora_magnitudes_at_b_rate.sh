#!/usr/bin/env bash
# LoRA+ (arXiv 2402.12354) gives B a higher learning rate than A. A user who trains DoRA with
# peft.optimizers.create_loraplus_optimizer would expect DoRA's magnitudes, which are neither A nor
# B and start at the norms of the pretrained weight, at the plain learning rate.
# What happens: every parameter of one dimension is taken for a B: the magnitudes are trained at
# loraplus_lr_ratio times the rate, here 16 times, and nothing says so.
# Seen with: peft 0.21.2. Date: 2026-11-30.
# Source: peft 0.21.2, peft/optimizers/loraplus.py, `"lora_B" in name or param.ndim == 1`.
# Printed:
#   peft 0.21.2
#   {'lora_A': 0.0001, 'lora_B': 0.0016, 'lora_magnitude_vector': 0.0016}
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-}  # an environment that has these versions already
if [ -z "$python" ]; then
    python3 -m venv "$folder/venv"
    "$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
        torch==2.13.0 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0
    python=$folder/venv/bin/python
fi
cd "$folder"
"$python" -W ignore - <<'PROGRAM'
import peft
import torch
from peft.optimizers import create_loraplus_optimizer
from transformers import LlamaConfig, LlamaForCausalLM

config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
)
lora = peft.LoraConfig(r=4, use_dora=True, target_modules=["q_proj"], task_type="CAUSAL_LM")
model = peft.get_peft_model(LlamaForCausalLM(config), lora)
optimizer = create_loraplus_optimizer(
    model, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16
)
names = {id(parameter): name for name, parameter in model.named_parameters()}
rates = {}
for group in optimizer.param_groups:
    for parameter in group["params"]:
        kind = next(part for part in names[id(parameter)].split(".") if part.startswith("lora_"))
        rates[kind] = group["lr"]
print("peft", peft.__version__)
print(rates)
raise SystemExit(rates["lora_magnitude_vector"] != rates["lora_B"])
PROGRAM
