"""Calling transformers' models, whose arguments differ by class and by version."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

# What holds the keys and values of earlier positions is called `cache` from transformers 5.24 on.
_CACHE = ("cache", "past_key_values")


@cache
def _arguments(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def takes(network: Any, argument: str) -> bool:
    """Whether a model's forward pass has an argument of this name."""
    return argument in _arguments(type(network).forward)


def backbone(network: Any) -> Any:
    """The layers of a causal model, without what makes logits of their states."""
    model = network.base_model if network.base_model is not network else network.model  # Llama 4 misnames it
    return model if takes(model, "input_ids") else model.decoder  # BART and its kind wrap theirs


def cache_argument(network: Any) -> str | None:
    """The argument by which a model's forward pass takes a cache, or None: it has none."""
    return next((name for name in _CACHE if takes(network, name)), None)


def with_cache(network: Any, held: Any) -> dict[str, Any]:
    """The arguments that give a model the cache `held`, which it reads and adds to; None: it shall keep nothing."""
    use = {"use_cache": held is not None} if takes(network, "use_cache") else {}
    return use if held is None else {cache_argument(network) or _CACHE[0]: held, **use}
