#!/usr/bin/env bash
# An activated LoRA (aLoRA, arXiv 2504.12397) changes the model from its invocation tokens on. A user
# who calls the transformer below PEFT's wrapper - to read hidden states, or to send few positions
# through the head - would expect the adapter there, as for every other LoRA, or an error.
# What happens: only PeftModel's own forward looks for the tokens. The same layers, called through
# get_base_model(), give the bare model's logits, and nothing says so.
# Seen with: peft 0.21.2, transformers 5.23.0. Date: 2026-11-30.
# Source: peft 0.21.2, peft/tuners/lora/variants.py, ALoraLinearVariant.forward (alora_offsets).
# Printed:
#   LoRA: moves the logits by 0.595, called below the wrapper by 0.595
#   activated LoRA: moves the logits by 0.289, called below the wrapper by 0.000
#   peft 0.21.2
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
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
)
base = LlamaForCausalLM(config).eval()
ids = torch.tensor([[3, 5, 1, 2, 9, 11, 13]])  # 1, 2: the invocation tokens


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


bare = logits(base)
for name, tokens in (("LoRA", None), ("activated LoRA", [1, 2])):
    lora = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM",
        alora_invocation_tokens=tokens, init_lora_weights=False,
    )
    adapted = peft.get_peft_model(base, lora)
    wrapped = float((logits(adapted) - bare).abs().max())
    below = float((logits(adapted.get_base_model()) - bare).abs().max())
    print(f"{name}: moves the logits by {wrapped:.3f}, called below the wrapper by {below:.3f}")
    base = adapted.unload()
print("peft", peft.__version__)
raise SystemExit(not (wrapped > 0.01 and below == 0.0))
PROGRAM
