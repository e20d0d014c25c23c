#!/usr/bin/env bash
# A user would expect model.load_adapter(folder) of Transformers to load a DoRA folder that PEFT
# has saved as peft.PeftModel.from_pretrained does, or to refuse it.
# What happens: the magnitudes in the file are "unexpected" (their names lack `.weight`), those of
# the model are "missing" and keep the norms of the base; load_adapter returns, the model computes
# something between the base and the adapter. The only sign is a table in the log, whose note on
# unexpected keys says that they can be ignored.
# Seen with: transformers 5.23.0, peft 0.21.2. Date: 2026-11-30.
# Source: measured; the names are made in peft 0.21.2, peft/utils/save_and_load.py, and read by
# transformers 5.23.0, transformers/integrations/peft.py.
# Printed:
#   transformers 5.23.0 peft 0.21.2
#   largest difference from the trained model's logits, the base without adapter: 0.439
#   largest difference from the trained model's logits, PeftModel.from_pretrained: 0.000
#   largest difference from the trained model's logits, load_adapter: 0.320
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
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
)
LlamaForCausalLM(config).save_pretrained("base")


def base():
    return LlamaForCausalLM.from_pretrained("base").eval()


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(10)[None]).logits


lora = peft.LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "v_proj"])
trained = peft.get_peft_model(base(), lora)
with torch.no_grad():
    for name, parameter in trained.named_parameters():
        if "lora_" in name:
            parameter.add_(0.3 * torch.randn_like(parameter))
expected = logits(trained)
trained.save_pretrained("adapter")

with_transformers = base()
with_transformers.load_adapter("adapter")
with_peft = peft.PeftModel.from_pretrained(base(), "adapter")
off = {
    "the base without adapter": base(),
    "PeftModel.from_pretrained": with_peft,
    "load_adapter": with_transformers,
}
off = {name: float((logits(model) - expected).abs().max()) for name, model in off.items()}
print("transformers", transformers.__version__, "peft", peft.__version__)
for name, value in off.items():
    print(f"largest difference from the trained model's logits, {name}: {value:.3f}")
raise SystemExit(not (off["PeftModel.from_pretrained"] < 1e-5 and off["load_adapter"] > 0.05))
PROGRAM
