"""How much memory this host has left for a process."""

from __future__ import annotations

import re
from pathlib import Path


def available_bytes(root: Path = Path("/")) -> int | None:
    """Return the bytes available without swapping, within the limits of a job or container (cgroup v2).

    None if they are unknown. root: the folder with proc and sys. Sources: proc_meminfo(5), MemAvailable; the kernel's
    cgroup-v2.rst, memory.max, memory.current and memory.stat.
    """
    found = [number for number in (_of_host(root), *map(_of_cgroup, _cgroups(root))) if number is not None]
    return min(found, default=None)


def _of_host(root: Path) -> int | None:
    match = re.search(r"^MemAvailable:\s+(\d+) kB", _read(root / "proc/meminfo"), re.MULTILINE)
    return None if match is None else int(match[1]) * 1024


def _cgroups(root: Path) -> list[Path]:
    """Return this process's cgroup and its parents; each may have a limit."""
    match = re.search(r"^0::/(.*)$", _read(root / "proc/self/cgroup"), re.MULTILINE)
    if match is None:
        return []
    top = root / "sys/fs/cgroup"
    own = top / match[1]
    return [own, *(parent for parent in own.parents if parent == top or top in parent.parents)]


def _of_cgroup(cgroup: Path) -> int | None:
    limit, used = _read(cgroup / "memory.max").strip(), _read(cgroup / "memory.current").strip()
    if not limit.isdecimal() or not used.isdecimal():
        return None
    # inactive file pages count as used, but the kernel frees them on demand
    match = re.search(r"^inactive_file (\d+)$", _read(cgroup / "memory.stat"), re.MULTILINE)
    return int(limit) - int(used) + (0 if match is None else int(match[1]))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except OSError:
        return ""
