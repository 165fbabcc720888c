"""What a process asks of the allocator and the kernel, so that training on a CPU does not wait for memory.

Light, for it must be done before torch takes its first memory.
"""

from __future__ import annotations

import ctypes
import resource

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt(3)
_MADV_HUGEPAGE = 14  # of Linux's madvise(2)
_ADDRESSES = (resource.RLIMIT_AS, resource.RLIMIT_DATA)
_HUGE = 2**21
_HEAP = 2**30 - _HUGE  # below what is mapped by itself


def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors for the next ones.

    Otherwise every large one is mapped, cleared page by page by the kernel and unmapped again in each step, up to a
    tenth of the time of local training on a CPU. Other C libraries have no such call.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        if not mallopt(M_MMAP_THRESHOLD, 2**30):
            mallopt(M_MMAP_THRESHOLD, 2**25)  # older versions take no more, and no longer raise it by themselves
        mallopt(M_TRIM_THRESHOLD, -1)
        _ask_for_huge_pages()


def _ask_for_huge_pages() -> None:
    """Let the kernel back what the heap will grow into by pages of 2 MiB, as it is used.

    The tensors of a step are more than a core's TLB reaches by pages of 4 KiB, and a step takes 2 to 12 % longer. The
    advice holds for mapped memory alone, so the heap is grown at once; what is not used of it takes no memory.
    """
    libc = ctypes.CDLL(None)
    # Where addresses are rationed they are for libraries.
    rationed = any(resource.getrlimit(limit)[0] != resource.RLIM_INFINITY for limit in _ADDRESSES)
    if rationed or not hasattr(libc, "madvise"):
        return
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    start = libc.malloc(_HEAP)
    if start:
        first, end = (start + _HUGE - 1) // _HUGE * _HUGE, (start + _HEAP) // _HUGE * _HUGE
        libc.madvise(first, end - first, _MADV_HUGEPAGE)  # a kernel without them says no, and all stays as it is
        libc.free(start)
