"""Prefix-tuning that starts from the activations of several public rows.

`init_text` has one row a line. Each gives keys and values of the base on its first n tokens, as the start from one text
does (Li and Liang 2021, arXiv 2101.00190, section 7.4); the start is their mean for each layer and token.
"""

from __future__ import annotations

from functools import cached_property

from fedhpc.lazy import Tensor, torch
from fedhpc.methods.prefix import Prefix


class MeanPrefix(Prefix):
    """Prefix-tuning whose first prefix is the mean over the lines of `init_text`."""

    @cached_property
    def anchor(self) -> Tensor:
        """Mean over rows of the keys and values of the first n tokens: (n, width), on the CPU."""
        rows = self.options.init_text.splitlines()
        options = [self.options.model_copy(update={"init_text": row}) for row in rows]
        return torch.stack([Prefix(one, self.base, self.seed).anchor for one in options]).mean(0)
