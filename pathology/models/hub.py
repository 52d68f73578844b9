"""Files of models on the Hugging Face hub. The only import of huggingface_hub.

Promise: a file that is in the local cache is taken from there without a question to the network, so that a model stays the same
while its name does; what is fetched is data, and nothing of it is executed.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pathology.errors import ModelError, one_line

EXTRA = "pip install 'pathology-pipeline[timm]'"
REMEDY = (
    "only safetensors are loaded, as other files run code: make a folder of the checkpoint with "
    "pathology models init FILE --arch timm:create_model --arg model_name=ARCHITECTURE"
)


def pickles_in(folder: Path) -> list[str]:
    """The files in `folder` that hold weights as code, by name."""
    return sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".pth", ".pt", ".ckpt"))


def fetch(name: str, files: tuple[str, ...]) -> Path:
    """The folder of the local cache that holds `files` of the hub's `name`, ORG/NAME or ORG/NAME@REVISION, all of one revision.

    What is missing is fetched, unless HF_HUB_OFFLINE is set. ModelError where that cannot be done.
    """
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", name)
    if match is None:
        raise ModelError(f"model hf-hub:{name}: write hf-hub:ORG/NAME, or hf-hub:ORG/NAME@REVISION")
    hub = _hub()
    repository, revision = match[1], match[2]
    folder: Path | None = None
    for file in files:
        try:
            found = hub.try_to_load_from_cache(repository, file, revision=revision)
        except ValueError as error:  # the hub's own rules for names
            raise ModelError(f"model hf-hub:{name} has no name of the hub: {one_line(error)}; write hf-hub:ORG/NAME") from error
        if not isinstance(found, str):
            found = _download(hub, repository, file, revision, name, [] if folder is None else pickles_in(folder))
        folder = Path(found).parent
        revision = folder.name  # the snapshot's commit
    assert folder is not None
    return folder


def _download(hub: Any, repository: str, file: str, revision: str | None, name: str, pickles: list[str]) -> str:
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        path: str = hub.hf_hub_download(repository, file, revision=revision)
    except LocalEntryNotFoundError as error:
        if pickles:
            raise ModelError(f"model hf-hub:{name} has no {file} in the local cache, only {pickles[0]}; {REMEDY}") from error
        raise ModelError(
            f"model hf-hub:{name}: {file} is not in the local cache and cannot be fetched ({one_line(error, 120)}); fetch it "
            f"where there is a network (hf download {repository}) and bring the cache, or its folder as local-dir:PATH"
        ) from error
    except EntryNotFoundError as error:
        raise ModelError(f"model hf-hub:{name} has no {file}; {REMEDY}") from error
    except RepositoryNotFoundError as error:  # one that is not public answers the same
        raise ModelError(
            f"model hf-hub:{name} is not there, or not for you; check its name, or ask its owners and run hf auth login"
        ) from error
    except Exception as error:  # of a network anything
        raise ModelError(f"model hf-hub:{name}: {file} cannot be fetched ({one_line(error)}); try again") from error
    return path


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ModelError(
            f"models of the hub need huggingface_hub ({one_line(error)}); install it with timm: {EXTRA}"
        ) from error
    return huggingface_hub
