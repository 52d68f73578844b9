"""Which model files that run code when loaded the user has agreed to: a local registry by sha256.

Promise: nothing here loads a model, and a file is trusted for its exact bytes only. The registry is `models.json` in
`$PATHOLOGY_HOME`, else `$XDG_CONFIG_HOME/pathology`, else `~/.config/pathology`:
{"schema": 1, "models": {name: {"path", "sha256", "kind"}}}.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pathology.durable import make_folders, write_file
from pathology.errors import ModelError

SCHEMA = 1
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,59}"


@dataclass(frozen=True, slots=True)
class Entry:
    """A known model.

    name    what `--model` takes, and the folder its results go to
    path    the model's folder; "" for a built-in
    sha256  hex digest of the file that runs code when loaded, or else of card and weights; of the source for a built-in
    kind    "wsinfer", the format of a card's weights, or "built-in"
    """

    name: str
    path: str
    sha256: str
    kind: str


def registry_path(environment: Mapping[str, str] = os.environ) -> Path:
    """Where the registry lies, whether or not it exists."""
    if home := environment.get("PATHOLOGY_HOME"):
        return Path(home) / "models.json"
    config = environment.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(config) / "pathology" / "models.json"


def entries() -> list[Entry]:
    """The registered models by name. ModelError where the registry cannot be understood."""
    path = registry_path()
    try:
        content = json.loads(path.read_bytes())
        if content["schema"] != SCHEMA:
            raise ModelError(
                f"model registry {path} has schema {content['schema']}, this program knows {SCHEMA}; update the program"
            )
        return [Entry(name, **fields) for name, fields in sorted(content["models"].items())]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"model registry {path} is damaged; move it away and add the models again") from error


def trust_file(weights: Path, kind: str, trust: str | None, name: str | None = None) -> Entry:
    """`register` the folder of `weights`, a file that runs code when loaded, if `trust` is the sha256 of its bytes."""
    folder = weights.parent.resolve()
    actual = hashlib.sha256(weights.read_bytes()).hexdigest()
    if trust is None:
        raise ModelError(
            f"{weights.name} in {folder} runs code when it is loaded; its sha256 is {actual}: compare it with what the model's "
            f"publisher states and, if they are equal, run: {_command(folder, actual)}"
        )
    if trust.strip().lower() != actual:
        raise ModelError(
            f"{weights.name} in {folder} has sha256 {actual}, not {trust}: it is not the file you mean to trust; "
            "compare with what the model's publisher states and fetch it again"
        )
    return register(folder, kind, actual, name)


def register(folder: Path, kind: str, sha256: str, name: str | None = None) -> Entry:
    """Register `folder` and trust the file in it, if any, that runs code when loaded and has `sha256`.

    The name is the folder's unless given. Adding a folder again replaces its entry.
    """
    entry = Entry(checked_name(name, folder), str(folder.resolve()), sha256, kind)
    others = {e.name: e for e in entries() if e.path != entry.path}
    if entry.name in others:
        raise ModelError(f"the name {entry.name} stands for {others[entry.name].path}; add {folder} under another name")
    _write([*others.values(), entry])
    return entry


def forget(folder: Path) -> None:
    """Take `folder` out of the registry, if it is there."""
    path, known = str(folder.resolve()), entries()
    if any(e.path == path for e in known):
        _write([e for e in known if e.path != path])


def require_trust(weights: Path, sha256: str) -> Entry:
    """The entry that trusts these bytes; ModelError with the command to run where there is none."""
    folder = weights.parent.resolve()
    known = entries()
    trusted = [e for e in known if e.sha256 == sha256]
    if not trusted:
        changed = next((f"is not the file you trusted (sha256 {e.sha256})" for e in known if e.path == str(folder)), None)
        why = changed or "runs code when it is loaded and is not trusted yet"
        raise ModelError(
            f"{weights.name} in {folder} {why}; its sha256 is {sha256}: compare it with what the model's publisher states "
            f"and, if they are equal, run: {_command(folder, sha256)}"
        )
    here = next((e for e in trusted if e.path == str(folder)), trusted[0])
    return replace(here, path=str(folder))


def _command(folder: Path, sha256: str) -> str:
    return f"pathology models add {shlex.quote(str(folder))} --trust {sha256}"


def checked_name(name: str | None, folder: Path) -> str:
    """`name` if it is one for a model, or one made of the folder's where it is None. ModelError for another."""
    if name is None:
        return re.sub(r"[^A-Za-z0-9._-]+", "-", folder.name).strip(".-_")[:60] or "model"
    if not re.fullmatch(NAME, name):
        raise ModelError(f"model name {name!r}: use letters, digits, '.', '_' and '-', at most 60")
    return name


def _write(models: list[Entry]) -> None:
    path = registry_path()
    fields = {e.name: {k: v for k, v in asdict(e).items() if k != "name"} for e in models}
    make_folders(path.parent)
    write_file(path, (json.dumps({"schema": SCHEMA, "models": fields}, indent=1, sort_keys=True) + "\n").encode())
