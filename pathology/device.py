"""Choosing and describing the device that models run on. The only module besides `models/` that imports torch, and lazily.

Promise: an accelerator is never left idle in silence. Where a machine has one that torch cannot use, that is an error
unless the CPU was asked for.
"""

from __future__ import annotations

import gc
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from pathology.errors import EnvironmentFault, UsageError
from pathology.job import PRECISIONS, Precision

if TYPE_CHECKING:
    import torch

# Besides torch, what it computes with and networks are made by, these decode and resize pixels: others may give other bits.
LIBRARIES = ("torch", "numpy", "pillow", "imagecodecs", "tifffile", "openslide-python", "openslide-bin", "timm")

# How torch and CUDA's libraries say that a device failed, without a type for it.
DEVICE_FAILED = re.compile(
    r"(CUDA|HIP) (driver )?error|device-side assert|illegal memory access|unspecified launch failure"
    r"|(CUBLAS|CUDNN|CUSOLVER|CUSPARSE)_STATUS_(EXECUTION_FAILED|INTERNAL_ERROR|MAPPING_ERROR)"
    r"|no (CUDA|HIP)-capable device|No (CUDA|HIP) GPUs are available|uncorrectable ECC|GPU is lost"
)

_threads = 0  # of torch; 0: nobody has said


@dataclass(frozen=True, slots=True)
class TorchFacts:
    """What this torch can use: built for CUDA or not, CUDA devices it sees, Apple's MPS; bf16 on all of the former."""

    version: str
    cuda_build: bool
    cuda_count: int
    mps: bool
    cuda_bf16: bool = False


def torch_facts() -> TorchFacts:
    """The facts of the installed torch (imports it)."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return TorchFacts(
        version=torch.__version__,
        cuda_build=torch.version.cuda is not None or torch.version.hip is not None,
        cuda_count=count,
        mps=torch.backends.mps.is_available(),
        # In hardware from Ampere (8.0) on; before that torch emulates it, slowly.
        cuda_bf16=count > 0 and all(torch.cuda.get_device_capability(i)[0] >= 8 for i in range(count)),
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


def choose_precision(
    name: str, device: str, allowed: Collection[Precision] = PRECISIONS, model: str = "", facts: TorchFacts | None = None
) -> Precision:
    """What `name`, one of "auto", "fp32", "bf16", "fp16", comes to on `device` for `model`.

    allowed  what the model's card allows; nothing: it is no torch network, and computes as it does

    auto is the first of these that is allowed: on CUDA bf16, where every device has it, fp16, fp32; elsewhere fp32, and on the
    CPU, bf16. Raises UsageError for another name, and for what the device or the model cannot do.
    """
    if name not in ("auto", *PRECISIONS):
        raise UsageError(f"precision {name!r} is not known; use fp32, bf16, fp16 or auto")
    if not allowed:
        if name in ("auto", "fp32"):
            return "fp32"
        raise UsageError(f"precision {name} is for models that are torch networks, and this one is none; use fp32 or auto")
    cuda = device.startswith("cuda")
    if name != "auto":
        check_allowed(model, precision := cast(Precision, name), allowed)
        check_precision(precision, device)
        if precision == "bf16" and cuda and not (facts or torch_facts()).cuda_bf16:
            raise UsageError(f"device {device} does not compute in bf16; use --precision fp16 or auto")
        return precision
    order: dict[str, tuple[Precision, ...]] = {"cpu": ("fp32", "bf16"), "mps": ("fp32",)}
    for precision in order.get(device, ("bf16", "fp16", "fp32")):
        if precision in allowed and not (precision == "bf16" and cuda and not (facts or torch_facts()).cuda_bf16):
            return precision
    raise UsageError(f"model {model} allows {_listed(allowed)} only, by its card, which {device} does not compute in")


def check_allowed(model: str, precision: Precision, allowed: Collection[Precision]) -> None:
    """Raise UsageError where a model's card does not allow `precision`."""
    if precision not in allowed:
        use = " or ".join(f"--precision {p}" for p in PRECISIONS if p in allowed)
        raise UsageError(f"model {model} allows {_listed(allowed)} only, by its card; use {use}")


def _listed(allowed: Collection[Precision]) -> str:
    return " and ".join(p for p in PRECISIONS if p in allowed)


