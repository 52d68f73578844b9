"""Choosing and describing the device that models run on. The only module besides `models/` that imports torch, and lazily.

Promise: an accelerator is never left idle in silence. Where a machine has one that torch cannot use, that is an error
unless the CPU was asked for.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pathology.errors import EnvironmentFault, UsageError

# Besides torch and what it computes with, these decode and resize pixels: another version may give other bits.
LIBRARIES = ("torch", "numpy", "pillow", "imagecodecs", "tifffile", "openslide-python", "openslide-bin")


@dataclass(frozen=True, slots=True)
class TorchFacts:
    """What this torch can use: built for CUDA or not, CUDA devices it sees, Apple's MPS."""

    version: str
    cuda_build: bool
    cuda_count: int
    mps: bool


def torch_facts() -> TorchFacts:
    """The facts of the installed torch (imports it)."""
    import torch

    return TorchFacts(
        version=torch.__version__,
        cuda_build=torch.version.cuda is not None or torch.version.hip is not None,
        cuda_count=torch.cuda.device_count() if torch.cuda.is_available() else 0,
        mps=torch.backends.mps.is_available(),
    )


def nvidia_present(system: Path = Path("/"), environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this machine offers an NVIDIA device, asked without torch. Devices hidden on purpose do not count.

    Looks at /proc/driver/nvidia/gpus and /dev/nvidia<N> below `system`, and asks `nvidia-smi` if `environment`'s PATH has one.
    """
    if environment.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return False
    gpus = system / "proc/driver/nvidia/gpus"
    if (gpus.is_dir() and any(gpus.iterdir())) or any((system / "dev").glob("nvidia[0-9]*")):
        return True
    tool = shutil.which("nvidia-smi", path=environment.get("PATH", ""))
    if tool is None:
        return False
    try:
        listing = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listing.returncode == 0 and "GPU " in listing.stdout


def accelerator_possible(system: Path = Path("/"), environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torch is worth asking for an accelerator, answered without importing it: NVIDIA, AMD (/dev/kfd), or Apple."""
    return sys.platform == "darwin" or (system / "dev/kfd").exists() or nvidia_present(system, environment)


def choose_device(name: str = "auto", facts: TorchFacts | None = None, nvidia: bool | None = None) -> str:
    """The device for `name`, one of "auto", "cpu", "cuda", "cuda:N", "mps": a name that torch takes.

    auto is CUDA where torch has it, else MPS, else the CPU. `facts` and `nvidia` stand in for this machine's own.
    Raises UsageError for another name, EnvironmentFault for a device that is not there or that this torch cannot use.
    """
    if name != "auto" and not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise UsageError(f"device {name!r} is not known; use auto, cpu, cuda, cuda:N or mps")
    if name == "cpu":
        return name
    if name == "auto" and facts is None and nvidia is None and not accelerator_possible():
        return "cpu"  # importing torch, only to hear this, takes longer than the rest of the command's start
    facts = facts or torch_facts()
    if facts.cuda_count == 0 and (nvidia_present() if nvidia is None else nvidia):
        why = "sees none: check the driver" if facts.cuda_build else "is built without CUDA: install a CUDA build of torch"
        raise EnvironmentFault(f"this machine has an NVIDIA device but torch {facts.version} {why}, or pass --device cpu")
    if name == "auto":
        return "cuda" if facts.cuda_count else "mps" if facts.mps else "cpu"
    if name == "mps":
        if not facts.mps:
            raise EnvironmentFault(f"device mps was asked for, but torch {facts.version} has none; pass --device cpu")
        return name
    if facts.cuda_count == 0:
        raise EnvironmentFault(f"device {name} was asked for, but torch {facts.version} sees no CUDA device; pass --device cpu")
    if name != "cuda" and int(name.removeprefix("cuda:")) >= facts.cuda_count:
        raise EnvironmentFault(
            f"device {name} was asked for, but torch sees {facts.cuda_count}: cuda:0 to cuda:{facts.cuda_count - 1}"
        )
    return name


def device_count(kind: str, facts: TorchFacts | None = None) -> int:
    """How many devices of `kind` ("cpu", "cuda", "mps") one machine offers; the CPU is one."""
    if kind not in ("cpu", "cuda", "mps"):
        raise UsageError(f"device kind {kind!r} is not known; use cpu, cuda or mps")
    if kind == "cpu":
        return 1
    facts = facts or torch_facts()
    return facts.cuda_count if kind == "cuda" else int(facts.mps)


def set_threads(count: int) -> None:
    """Let torch use `count` CPU threads in this process. Fixed before the first region: another count may give other bits."""
    import torch

    if count < 1:
        raise UsageError(f"{count} torch threads; use 1 or more")
    torch.set_num_threads(count)


def set_exact() -> None:
    """Let CUDA compute float32 as float32, with algorithms that give the same bits every time. No effect elsewhere."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def environment(device: str = "cpu") -> dict[str, str | int]:
    """What decides the last bits of scores in this process, besides the inputs: device, CPU capability, threads, versions.

    Holds no host name, path or time, so that equal environments are equal dictionaries.
    """
    import torch

    cuda = device.startswith("cuda")
    facts: dict[str, str | int] = {
        "device": torch.cuda.get_device_name(device) if cuda else device,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }
    if cuda:
        facts["cuda"] = str(torch.version.cuda or torch.version.hip)
        facts["cudnn"] = torch.backends.cudnn.version() or 0  # type: ignore[no-untyped-call]  # torch has no types here
    for library in LIBRARIES:
        try:
            facts[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            facts[library] = "none"
    return facts
