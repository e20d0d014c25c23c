#!/usr/bin/env bash
# Transformers 5 saves a Llama with scaled rotary positions (Llama 3.1 and later). A user who loads
# the checkpoint with Transformers 4.57, whose files version 5 reads, would expect the same model, or
# an error.
# What happens: version 5 writes the rotary base and its scaling under rope_parameters alone.
# Version 4 does not look there: it takes a base of 10,000 and no scaling, and says nothing.
# Seen with: transformers 5.23.0 and 4.57.6. Date: 2026-11-30.
# Source: transformers 4.57.6, models/llama/configuration_llama.py (rope_theta=10000.0,
# rope_scaling=None); transformers 5.23.0, modeling_rope_utils.py (rope_parameters).
# Printed:
#   transformers 5.23.0: rope_parameters llama3 saved
#   transformers 4.57.6: base 10000.0 scaling None
#   log-probabilities differ by up to 11.74
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-}  # an environment with 5.23.0; version 4 always gets one of its own
if [ -z "$python" ]; then
    python3 -m venv "$folder/venv5"
    "$folder/venv5/bin/pip" install --quiet --disable-pip-version-check \
        torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
    python=$folder/venv5/bin/python
fi
python=$(command -v "$python")
cd "$folder"
"$python" -m venv "$folder/venv4"
"$folder/venv4/bin/pip" install --quiet --disable-pip-version-check --no-deps transformers==4.57.6
"$folder/venv4/bin/pip" install --quiet --disable-pip-version-check \
    huggingface_hub==0.36.2 tokenizers==0.22.2 2>/dev/null
# The same torch in both.
"$python" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parent.parent)' \
    > "$(echo "$folder"/venv4/lib/python3*/site-packages)/torch_of_version_5.pth"
cat > program.py <<'PROGRAM'
import sys

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

if sys.argv[1] == "save":
    torch.manual_seed(0)
    rope = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
    }
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, rope_parameters=rope, initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained("checkpoint")
model = LlamaForCausalLM.from_pretrained("checkpoint").eval()
with torch.no_grad():
    logits = model(input_ids=torch.arange(60)[None]).logits.log_softmax(-1)
print("transformers", transformers.__version__, end=": ")
if sys.argv[1] == "save":
    print("rope_parameters", model.config.rope_parameters["rope_type"], "saved")
    torch.save(logits, "expected.pt")
else:
    off = float((logits - torch.load("expected.pt")).abs().max())
    print("base", model.config.rope_theta, "scaling", model.config.rope_scaling)
    print(f"log-probabilities differ by up to {off:.2f}")
    raise SystemExit(not (off > 0.1 and model.config.rope_theta == 10000.0))
PROGRAM
"$python" -W ignore program.py save
"$folder/venv4/bin/python" -W ignore program.py load
