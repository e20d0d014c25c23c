"""Where a real model's weights are: in --models-dir, in the hub's cache, or on the hub at the
pinned revision; and what they are.
"""

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

from finrepro.catalogue.hub_names import former_id
from finrepro.catalogue.spec import Model
from finrepro.data import hub_client
from finrepro.data.tokenizer_files import tokenizer_digest
from finrepro.errors import EnvironmentFault
from finrepro.models import safetensors
from finrepro.models.configuration import compare_configuration

HUB = "https://huggingface.co"


def locate(model: Model, models_dir: Path | None) -> Path | None:
    """A local folder with the checkpoint, None if there is none.

    In this order: `<models_dir>/<name>`, `<models_dir>/<hub id>`, `<models_dir>/<last part of the
    hub id>`, both for a former hub id, then the hub's cache at the pinned revision.
    """
    return next(
        (folder for folder in _candidates(model, models_dir) if _is_checkpoint(folder)), None
    )


def tokenizer_folder(model: Model, models_dir: Path | None) -> Path | None:
    """A local folder with the model's tokenizer, whether or not the weights lie beside it; None
    if there is none.
    """
    return next(
        (
            folder
            for folder in _candidates(model, models_dir)
            if tokenizer_digest(folder) is not None
        ),
        None,
    )


def _candidates(model: Model, models_dir: Path | None) -> list[Path]:
    if model.hub is None:
        return []
    former = former_id(model.hub.id)
    ids = (model.hub.id, *([former] if former else []))
    names = (model.name, *(name for hub_id in ids for name in (hub_id, hub_id.rpartition("/")[2])))
    folders = [models_dir / name for name in names] if models_dir is not None else []
    if model.hub.revision:
        folders += [
            hub_client.cache()
            / f"models--{hub_id.replace('/', '--')}"
            / "snapshots"
            / model.hub.revision
            for hub_id in ids
        ]
    return folders


def _is_checkpoint(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(
        (folder / name).is_file() for name in (safetensors.WHOLE, safetensors.INDEX)
    )


def missing_reason(model: Model, models_dir: Path | None) -> str | None:
    """Why the model's weights are not on this machine and what to do, in one line; None if they
    are.
    """
    if model.hub is None and model.pretrain is None and model.package is None:
        return f"{model.name} is trained from scratch: there are no weights of it, on no hub"
    if model.hub is None or locate(model, models_dir) is not None:
        return None
    where = "not under --models-dir" if models_dir else "no --models-dir given"
    incomplete = [
        folder
        for folder in _candidates(model, models_dir)
        if folder.is_dir() and any(folder.iterdir())
    ]
    if incomplete:
        first = incomplete[0]
        lacks = (
            safetensors.without_weights(first)
            if (first / "config.json").is_file()
            else "the checkpoint lacks config.json"
        )
        where = f"{first}: {lacks}"
    gate = f"; {how_to_get_access(model)}" if model.gated else ""
    return f"weights of {model.hub.id} not found ({where}, nor in the hub's cache){gate}"


def how_to_get_access(model: Model) -> str:
    """What to do about a gated model, in one clause."""
    assert model.hub is not None
    return f"access is granted on {HUB}/{model.hub.id}, then set HF_TOKEN"


def check(model: Model, folder: Path) -> None:
    """Compare a checkpoint with the catalogue without reading a tensor: configuration, index, the
    files' headers and sizes, tokenizer.

    Names and shapes of the tensors are compared with the model's when it is loaded. Raises
    `EnvironmentFault` with the first difference.
    """
    compare_configuration(model.name, model.family, model.architecture, folder)
    safetensors.tensors(folder)
    safetensors.compare_tokenizer(model.name, int(model.architecture["vocab_size"]), folder)


def digests(folder: Path, digest: Callable[[Path], str]) -> dict[str, str]:
    """File name -> sha256 of a checkpoint's weight files by `digest`, a store's. Raises
    `EnvironmentFault` as `safetensors.files` does.
    """
    return {path.name: digest(path) for path in safetensors.files(folder)}


def unreachable_reason(model: Model) -> str | None:
    """Why the weights cannot be fetched from the hub now, in one line; None if they can. Asks
    the hub, once a model.
    """
    assert model.hub is not None
    return _ask_hub(model.hub.id, model.hub.revision)


@cache
def _ask_hub(name: str, revision: str | None) -> str | None:
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return "HF_HUB_OFFLINE is set"
    try:
        huggingface_hub.HfApi().model_info(name, revision=revision, timeout=5)
    except GatedRepoError:
        return f"the hub wants an access token (HF_TOKEN) with access to {name}"
    except (HfHubHTTPError, OSError) as error:
        return f"the hub did not answer ({type(error).__name__})"
    except Exception as error:  # the transport's own errors, which the hub's client does not export
        return f"the hub cannot be reached ({type(error).__name__})"
    return None


def fetch(model: Model) -> Path:
    """Download the checkpoint at the pinned revision: safetensors, configuration and tokenizer,
    never pickles.

    Raises `EnvironmentFault` with the hub's reason, for a gated model with the page that grants
    access, or when the hub resolves the revision to another commit. No message holds an access
    token.
    """
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    assert model.hub is not None
    try:
        folder = huggingface_hub.snapshot_download(
            model.hub.id,
            revision=model.hub.revision,
            allow_patterns=["*.safetensors", "*.json", "*.txt", "tokenizer.model"],
            ignore_patterns=["*/*"],  # the same weights in other formats
        )
    except GatedRepoError:
        raise EnvironmentFault(
            f"could not fetch {model.hub.id}: {how_to_get_access(model)}."
        ) from None
    except Exception as error:  # as above
        reason = hub_client.reason_of(error)
        gate = f"; {how_to_get_access(model)}" if model.gated else ""
        raise EnvironmentFault(f"could not fetch {model.hub.id}: {reason}{gate}") from None
    if model.hub.revision and Path(folder).name != model.hub.revision:
        raise EnvironmentFault(
            f"{model.hub.id}: the hub gave commit {Path(folder).name}, "
            f"pinned is {model.hub.revision}."
        )
    return Path(folder)
