"""The memory of this machine: how much of it there is, and settings that save training on a CPU from waiting for it.

Settings of the C library and the kernel must be made before torch allocates its first memory, so this module imports
nothing heavy.
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from collections.abc import Mapping
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt(3)
_MADV_HUGEPAGE = 14  # of Linux's madvise(2)
_ADDRESSES = (resource.RLIMIT_AS, resource.RLIMIT_DATA)
_HUGE = 2**21
_HEAP = 2**30 - _HUGE  # just less than an allocation that would be mapped separately


def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors for the next ones.

    Otherwise every large tensor is mapped, cleared page by page by the kernel and unmapped again in each step, which
    takes up to a tenth of the time of local training on a CPU. Other C libraries have no such setting.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        if not mallopt(M_MMAP_THRESHOLD, 2**30):
            mallopt(
                M_MMAP_THRESHOLD, 2**25
            )  # the limit of older versions; once set, they no longer raise it by themselves
        mallopt(M_TRIM_THRESHOLD, -1)
        _ask_for_huge_pages()


def return_freed_memory() -> None:
    """Let glibc give the memory of freed tensors back to the kernel at once.

    For a process that gathers one layer of a spread base after the other: kept, they would leave holes of many sizes,
    which soon take more than its part of the base.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**17)  # as it is at first; once set, glibc no longer raises it by itself


def _ask_for_huge_pages() -> None:
    """Ask the kernel to use pages of 2 MiB for the heap.

    The tensors of a step are larger than what a core's TLB covers with pages of 4 KiB, and with those a step takes 2 to
    12 % longer. The kernel takes this advice only for mapped memory, so the heap is grown at once; its unused part
    takes no memory.
    """
    libc = ctypes.CDLL(None)
    # Where the address space is limited, leave it to the libraries.
    rationed = any(resource.getrlimit(limit)[0] != resource.RLIM_INFINITY for limit in _ADDRESSES)
    if rationed or not hasattr(libc, "madvise"):
        return
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    start = libc.malloc(_HEAP)
    if start:
        first, end = (start + _HUGE - 1) // _HUGE * _HUGE, (start + _HEAP) // _HUGE * _HUGE
        libc.madvise(first, end - first, _MADV_HUGEPAGE)  # fails without harm where the kernel has none
        libc.free(start)


def peak_resident() -> int:
    """The most bytes of memory that this process has had resident, from its start on.

    getrusage would say that of the process that started it where that was larger: Linux hands it down (execve).
    """
    status = Path("/proc/self/status")
    if status.exists():
        of_lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        if "VmHWM" in of_lines:
            return int(of_lines["VmHWM"].split()[0]) * 1024
    # Other systems: macOS counts in bytes, the others in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def of_machine(environ: Mapping[str, str] = os.environ, root: Path = Path("/")) -> int:
    """Bytes that this job may take on this machine: its memory, or less where a cgroup or Slurm gives less of it."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_of_cgroups(root)]
    if int(environ.get("SLURM_MEM_PER_NODE", 0)):  # in MiB; 0: all of it
        limits.append(int(environ["SLURM_MEM_PER_NODE"]) * 2**20)
    elif "SLURM_MEM_PER_CPU" in environ and "SLURM_CPUS_ON_NODE" in environ:
        limits.append(int(environ["SLURM_MEM_PER_CPU"]) * int(environ["SLURM_CPUS_ON_NODE"]) * 2**20)
    return min(limits)


def _of_cgroups(root: Path) -> list[int]:
    """The limits of this process's cgroup and of those around it; both versions of cgroups."""
    limits = []
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # another kernel
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top, name = (root / "sys/fs/cgroup/memory", "memory.limit_in_bytes") if controllers else (
            root / "sys/fs/cgroup", "memory.max"
        )  # fmt: skip
        inner = top / path.lstrip("/")
        for folder in (inner, *inner.parents):
            if folder == top.parent:
                break
            try:
                limit = (folder / name).read_text().strip()
            except OSError:  # a namespace hides it, or it is the root, which has none
                continue
            if limit != "max":
                limits.append(int(limit))
    return limits
