"""Writing an export's folders: safetensors and JSON alone, names of models and never a path on
this machine.
"""

import shutil
from pathlib import Path
from typing import Any

import torch

from finrepro import bounds, strict_json
from finrepro.catalogue.spec import RunSpec
from finrepro.errors import UsageError
from finrepro.exporting.layout import ExportLayout, loading_settings
from finrepro.exporting.older_transformers import write_for_both
from finrepro.exporting.rebuild import StartingPoint, densify, read_peft, stripped
from finrepro.exporting.recorded import RecordedRun
from finrepro.kinds import quantizer_of
from finrepro.methods.adapters import lora
from finrepro.methods.layers.linear import linear_layers
from finrepro.models.build import dense_skeleton
from finrepro.models.factorize import to_dense

SHARD = "5GB"
SETTINGS = "adapter_config.json"


def write_adapter(recorded: RecordedRun, folder: Path) -> None:
    """Copy what the run has trained, a PEFT folder already; what it calls its base is the
    model's name.
    """
    folder.mkdir(exist_ok=True)
    for path in sorted(recorded.weights.iterdir()):
        shutil.copyfile(path, folder / path.name)
    values = bounds.read_json(folder / SETTINGS)
    model = recorded.spec.model
    name = model.hub.id if model.hub else model.name
    # A path on the machine that trained it means nothing to anybody.
    if values["base_model_name_or_path"] != name:
        text = strict_json.dumps(
            values | {"base_model_name_or_path": name}, indent=2, sort_keys=True
        )
        (folder / SETTINGS).write_text(text + "\n", encoding="utf-8")


def check_adapter(recorded: RecordedRun, layout: ExportLayout) -> None:
    """Raise `UsageError` when PEFT cannot put the run's adapter beside the frozen LoRA that
    belongs to its base.
    """
    kind = bounds.read_json(recorded.weights / SETTINGS)["peft_type"]
    if layout.shift and kind != "LORA":
        raise UsageError(
            f"run {recorded.run_id} cannot be exported as peft: PEFT does not put {kind} beside a "
            "LoRA, and the base needs one for its shifts; possible: merged or base."
        )


def write_base(spec: RunSpec, model: Any, tokenizer: Any, folder: Path) -> None:
    """A Transformers checkpoint of the base as it is stored: quantized layers as bitsandbytes
    keeps them, with their configuration.
    """
    beside = quantizer_of(spec.quantizer).BESIDE
    state = {
        key: value
        for key, value in model.state_dict().items()
        if key.rpartition(".")[2] not in beside
    }
    _save(model, tokenizer, folder, spec, state)


def _save(
    model: Any, tokenizer: Any, folder: Path, spec: RunSpec, state: dict[str, Any] | None = None
) -> None:
    """`save_pretrained`, with a cache again for whoever generates; with a `state`, as a quantized
    model where the run's was.

    A low-rank model is written as the dense one that computes the same, and used up.
    """
    from transformers import BitsAndBytesConfig

    if spec.model.low_rank is not None:
        model, state = to_dense(model, dense_skeleton(spec)), None
    model.config.use_cache = True
    if state is not None and (settings := loading_settings(spec)):
        model.config.quantization_config = BitsAndBytesConfig(**settings)
    model.save_pretrained(folder, state_dict=state, max_shard_size=SHARD)
    tokenizer.save_pretrained(folder)
    write_for_both(folder)


def write_shift(model: Any, folder: Path) -> None:
    """What each layer adds to the plain one of Transformers, as a PEFT folder with a frozen LoRA
    of scaling 1.
    """
    factors = {name: layer.as_frozen_lora() for name, layer in linear_layers(model).items()}
    ranks = {name: len(first) for name, (first, _) in factors.items()}
    rank = max(ranks.values())
    folder.mkdir()
    # Each layer's scaling is alpha / r = 1.
    lora.export_factors(model, folder, factors, rank, rank, rank_pattern=ranks, alpha_pattern=ranks)


def write_merged(recorded: RecordedRun, start: StartingPoint, model: Any, folder: Path) -> None:
    """A dense checkpoint in the run's dtype: the base's weights, dequantized where they were
    quantized, plus what was trained.

    Layers are taken one at a time, in place: `model`, the run's, is used up.
    """
    spec = recorded.spec
    if not recorded.is_whole_model:
        model = merge_peft(densify(spec, stripped(model)), recorded.weights)
    _save(model, start.tokenizer, folder, spec)


@torch.no_grad()
def merge_peft(dense: Any, folder: Path) -> Any:
    """`dense` with a PEFT folder put into its weights, by PEFT's own arithmetic."""
    return read_peft(dense, folder).merge_and_unload(progressbar=False, safe_merge=True)
