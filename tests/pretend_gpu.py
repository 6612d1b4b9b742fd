"""A pretended GPU: tensors that say they are on another device, while the CPU computes them.

Code that mixes devices fails here as it would on a GPU. Each time the CPU would have to wait for a GPU is counted, with
the line of ours that asked for it. The numbers are real, so they can be compared with those of the CPU.

    with PretendGPU() as gpu:
        model.to(gpu.device)
        ...
    gpu.waits

Only operators that PyTorch dispatches are seen: kernels that exist for one device alone, streams and memory are not.
"""

import traceback
from collections import Counter
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend


class _Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


_setup_privateuseone_for_python_backend("pretend", _Backend())
DEVICE = torch.device("pretend", 0)
ROOT = Path(__file__).parents[1]

# Autocast knows the operators of CPUs and of CUDA. Here those that our models use are added, as for CUDA.
HALVED = ("linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "conv1d", "scaled_dot_product_attention")
IN_FULL = ("layer_norm", "softplus", "mse_loss", "cross_entropy_loss", "binary_cross_entropy_with_logits")
_library, _others = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
_others.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")


def _cast_to(dtype: torch.dtype, function):
    """The operator, after its floating-point tensors were cast to `dtype`."""
    cast = lambda x: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    def with_cast(*args, **kwargs):
        with torch.autocast("pretend", enabled=False):
            return function(*tree_map(cast, args), **tree_map(cast, kwargs))

    return with_cast


for _dtype, _names in ((torch.bfloat16, HALVED), (torch.float32, IN_FULL)):
    for _name in _names:
        _library.impl(_name, _cast_to(_dtype, getattr(torch.ops.aten, _name).default), "AutocastPrivateUse1")

aten = torch.ops.aten
READS = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default}
"""Operators whose result the CPU needs."""
SIZED_BY_VALUES = {aten.nonzero.default, aten.masked_select.default, aten.bincount.default}
"""Operators whose result has a size that depends on values."""


class OnGPU(torch.Tensor):
    """A tensor of the pretended GPU; `held` has its values."""

    @staticmethod
    def __new__(cls, held: torch.Tensor):
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, **layout, device=DEVICE)

    def __init__(self, held: torch.Tensor):
        self.held = held

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} outside of the block of PretendGPU")


class PretendGPU(TorchDispatchMode):
    """Within the block, `device` can be computed on.

    Parameters
    ----------
    has_float64 : False refuses float64, as Apple's GPUs do

    Attributes
    ----------
    waits : (what, where) → how often the CPU had to wait
    operators : how often each operator ran on the device
    """

    device = DEVICE

    def __init__(self, has_float64: bool = True):
        super().__init__()
        self.has_float64 = has_float64
        self.waits: Counter = Counter()
        self.operators: Counter = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        ours = [x for x in tensors if isinstance(x, OnGPU)]
        asked = None if kwargs.get("device") is None else torch.device(kwargs["device"])
        lands_here = bool(ours) if asked is None else asked.type == DEVICE.type
        is_copy = func in (aten._to_copy.default, aten.copy_.default)
        if not (ours or lands_here):
            return func(*args, **kwargs)
        if ours and not is_copy and any(x.ndim for x in tensors if not isinstance(x, OnGPU)):
            raise RuntimeError(f"{func}: tensors on {DEVICE} and on the CPU")
        if asked is not None:
            kwargs["device"] = "cpu"
        self._note(func, args, kwargs, ours, lands_here)
        held = lambda x: x.held if isinstance(x, OnGPU) else x
        out = func(*tree_map(held, args), **tree_map(held, kwargs))
        if is_copy and not lands_here:
            return out.clone() if isinstance(out, torch.Tensor) else out
        out = tree_map(lambda x: OnGPU(x) if isinstance(x, torch.Tensor) else x, out)
        if not self.has_float64 and any(x.dtype == torch.float64 for x in tree_leaves(out) if isinstance(x, OnGPU)):
            raise RuntimeError(f"{func}: float64 on {DEVICE}")
        return return_and_correct_aliasing(func, args, kwargs, out)

    def _note(self, func, args, kwargs, ours, lands_here: bool) -> None:
        """Count the operator, and a wait if it makes one."""
        self.operators[str(func)] += 1
        by_mask = func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default) and any(
            x is not None and x.dtype == torch.bool for x in args[1]
        )
        goes_back = func is aten._to_copy.default and not lands_here
        onto_cpu = func is aten.copy_.default and not isinstance(args[0], OnGPU)
        unsized = func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None
        if func in READS | SIZED_BY_VALUES or by_mask or goes_back or onto_cpu or unsized:
            frames = [f for f in traceback.extract_stack() if Path(f.filename).is_relative_to(ROOT)]
            ours = [f for f in frames if f.filename != __file__ and ".venv" not in f.filename]
            where = f"{Path(ours[-1].filename).relative_to(ROOT)}:{ours[-1].lineno}" if ours else ""
            self.waits[func.__name__.split(".")[0], where] += 1
