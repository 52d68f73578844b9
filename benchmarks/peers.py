"""Other people's programs, each in a virtual environment of its own, and what of theirs counts as done.

Promise: versions are pinned and CPU torch stays CPU torch; a peer that cannot be had says exactly why, once, and is left out.
"""

from __future__ import annotations

import csv
import hashlib
import json
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent

TORCH, VISION = "torch==2.13.0", "torchvision==0.28.0"


@dataclass(frozen=True, slots=True)
class Peer:
    """Where a program comes from.

    title     its name and version, for tables
    installs  arguments of `pip install`, one call after the other; every call is held to `TORCH`, `VISION` and `also`
    also      further constraints
    """

    title: str
    installs: tuple[tuple[str, ...], ...]
    also: tuple[str, ...] = ()

    @property
    def recipe(self) -> str:
        """Hash by which an environment made from other packages is told from this one."""
        return hashlib.sha256(repr((TORCH, VISION, self.installs, self.also)).encode()).hexdigest()


# torchvision has no CPU build that names CPU torch: without --no-deps pip would replace torch by a CUDA build. slide2vec and
# hs2p require cuCIM, CuPy and nvImageCodec (CUDA) and ASAP (not on PyPI), which they load only where they are asked for.
PEERS = {
    "pyvips": Peer("pyvips 3.0.0", (("pyvips[binary]==3.0.0", "numpy"),)),
    "wsinfer": Peer(
        "WSInfer 0.6.1", ((TORCH,), ("--no-deps", VISION), ("wsinfer[openslide]==0.6.1", "openslide-bin==4.0.1.2")), ("zarr<3",)
    ),
    "slide2vec": Peer(
        "slide2vec 7.1.4",
        (
            (TORCH,),
            ("--no-deps", VISION, "timm==1.0.31", "slide2vec==7.1.4", "hs2p==6.1.0"),
            ("openslide-python==1.4.7", "openslide-bin==4.0.1.2", "pyvips[binary]==3.0.0", "tifffile", "imagecodecs"),
            ("transformers<5,>=4.47", "huggingface_hub", "safetensors", "einops", "einops-exts", "opencv-python-headless"),
            ("omegaconf", "pyyaml", "pandas", "pillow", "matplotlib", "h5py", "rich", "tqdm", "wandb", "packaging"),
        ),
    ),
}


class Unavailable(Exception):
    """The peer cannot be installed here; the message is pip's."""


def python_of(name: str, cache: Path) -> Path:
    """The interpreter of the peer's environment below `cache`, made on first use.

    Raises Unavailable where pip refused, now or when it was tried before; remove the folder to try again.
    """
    peer, folder = PEERS[name], cache / f"venv-{name}"
    state = folder / "benchmark.json"
    known = json.loads(state.read_text()) if state.exists() else {}
    if known.get("recipe") != peer.recipe:
        known = {"recipe": peer.recipe, "error": _install(peer, folder)}
        state.write_text(json.dumps(known))
    if known["error"]:
        raise Unavailable(f"{peer.title}: {known['error']}")
    return folder / "bin" / "python"


def _install(peer: Peer, folder: Path) -> str:
    """Make the environment anew; pip's last words where it failed, "" where it did not."""
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join((TORCH, VISION, *peer.also)) + "\n")
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--constraint", str(constraints)]
    for arguments in peer.installs:
        done = subprocess.run([*pip, *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            return " ".join(errors) or f"pip ended with {done.returncode}"
    return ""


def export(network: str, folder: Path) -> Path:
    """`folder` with the network as WSInfer's zoo ships one: config.json and torchscript_model.pt. Made unless it is there."""
    config = folder / "config.json"
    if not config.exists():
        import torch

        from benchmarks.networks import MEAN, STD, make

        folder.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch's of TorchScript, which is what WSInfer takes
            torch.jit.script(make(network)).save(str(folder / "torchscript_model.pt"))
        normalize = {"mean": MEAN, "std": STD}
        transform = [
            {"name": "Resize", "arguments": {"size": 224}},
            {"name": "ToTensor"},
            {"name": "Normalize", "arguments": normalize},
        ]
        card = {"spec_version": "1.0", "architecture": network, "num_classes": 2, "class_names": ["a", "b"]}
        config.write_text(json.dumps({**card, "patch_size_pixels": 224, "spacing_um_px": 0.5, "transform": transform}))
    return folder


def wsinfer_command(python: Path, slide: Path, model: Path, out: Path) -> list[str]:
    """WSInfer over one slide into `out`, which must be empty: it takes a folder of slides, so the slide is linked into one."""
    slides = out / "slides"
    slides.mkdir(parents=True)
    (slides / slide.name).symlink_to(slide)
    return [str(python), str(HERE / "wsinfer_run.py"), str(slides), str(out / "results"), "--model", str(model)]


def slide2vec_command(python: Path, slide: Path, model: Path, out: Path) -> list[str]:
    """slide2vec over one slide into `out`."""
    return [str(python), str(HERE / "slide2vec_run.py"), str(slide), str(out / "results"), "--model", str(model)]


def tiles_done(name: str, out: Path) -> int:
    """How many tiles the peer says it computed. It has its own tissue and grid, so not ours. Raises SystemExit for none."""
    results = out / "results"
    done = 0
    if name == "wsinfer":
        for table in results.glob("model-outputs-csv/*.csv"):
            with table.open(newline="") as rows:
                done += sum(1 for _ in csv.DictReader(rows))
    else:
        with (results / "process_list.csv").open(newline="") as rows:
            done = sum(int(row["num_tiles"]) for row in csv.DictReader(rows) if row["feature_status"] == "success")
    if not done:
        raise SystemExit(f"{PEERS[name].title} ended well but computed no tile; its output is in {out}")
    return done
