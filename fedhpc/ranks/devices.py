"""Finds the GPUs that a process may use, and the device that it works on."""

from __future__ import annotations

import torch

from fedhpc.config import Config
from fedhpc.errors import UserError
from fedhpc.ranks import memory
from fedhpc.ranks.launch import Launch


def visible_gpus(config: Config) -> list[str]:
    """Unique ids of the GPUs that this process may use. UserError where cuda is asked for and missing."""
    available = torch.cuda.is_available()
    if config.runtime.device == "cuda" and not available:
        raise UserError("runtime.device: cuda is asked for, but torch sees no GPU here; use cpu or auto")
    if config.runtime.device == "cpu" or not available:
        return []
    return [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]


def device_of(launch: Launch) -> torch.device:
    """The device of this rank in the placement that all ranks have agreed on."""
    gpu = launch.placement.gpus[launch.rank] if launch.placement.gpus else ""
    if not gpu:
        return torch.device("cpu")
    ids = [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]
    return torch.device("cuda", ids.index(gpu))


def memory_of(device: torch.device) -> int:
    """Bytes of memory that there are in all where a rank on `device` computes: of its GPU, or of this machine."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return memory.of_machine()


def peak_memory(device: torch.device) -> int:
    """Largest memory of this process so far, in bytes: allocated on its GPU, else resident."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return memory.peak_resident()
