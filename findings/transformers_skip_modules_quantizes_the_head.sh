#!/usr/bin/env bash
# Without llm_int8_skip_modules, Transformers leaves lm_head unquantized. A user who names one more
# module to be left in full precision would expect that module and the head to be.
# What happens: the list replaces the default: the named module is left, and lm_head becomes 4-bit
# (or int8). Adding a layer to what is kept in full precision quantizes the output head, without a
# word.
# Seen with: transformers 5.23.0, bitsandbytes 0.50.2. Date: 2026-11-30.
# Source: transformers 5.23.0, transformers/quantizers/base.py, get_modules_to_not_convert:
# defaults are added only for `skip_modules is None`; the documentation of the setting does not say
# so.
# Printed:
#   transformers 5.23.0 bitsandbytes 0.50.2
#   llm_int8_skip_modules=None: lm_head is Linear, down_proj is Linear4bit
#   llm_int8_skip_modules=['down_proj']: lm_head is Linear4bit, down_proj is Linear
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-}  # an environment that has these versions already
if [ -z "$python" ]; then
    python3 -m venv "$folder/venv"
    "$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
        torch==2.13.0 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0 \
        bitsandbytes==0.50.2
    python=$folder/venv/bin/python
fi
cd "$folder"
"$python" -W ignore - <<'PROGRAM'
import bitsandbytes
import torch
import transformers
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
)
LlamaForCausalLM(config).save_pretrained("base")
print("transformers", transformers.__version__, "bitsandbytes", bitsandbytes.__version__)
heads = []
for skipped in (None, ["down_proj"]):
    settings = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=skipped)
    model = LlamaForCausalLM.from_pretrained("base", quantization_config=settings)
    head, layer = type(model.lm_head).__name__, type(model.model.layers[0].mlp.down_proj).__name__
    print(f"llm_int8_skip_modules={skipped}: lm_head is {head}, down_proj is {layer}")
    heads.append((head, layer))
raise SystemExit(heads != [("Linear", "Linear4bit"), ("Linear4bit", "Linear")])
PROGRAM
