"""Where a real model's weights are: in --models-dir, in the hub's cache, or on the hub at the pinned revision."""

import os
from functools import cache
from pathlib import Path

from finrepro.errors import EnvironmentFault
from finrepro.spec import Model

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")  # whole, or in shards


def locate(model: Model, models_dir: Path | None) -> Path | None:
    """A local folder with the checkpoint, None if there is none.

    Looked for: `<models_dir>/<name>`, `<models_dir>/<hub id>`, `<models_dir>/<last part of the hub id>`, then the hub's cache at the pinned
    revision.
    """
    places = []
    if model.hub is not None:
        if models_dir is not None:
            places = [models_dir / part for part in (model.name, model.hub.id, model.hub.id.rpartition("/")[2])]
        home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
        cached = home / "hub" / f"models--{model.hub.id.replace('/', '--')}" / "snapshots"
        if model.hub.revision:
            places.append(cached / model.hub.revision)
    return next((place for place in places if (place / "config.json").is_file() and _has_weights(place)), None)


def _has_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in WEIGHTS)


def missing_reason(model: Model, models_dir: Path | None) -> str | None:
    """Why the model's weights are not on this machine and what to do, in one line; None if they are."""
    if model.hub is None or locate(model, models_dir) is not None:
        return None
    where = f"not under {models_dir}" if models_dir else "no --models-dir given"
    gate = f"; access is granted on the page of {model.hub.id}, then set HF_TOKEN" if model.gated else ""
    return f"weights of {model.hub.id} not found ({where}, nor in the hub's cache){gate}"


def unreachable_reason(model: Model) -> str | None:
    """Why the weights cannot be fetched from the hub now, in one line; None if they can. Asks the hub, once a model."""
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
    except Exception as error:  # the hub's client raises its transport's own errors, which it does not export
        return f"the hub cannot be reached ({type(error).__name__})"
    return None


def fetch(model: Model) -> Path:
    """Download the checkpoint at the pinned revision: safetensors, configuration and tokenizer, never pickles.

    Raises `EnvironmentFault` with the hub's reason, or when the hub resolves the revision to another commit.
    """
    import huggingface_hub

    assert model.hub is not None
    try:
        folder = huggingface_hub.snapshot_download(
            model.hub.id,
            revision=model.hub.revision,
            allow_patterns=["*.safetensors", "*.json", "*.txt", "tokenizer.model"],
        )
    except Exception as error:  # as above; the message is the hub's, which never contains the token
        raise EnvironmentFault(f"could not fetch {model.hub.id}: {str(error).splitlines()[0]}") from None
    if model.hub.revision and Path(folder).name != model.hub.revision:
        raise EnvironmentFault(
            f"{model.hub.id}: the hub gave commit {Path(folder).name}, pinned is {model.hub.revision}."
        )
    return Path(folder)
