"""What the tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_token_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDHPC_CACHE", str(tmp_path_factory.getbasetemp() / "tokens"))


@pytest.fixture
def shared() -> Path:
    """The folder with real data and models beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip("the folder shared/ with real data and models is not beside the checkout")
    return SHARED