def check_precision(precision: Precision, device: str) -> None:
    """Raise UsageError where `device` does not compute in `precision`: the CPU not in fp16, MPS in fp32 only."""
    kind = device.partition(":")[0]
    if precision == "fp16" and kind == "cpu":
        raise UsageError("precision fp16 is for CUDA devices: the CPU has no fast fp16; use --precision bf16 or fp32")
    if precision != "fp32" and kind == "mps":
        raise UsageError(f"precision {precision} is not tried on mps; use --precision fp32")


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
    global _threads
    import torch

    if count < 1:
        raise UsageError(f"{count} torch threads; use 1 or more")
    _threads = count
    torch.set_num_threads(count)


def thread_count() -> int:
    """How many CPU threads torch was last allowed here; as many as it takes by itself where nobody has said."""
    import torch

    return _threads or torch.get_num_threads()


def set_exact() -> None:
    """Let CUDA compute float32 as float32, with algorithms that give the same bits every time. No effect elsewhere."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def free_cached() -> None:
    """Give back to the devices what torch keeps there of memory that nothing holds any more."""
    import torch

    gc.collect()  # tracebacks and their frames hold each other
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch has no types here
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()


def poisoned(error: BaseException) -> bool:
    """Whether `error`, or what it came of, says that a device failed under a computation, and not for want of memory.

    After most of these CUDA refuses all that the process still asks of it; which, torch does not tell.
    """
    import torch

    named: BaseException | None = error
    while named is not None:
        lost = isinstance(named, torch.AcceleratorError) or DEVICE_FAILED.search(str(named))
        if lost and not isinstance(named, torch.OutOfMemoryError) and "out of memory" not in str(named):
            return True
        named = named.__cause__
    return False


def environment(device: str = "cpu") -> dict[str, str | int]:
    """What decides the last bits of scores in this process, besides the inputs: device, CPU capability, threads, versions.

    Holds no host name, path or time, so that equal environments are equal dictionaries.
    """
    import torch

    cuda = device.startswith("cuda")
    facts: dict[str, str | int] = {
        "device": torch.cuda.get_device_name(device) if cuda else device,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": thread_count(),
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


class Mark(Protocol):
    """A point in a queue."""

    def synchronize(self) -> None:
        """Wait, on the host, until the queue has come to this point."""
        ...


class Queue(Protocol):
    """Work for a device, done in order, beside what other queues do."""

    def run(self, work: Callable[[], object]) -> None:
        """Enqueue what `work` asks of the device."""
        ...

    def mark(self) -> Mark:
        """The point after all that was enqueued so far."""
        ...

    def after(self, mark: Mark) -> None:
        """Let all that is enqueued from now on wait for another queue's `mark`."""
        ...


class Queues(Protocol):
    """What overlapping needs of a device: three queues, memory there, and host memory that it fetches by itself."""

    @property
    def upload(self) -> Queue: ...
    @property
    def compute(self) -> Queue: ...
    @property
    def download(self) -> Queue: ...

    def memory(self, shape: tuple[int, ...], dtype: Literal["uint8", "float32"]) -> torch.Tensor: ...

    def pinned(self, shape: tuple[int, ...], dtype: Literal["uint8", "float32"]) -> torch.Tensor: ...


class CudaQueues:
    """CUDA streams, events and page-locked memory."""

    def __init__(self, device: torch.device) -> None:
        import torch

        self._device = device
        torch.cuda.synchronize(device)  # weights were uploaded in the default stream
        self.upload, self.compute, self.download = (
            _CudaQueue(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]  # torch has no types here
            for _ in range(3)
        )

    def memory(self, shape: tuple[int, ...], dtype: Literal["uint8", "float32"]) -> torch.Tensor:
        import torch

        return torch.empty(shape, dtype=getattr(torch, dtype), device=self._device)

    def pinned(self, shape: tuple[int, ...], dtype: Literal["uint8", "float32"]) -> torch.Tensor:
        import torch

        return torch.empty(shape, dtype=getattr(torch, dtype), pin_memory=True)


class _CudaQueue:
    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def run(self, work: Callable[[], object]) -> None:
        import torch

        with torch.cuda.stream(self._stream):
            work()

    def mark(self) -> Mark:
        import torch

        # A host that waits for it sleeps, and leaves its core to decoding.
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # torch has no types here
        event.record(self._stream)
        return event

    def after(self, mark: Mark) -> None:
        self._stream.wait_event(mark)
