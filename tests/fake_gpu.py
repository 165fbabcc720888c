"""A GPU that computes nothing: tensors on it have a shape, a dtype and a device, those on the CPU are real.

What a real one would refuse raises here too (tensors of two devices in one operation, dtypes that do not fit), and
what would make the program wait for it is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import extract_stack
from typing import Any

import pytest
import torch
import torch._dynamo  # before `_make_subclass` is replaced, which it looks at
import transformers.utils.import_utils
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

import fedhpc

GPU = torch.device("cuda:0")
READ, PAGEABLE = "a value is read from the GPU", "a copy from pageable memory to the GPU"
PACKAGE = str(Path(fedhpc.__file__).parent) + "/"
_aten = torch.ops.aten
_PRODUCTS = {_aten.mm, _aten.bmm, _aten.mv, _aten.dot, _aten.addmm, _aten.addmm_, _aten.baddbmm, _aten.baddbmm_}


class FakeGPU(FakeTensorMode):
    """Under it `GPU` can be used. `waits`: how often, and in which line, the program would have waited for it."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.waits: Counter[tuple[str, str]] = Counter()
        self.operators = 0
        self.pinned: list[torch.Tensor] = []

    def dispatch(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        to = kwargs.get("device")
        if to is not None and to.type == "meta":  # what a fake tensor's device is in C++
            to = kwargs["device"] = GPU
        there = any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs)))
        if not there and (to is None or to.type == "cpu"):
            return function(*args, **kwargs)
        self.operators += 1
        if function.overloadpacket in _PRODUCTS and len({t.dtype for t in tree_leaves(args) if _is_tensor(t)}) > 1:
            raise RuntimeError(f"{function} of tensors of two dtypes")  # which shapes alone do not tell
        if function is _aten._fused_sdp_choice.default:
            return 0
        if function is _aten._local_scalar_dense.default:
            self._wait(READ)
            return 0.0 if args[0].is_floating_point() else 0
        if function is _aten._to_copy.default and there and to is not None and to.type == "cpu":
            self._wait(READ)
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if function is _aten._to_copy.default and not there:
            waits = not kwargs.get("non_blocking") or all(args[0] is not pinned for pinned in self.pinned)
            self._wait(PAGEABLE, waits)
        if function is _aten.copy_.default and not all(isinstance(t, FakeTensor) for t in args[:2]):
            to_it = isinstance(args[0], FakeTensor)
            quick = to_it and any(args[2:]) and any(args[1] is pinned for pinned in self.pinned)
            self._wait(PAGEABLE if to_it else READ, not quick)
            if not isinstance(args[0], FakeTensor):
                return args[0]
        return super().dispatch(function, types, args, kwargs)

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """`Tensor.pin_memory`, which needs a driver."""
        self.pinned.append(tensor.clone())
        return self.pinned[-1]

    def _wait(self, why: str, waits: bool = True) -> None:
        if waits:
            lines = [f"{f.filename}:{f.lineno}" for f in extract_stack() if f.filename.startswith(PACKAGE)]
            self.waits[why, lines[-1].removeprefix(PACKAGE) if lines else "elsewhere"] += 1


class _Autocast(TorchFunctionMode):
    """CUDA's autocast for fake tensors, in which C++ sees no GPU: the operations that are used here."""

    HALF = frozenset(
        ["linear", "matmul", "__matmul__", "mm", "bmm", "mv", "addmm", "baddbmm", "scaled_dot_product_attention"]
    )
    FLOAT = frozenset(
        [
            "layer_norm",
            "softmax",
            "log_softmax",
            "cross_entropy",
            "rsqrt",
            "exp",
            "log",
            "pow",
            "__pow__",
            "sum",
            "norm",
            "cumsum",
        ]
    )

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if torch.is_autocast_enabled("cuda") and "out" not in kwargs and name in self.HALF | self.FLOAT:
            dtype = torch.get_autocast_dtype("cuda") if name in self.HALF else torch.float32
            args, kwargs = tree_map(lambda leaf: _cast(leaf, dtype), (args, kwargs))
        return function(*args, **kwargs)


def _cast(leaf: Any, dtype: torch.dtype) -> Any:
    exact = not isinstance(leaf, FakeTensor) or not leaf.is_floating_point() or leaf.dtype == torch.float64
    return leaf if exact else leaf.to(dtype)


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor)


@contextmanager
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGPU]:
    """A `FakeGPU`, with what the libraries ask of a driver or do otherwise for fake tensors taken out of the way."""
    make = torch.Tensor._make_subclass  # type: ignore[attr-defined]

    def on_meta(
        *args: Any, dispatch_device: bool = False, dispatch_sizes_strides_policy: Any = None, **others: Any
    ) -> Any:
        # In C++ its device is "meta": autograd would ask CUDA for streams.
        return make(*args, **{name: value for name, value in others.items() if value is not None})

    with monkeypatch.context() as patch, FakeGPU() as gpu, _Autocast():
        patch.setattr(torch.Tensor, "_make_subclass", staticmethod(on_meta))
        patch.setattr(torch.Tensor, "pin_memory", lambda tensor: gpu.pin(tensor))
        patch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
        patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        # transformers reads no values from fake tensors, but does from those on a GPU.
        patch.setattr(transformers.utils.import_utils, "is_fake_tensor", lambda _: False)
        try:
            torch.ones(1).to(GPU)
        except RuntimeError as error:
            pytest.skip(f"torch {torch.__version__} copies to a fake GPU in earnest: {str(error).splitlines()[0][:60]}")
        gpu.waits.clear()
        gpu.operators = 0
        yield gpu
