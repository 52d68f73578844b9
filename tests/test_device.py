"""Device choice on made-up machines, and core and memory limits read from made-up systems."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pathology.cores import (
    core_count,
    memory_bytes,
    memory_limit_bytes,
    parse_available,
    parse_bytes,
    parse_cgroups,
    parse_cpu_max,
    parse_cpu_quota,
    parse_stat,
    reading_processes,
)
from pathology.device import (
    TorchFacts,
    accelerator_possible,
    choose_device,
    choose_precision,
    device_count,
    environment,
    nvidia_present,
    set_exact,
    set_threads,
)
from pathology.errors import EnvironmentFault, UsageError
from pathology.job import PRECISIONS, Precision
from pathology.plan import regions_at_once

CPU_TORCH = TorchFacts("2.13.0+cpu", cuda_build=False, cuda_count=0, mps=False)
CUDA_TORCH = TorchFacts("2.13.0", cuda_build=True, cuda_count=2, mps=False)
BLIND_TORCH = TorchFacts("2.13.0", cuda_build=True, cuda_count=0, mps=False)
APPLE_TORCH = TorchFacts("2.13.0", cuda_build=False, cuda_count=0, mps=True)


@pytest.mark.parametrize(
    ("name", "facts", "nvidia", "chosen"),
    [
        ("auto", CPU_TORCH, False, "cpu"),
        ("auto", CUDA_TORCH, True, "cuda"),
        ("auto", APPLE_TORCH, False, "mps"),
        ("auto", BLIND_TORCH, False, "cpu"),
        ("cpu", CPU_TORCH, True, "cpu"),
        ("cpu", CUDA_TORCH, True, "cpu"),
        ("cuda", CUDA_TORCH, True, "cuda"),
        ("cuda:1", CUDA_TORCH, True, "cuda:1"),
        ("mps", APPLE_TORCH, False, "mps"),
    ],
)
def test_device_is_the_best_that_torch_can_use(name: str, facts: TorchFacts, nvidia: bool, chosen: str) -> None:
    assert choose_device(name, facts, nvidia) == chosen


@pytest.mark.parametrize(
    ("name", "facts", "nvidia", "message"),
    [
        ("auto", CPU_TORCH, True, r"2\.13\.0\+cpu is built without CUDA: install a CUDA build of torch, or pass --device cpu"),
        ("cuda", CPU_TORCH, True, "is built without CUDA"),
        ("auto", BLIND_TORCH, True, "sees none: check the driver, or pass --device cpu"),
        ("cuda", CPU_TORCH, False, "device cuda was asked for, but torch .* sees no CUDA device"),
        ("cuda:2", CUDA_TORCH, True, "torch sees 2: cuda:0 to cuda:1"),
        ("mps", CPU_TORCH, False, "device mps was asked for"),
    ],
)
def test_device_that_cannot_be_used_is_an_environment_fault(name: str, facts: TorchFacts, nvidia: bool, message: str) -> None:
    with pytest.raises(EnvironmentFault, match=message):
        choose_device(name, facts, nvidia)


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cuda:-1", "CPU", ""])
def test_unknown_device_names_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="use auto, cpu, cuda, cuda:N or mps"):
        choose_device(name, CPU_TORCH, False)


def fake_smi(folder: Path, body: str) -> str:
    folder.mkdir(exist_ok=True)
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{body}\n")
    tool.chmod(0o755)
    return str(folder)


def test_nvidia_devices_are_seen_without_torch(tmp_path: Path) -> None:
    assert not nvidia_present(tmp_path, {})
    (tmp_path / "proc/driver/nvidia/gpus").mkdir(parents=True)
    assert not nvidia_present(tmp_path, {})  # a driver without a device
    (tmp_path / "proc/driver/nvidia/gpus/0000:01:00.0").mkdir()
    assert nvidia_present(tmp_path, {})
    assert nvidia_present(tmp_path, {"CUDA_VISIBLE_DEVICES": "1"})
    assert not nvidia_present(tmp_path, {"CUDA_VISIBLE_DEVICES": ""})  # hidden on purpose
    assert not nvidia_present(tmp_path, {"CUDA_VISIBLE_DEVICES": "-1"})


def test_nvidia_device_node_or_tool_is_enough(tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidiactl").touch()
    assert not nvidia_present(tmp_path, {})
    (tmp_path / "dev/nvidia3").touch()
    assert nvidia_present(tmp_path, {})
    nothing = tmp_path / "nothing"
    assert nvidia_present(nothing, {"PATH": fake_smi(tmp_path / "a", 'echo "GPU 0: Some Model (UUID: x)"')})
    assert not nvidia_present(nothing, {"PATH": fake_smi(tmp_path / "b", "echo 'no devices were found'")})
    assert not nvidia_present(nothing, {"PATH": fake_smi(tmp_path / "c", "echo 'GPU 0: lost'; exit 9")})


NEW_CUDA = TorchFacts("2.13.0", cuda_build=True, cuda_count=2, mps=False, cuda_bf16=True)


@pytest.mark.parametrize(
    ("name", "device", "network", "facts", "chosen"),
    [
        ("auto", "cuda", True, NEW_CUDA, "bf16"),
        ("auto", "cuda:1", True, CUDA_TORCH, "fp16"),
        ("auto", "cuda", False, NEW_CUDA, "fp32"),
        ("auto", "cpu", True, NEW_CUDA, "fp32"),
        ("auto", "mps", True, APPLE_TORCH, "fp32"),
        ("fp32", "cuda", False, NEW_CUDA, "fp32"),
        ("fp16", "cuda", True, NEW_CUDA, "fp16"),
        ("bf16", "cuda", True, NEW_CUDA, "bf16"),
        ("bf16", "cpu", True, CPU_TORCH, "bf16"),
    ],
)
def test_precision_is_settled_in_the_driver(name: str, device: str, network: bool, facts: TorchFacts, chosen: str) -> None:
    assert choose_precision(name, device, PRECISIONS if network else (), "own", facts) == chosen


@pytest.mark.parametrize(
    ("name", "device", "network", "facts", "message"),
    [
        ("fp16", "cpu", True, CPU_TORCH, "the CPU has no fast fp16; use --precision bf16 or fp32"),
        ("bf16", "cuda", True, CUDA_TORCH, "device cuda does not compute in bf16; use --precision fp16 or auto"),
        ("bf16", "mps", True, APPLE_TORCH, "precision bf16 is not tried on mps"),
        ("bf16", "cpu", False, CPU_TORCH, "this one is none; use fp32 or auto"),
        ("fp8", "cuda", True, NEW_CUDA, "precision 'fp8' is not known"),
    ],
)
def test_precisions_that_are_not_to_be_had_are_refused(
    name: str, device: str, network: bool, facts: TorchFacts, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        choose_precision(name, device, PRECISIONS if network else (), "own", facts)


@pytest.mark.parametrize(
    ("name", "device", "allowed", "facts", "chosen"),
    [
        ("auto", "cuda", ("fp32",), NEW_CUDA, "fp32"),
        ("auto", "cuda", ("fp32", "fp16"), NEW_CUDA, "fp16"),
        ("auto", "cuda:1", ("fp32", "bf16"), CUDA_TORCH, "fp32"),  # which has no bf16
        ("auto", "cpu", ("bf16", "fp16"), CPU_TORCH, "bf16"),
        ("bf16", "cpu", ("bf16",), CPU_TORCH, "bf16"),
    ],
)
def test_a_precision_is_one_that_the_card_allows(
    name: str, device: str, allowed: tuple[Precision, ...], facts: TorchFacts, chosen: str
) -> None:
    assert choose_precision(name, device, allowed, "own", facts) == chosen


@pytest.mark.parametrize(
    ("name", "device", "allowed", "message"),
    [
        ("bf16", "cpu", ("fp32",), "model own allows fp32 only, by its card; use --precision fp32"),
        ("fp32", "cuda", ("fp16", "bf16"), "allows bf16 and fp16 only, by its card; use --precision bf16 or --precision fp16"),
        ("auto", "cpu", ("fp16",), "model own allows fp16 only, by its card, which cpu does not compute in"),
        ("auto", "mps", ("bf16",), "model own allows bf16 only, by its card, which mps does not compute in"),
    ],
)
def test_a_precision_that_the_card_does_not_allow_is_refused(
    name: str, device: str, allowed: tuple[Precision, ...], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        choose_precision(name, device, allowed, "own", NEW_CUDA)


def test_device_count() -> None:
    assert device_count("cpu") == 1
    assert (device_count("cuda", CUDA_TORCH), device_count("mps", CUDA_TORCH)) == (2, 0)
    assert (device_count("cuda", APPLE_TORCH), device_count("mps", APPLE_TORCH)) == (0, 1)
    with pytest.raises(UsageError, match="device kind 'tpu'"):
        device_count("tpu")


def test_choosing_the_cpu_imports_no_torch() -> None:
    code = "import sys; from pathology.device import choose_device; choose_device('cpu'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_environment_names_what_decides_bits_and_no_machine() -> None:
    import torch

    before = torch.get_num_threads()
    try:
        set_threads(1)
        facts = environment()
        assert facts["threads"] == 1
        set_threads(2)
        assert environment() == {**facts, "threads": 2}
    finally:
        set_threads(before)
    assert facts["torch"] == torch.__version__
    assert facts["device"] == "cpu"
    assert {"cpu", "numpy", "pillow", "imagecodecs", "openslide-bin"} <= facts.keys()
    assert os.uname().nodename not in facts.values()
    with pytest.raises(UsageError, match="0 torch threads"):
        set_threads(0)


def test_exact_float32_is_set_without_a_warning() -> None:
    import torch

    set_exact()
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.deterministic


# Cores and memory


def test_parsers() -> None:
    assert parse_cpu_max("150000 100000\n") == 1.5
    assert parse_cpu_max("max 100000\n") is None
    assert parse_cpu_max("") is None
    assert parse_cpu_quota("-1\n", "100000\n") is None
    assert parse_cpu_quota("50000", "100000") == 0.5
    assert parse_cpu_quota("50000", "0") is None
    assert parse_bytes("max\n") is None
    assert parse_bytes("9223372036854771712\n") is None
    assert parse_bytes("1073741824\n") == 1 << 30
    assert parse_bytes("") is None
    assert parse_stat("anon 5\ninactive_file 4096\n", "inactive_file") == 4096
    assert parse_stat("anon 5\n", "inactive_file") == 0
    assert parse_available("MemTotal: 10 kB\nMemAvailable:   2048 kB\n") == 2 << 20
    assert parse_available("MemTotal: 10 kB\n") is None
    assert parse_cgroups("4:memory:/a\n2:cpu,cpuacct:/b:c\n0::/d\n") == {
        "memory": "/a",
        "cpu": "/b:c",
        "cpuacct": "/b:c",
        "": "/d",
    }
    assert parse_cgroups("") == {}


def system(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": "MemAvailable: 1048576 kB\n", **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.fixture
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 5})


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 4),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/cpu.max": "max 100000",
                "sys/fs/cgroup/a/cpu.max": "150000 100000",
            },
            2,
        ),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "20000 100000"}, 1),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "900000 100000"}, 4),
        # a container that is told its path on the host: its own group is the mount
        ({"proc/self/cgroup": "0::/kubepods/x\n", "sys/fs/cgroup/cpu.max": "300000 100000"}, 3),
        ({"proc/self/cgroup": "0::/../x\n", "sys/fs/cgroup/cpu.max": "300000 100000"}, 3),
        (
            {
                "proc/self/cgroup": "3:cpu:/c\n",
                "sys/fs/cgroup/cpu/c/cpu.cfs_quota_us": "250000",
                "sys/fs/cgroup/cpu/c/cpu.cfs_period_us": "100000",
            },
            3,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu:/c\n",
                "sys/fs/cgroup/cpu/c/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/c/cpu.cfs_period_us": "100000",
            },
            4,
        ),
    ],
)
@pytest.mark.usefixtures("four_cores")
def test_cores_are_what_affinity_and_cgroups_allow(tmp_path: Path, files: dict[str, str], cores: int) -> None:
    assert core_count(system(tmp_path, files)) == cores


@pytest.mark.parametrize(("cores", "processes"), [(0, 1), (1, 1), (2, 1), (7, 1), (8, 2), (16, 4), (32, 8), (256, 8)])
def test_on_many_cores_several_processes_read(cores: int, processes: int) -> None:
    assert reading_processes(cores) == processes
    assert regions_at_once(cores) == max(2, processes)


GIB = 1 << 30
V2 = {
    "proc/self/cgroup": "0::/a\n",
    "sys/fs/cgroup/a/memory.max": f"{GIB // 2}",
    "sys/fs/cgroup/a/memory.current": f"{GIB // 4}",
}
V1 = {
    "proc/self/cgroup": "4:memory:/m\n0::/\n",
    "sys/fs/cgroup/memory/m/memory.limit_in_bytes": f"{GIB // 2}",
    "sys/fs/cgroup/memory/m/memory.usage_in_bytes": f"{GIB // 4}",
    "sys/fs/cgroup/memory/m/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB // 8}\n",
}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, GIB),
        (V2, GIB // 4),
        ({**V2, "sys/fs/cgroup/a/memory.stat": f"inactive_file {GIB // 8}\n"}, GIB * 3 // 8),
        ({**V2, "sys/fs/cgroup/a/memory.max": "max"}, GIB),
        ({**V2, "sys/fs/cgroup/a/memory.current": f"{GIB}"}, 0),
        ({**V2, "sys/fs/cgroup/memory.max": f"{GIB // 4}", "sys/fs/cgroup/memory.current": f"{GIB // 8}"}, GIB // 8),
        (V1, GIB * 3 // 8),
        ({**V1, "sys/fs/cgroup/memory/m/memory.limit_in_bytes": "9223372036854771712"}, GIB),
    ],
)
def test_memory_is_what_machine_and_cgroups_leave(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    assert memory_limit_bytes(system(tmp_path, files)) == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [({}, None), (V2, GIB // 2), (V1, GIB // 2), ({**V2, "sys/fs/cgroup/memory.max": f"{GIB // 8}"}, GIB // 8)],
)
def test_the_whole_memory_is_that_of_machine_or_cgroup_whoever_has_it(
    tmp_path: Path, files: dict[str, str], expected: int | None
) -> None:
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert memory_bytes(system(tmp_path, files)) == (expected or physical)


def test_this_machine_has_cores_and_memory() -> None:
    assert 1 <= core_count() <= (os.cpu_count() or 1)
    assert memory_limit_bytes() > 0


def test_a_machine_without_accelerators_is_known_without_torch(tmp_path: Path) -> None:
    assert not accelerator_possible(tmp_path, {"PATH": ""})
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "kfd").touch()
    assert accelerator_possible(tmp_path, {"PATH": ""})
