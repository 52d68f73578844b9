"""How many cores and how much memory this process may use, by affinity and cgroup limits; how many processes read with them.

Promise: never more than what the machine, the affinity mask and every enclosing cgroup allow. The parsers are pure.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

# cgroup v1 writes "no limit" as the largest multiple of the page size.
NO_LIMIT_BYTES = 1 << 60

# Cores that one process can keep busy with decoding. What it does between two tiles its threads do one at a time, for Python's
# lock: four of them were 3.4 times as fast as one, eight 5.0 times, sixteen 4.3 times.
CORES_A_PROCESS = 4
# More processes read no faster than one device infers, and each takes memory.
MOST_PROCESSES = 8


def core_count(system: Path = Path("/")) -> int:
    """Whole cores for this process: the smaller of the affinity mask and the cgroups' CPU limit rounded up; at least 1.

    `system` is the root under which /proc and /sys are looked for.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limits = [allowed]
    for folder in _cgroup_folders(system, "cpu"):
        quota = parse_cpu_max(_read(folder / "cpu.max"))
        if quota is None:
            quota = parse_cpu_quota(_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us"))
        if quota is not None:
            limits.append(math.ceil(quota))
    return max(1, min(limits))


def reading_processes(cores: int) -> int:
    """How many processes read slides for a device that has so many cores beside it."""
    return max(1, min(MOST_PROCESSES, cores // CORES_A_PROCESS))


def memory_limit_bytes(system: Path = Path("/")) -> int:
    """Bytes this process may still take: the smaller of free memory and what each cgroup's limit leaves; at least 0.

    File cache that the kernel can drop at once counts as free.
    """
    free = parse_available(_read(system / "proc/meminfo"))
    limits = [_physical_bytes() if free is None else free]
    for folder in _cgroup_folders(system, "memory"):
        for limit_name, usage_name, cache_name in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit, usage = parse_bytes(_read(folder / limit_name)), parse_bytes(_read(folder / usage_name))
            if limit is not None and usage is not None:
                cache = parse_stat(_read(folder / "memory.stat"), cache_name)
                limits.append(limit - max(0, usage - cache))
    return max(0, min(limits))


def memory_bytes(system: Path = Path("/")) -> int:
    """Bytes of memory of the machine, or of the smallest cgroup around this process, whoever has taken how much of it."""
    folders = _cgroup_folders(system, "memory")
    limits = [parse_bytes(_read(folder / name)) for folder in folders for name in ("memory.max", "memory.limit_in_bytes")]
    return min(limit for limit in (_physical_bytes(), *limits) if limit is not None)


def _physical_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def parse_cpu_max(text: str) -> float | None:
    """Cores allowed by a cgroup v2 `cpu.max` ("200000 100000"); None for "max 100000" or anything else."""
    words = text.split()
    if len(words) != 2:
        return None
    return parse_cpu_quota(*words)


def parse_cpu_quota(quota: str, period: str) -> float | None:
    """Cores allowed by a quota and a period in the same unit; None where the quota is "max", -1, or no number."""
    try:
        share, whole = int(quota), int(period)
    except ValueError:
        return None
    return share / whole if share > 0 and whole > 0 else None


def parse_bytes(text: str) -> int | None:
    """The number in a cgroup's memory file; None for "max", nothing, or v1's number for "no limit"."""
    try:
        number = int(text)
    except ValueError:
        return None
    return number if 0 <= number < NO_LIMIT_BYTES else None


def parse_stat(text: str, name: str) -> int:
    """The value of `name` in a `memory.stat`; 0 where it is missing."""
    for line in text.splitlines():
        words = line.split()
        if len(words) == 2 and words[0] == name and words[1].isdigit():
            return int(words[1])
    return 0


def parse_available(text: str) -> int | None:
    """MemAvailable of /proc/meminfo in bytes; None where it is missing."""
    for line in text.splitlines():
        words = line.split()
        if len(words) == 3 and words[0] == "MemAvailable:" and words[1].isdigit() and words[2] == "kB":
            return int(words[1]) * 1024
    return None


def parse_cgroups(text: str) -> dict[str, str]:
    """Controller -> path from /proc/self/cgroup; cgroup v2's single hierarchy has the name ""."""
    groups = {}
    for line in text.splitlines():
        fields = line.split(":", 2)
        if len(fields) == 3:
            groups.update(dict.fromkeys(fields[1].split(","), fields[2]))
    return groups


def _cgroup_folders(system: Path, controller: str) -> list[Path]:
    """The folders of this process's cgroups for `controller`, v2 and v1, with all that enclose them.

    In a container the path named in /proc may not exist below the mount; then the mount itself is the container's group.
    """
    mount = system / "sys/fs/cgroup"
    folders = []
    groups = parse_cgroups(_read(system / "proc/self/cgroup"))
    for name, root in (("", mount), ("", mount / "unified"), (controller, mount / controller)):
        if name not in groups or not root.is_dir():
            continue
        folder = root / groups[name].lstrip("/")
        while folder != root and root in folder.parents:
            folders.append(folder)
            folder = folder.parent
        folders.append(root)
    return folders


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
