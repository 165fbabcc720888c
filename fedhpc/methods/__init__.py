"""Ways to customize: one file or folder per method, named as in the configuration; `base` says what a method is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedhpc import registry
from fedhpc.methods._head import with_head as with_head
from fedhpc.methods.base import Method
from fedhpc.models.load import check_length

if TYPE_CHECKING:
    from fedhpc.models.base import Base


def make_method(options: Any, base: Base, seed: int, max_length: int) -> Method:
    """Make the method that the section `method` of a configuration names; a base that has a head trains it too.

    max_length: how many tokens the longest text has. UserError where the base has too few positions for these and the
    method's virtual tokens.
    """
    cls: type[Method] = registry.choice("methods", options.name)
    method = cls(options, base, seed)
    check_length(base, max_length, method.virtual_tokens)
    return with_head(method)


def require_layers(method: Method) -> None:
    """UserError where something that is trained is in no layer, which client.layer_lr_decay asks of all."""
    for name in method.trainable.shapes:
        method.layers_above(name)
