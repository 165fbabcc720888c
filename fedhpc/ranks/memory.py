"""Settings of the C library and the kernel that save training on a CPU from waiting for memory.

They must be made before torch allocates its first memory, so this module imports nothing heavy.
"""

from __future__ import annotations

import ctypes
import resource

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
