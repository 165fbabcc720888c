"""The embedded default: the data `builtin:<task>` and the base `builtin`, both without a download.

Light: importing it needs neither torch nor transformers. `world` writes the data, `pretrain` made the base.
"""

from __future__ import annotations

from pathlib import Path

from fedhpc.builtin.world import SPLITS, TASKS, rows

__all__ = ["SPLITS", "TASKS", "base_path", "rows"]


def base_path() -> Path:
    """The folder of the built-in base: loads with AutoModelForCausalLM and AutoTokenizer."""
    return Path(__file__).resolve().parent / "base"
