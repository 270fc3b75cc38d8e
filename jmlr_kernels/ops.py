"""Every operation of the package as the dispatcher sees it: schema, fake kernel, FLOP formula, backends.

One row of ``_TABLE`` is one operation. The operations hold no autograd: ``function.py`` beside each family
wraps a forward and a backward operation in a ``torch.autograd.Function``. The backend is an argument, resolved
once by :func:`resolve_backend`, so that ``torch.compile``, checkpointing and FLOP counters see one opaque call.
Where none of those is at work, :func:`call` goes straight to the backend.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.compiler import is_compiling
from torch.utils.flop_counter import register_flop_formula

from . import native

NAMESPACE = "jmlr_kernels"
_library = torch.library.Library(NAMESPACE, "DEF")


@dataclass(frozen=True)
class _Operation:
    name: str
    schema: str
    fake: str  # "module:function", same arguments as the operation
    flops: str  # "module:function", shapes in place of tensors
    backends: dict[str, str]  # backend name -> "module:function" or _NATIVE, same arguments less `backend`


_NATIVE = "the operation of the same name in the native library"
_ATTENTION = "jmlr_kernels.shifted_attention"
_MAXSIM = "jmlr_kernels.maxsim"

_TABLE = (
    _Operation(
        "shifted_attention_forward",
        "(Tensor q, Tensor k, Tensor v, int group_size, Tensor? cu_seqlens, Tensor? seq_lens, bool wrap,"
        " float scale, str backend) -> (Tensor, Tensor)",
        fake=f"{_ATTENTION}.function:fake_forward",
        flops=f"{_ATTENTION}.flops:forward_flops",
        backends={
            "cuda": _NATIVE,
            "triton": f"{_ATTENTION}.triton_forward:forward",
            "torch": f"{_ATTENTION}.torch_grouped:forward",
        },
    ),
    _Operation(
        "shifted_attention_backward",
        "(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, int group_size,"
        " Tensor? cu_seqlens, Tensor? seq_lens, bool wrap, float scale, str backend) -> (Tensor, Tensor, Tensor)",
        fake=f"{_ATTENTION}.function:fake_backward",
        flops=f"{_ATTENTION}.flops:backward_flops",
        backends={
            "cuda": _NATIVE,
            "triton": f"{_ATTENTION}.triton_backward:backward",
            "torch": f"{_ATTENTION}.torch_grouped:backward",
        },
    ),
    _Operation(
        "maxsim_forward",
        "(Tensor queries, Tensor documents, Tensor? query_mask, Tensor? document_mask, Tensor? query_weights,"
        " Tensor? cu_seqlens, bool candidates, bool normalize, bool per_token, bool need_winners, int max_length,"
        " str backend) -> (Tensor, Tensor, Tensor, Tensor)",
        fake=f"{_MAXSIM}.function:fake_forward",
        flops=f"{_MAXSIM}.flops:forward_flops",
        backends={
            "cuda": _NATIVE,
            "triton": f"{_MAXSIM}.triton_forward:forward",
            "cpu": _NATIVE,
            "torch": f"{_MAXSIM}.torch_chunked:forward",
        },
    ),
    _Operation(
        "maxsim_backward",
        "(Tensor[] rule_tensors, Tensor queries, Tensor documents, Tensor winners, Tensor? query_mask,"
        " Tensor? document_mask, Tensor? query_weights, Tensor? cu_seqlens, Tensor? query_scales,"
        " Tensor? document_scales, str rule, bool candidates, int max_length, str backend) -> (Tensor, Tensor, Tensor)",
        fake=f"{_MAXSIM}.function:fake_backward",
        flops=f"{_MAXSIM}.flops:backward_flops",
        backends={
            "cuda": _NATIVE,
            "triton": f"{_MAXSIM}.triton_backward:backward",
            "cpu": _NATIVE,
            "torch": f"{_MAXSIM}.torch_chunked:backward",
        },
    ),
    _Operation(
        "maxsim_loss_rows",
        "(Tensor scores, Tensor? target, Tensor temperatures, str rule, str backend) -> Tensor",
        fake=f"{_MAXSIM}.losses:fake_loss_rows",
        flops=f"{_MAXSIM}.flops:no_flops",
        backends={
            "cuda": _NATIVE,
            "triton": f"{_MAXSIM}.triton_losses:loss_rows",
            "cpu": _NATIVE,
            "torch": f"{_MAXSIM}.torch_losses:loss_rows",
        },
    ),
    _Operation(
        "maxsim_quantized_forward",
        "(Tensor queries, Tensor values, Tensor scales, Tensor? query_mask, Tensor? document_mask,"
        " Tensor? query_weights, Tensor? cu_seqlens, bool candidates, str backend) -> Tensor",
        fake=f"{_MAXSIM}.compressed:fake_quantized",
        flops=f"{_MAXSIM}.compressed:quantized_flops",
        backends={
            "cuda": _NATIVE,
            "triton": f"{_MAXSIM}.triton_compressed:quantized_forward",
            "cpu": _NATIVE,
            "torch": f"{_MAXSIM}.torch_compressed:quantized_forward",
        },
    ),
    _Operation(
        "maxsim_residual_forward",
        "(Tensor queries, Tensor codes, Tensor residuals, Tensor centroids, Tensor field_weights, Tensor? query_mask,"
        " Tensor? document_mask, Tensor? query_weights, Tensor? cu_seqlens, bool normalize, bool candidates,"
        " str backend) -> Tensor",
        fake=f"{_MAXSIM}.compressed:fake_residual",
        flops=f"{_MAXSIM}.compressed:residual_flops",
        backends={
            "cuda": _NATIVE,
            "triton": f"{_MAXSIM}.triton_compressed:residual_forward",
            "cpu": _NATIVE,
            "torch": f"{_MAXSIM}.torch_compressed:residual_forward",
        },
    ),
    _Operation(
        "maxsim_smooth_forward",
        "(Tensor queries, Tensor documents, Tensor? query_mask, Tensor? document_mask, Tensor? query_weights,"
        " Tensor? cu_seqlens, bool candidates, float temperature, bool need_maxima, str backend) -> (Tensor, Tensor)",
        fake=f"{_MAXSIM}.smooth:fake_forward",
        flops=f"{_MAXSIM}.flops_smooth:forward_flops",
        backends={
            "cuda": _NATIVE,
            "triton": f"{_MAXSIM}.triton_smooth_forward:forward",
            "cpu": _NATIVE,
            "torch": f"{_MAXSIM}.torch_smooth:forward",
        },
    ),
    _Operation(
        "maxsim_smooth_backward",
        "(Tensor grad_scores, Tensor queries, Tensor documents, Tensor maxima, Tensor? document_mask,"
        " Tensor? query_weights, Tensor? cu_seqlens, bool candidates, float temperature, str backend)"
        " -> (Tensor, Tensor, Tensor)",
        fake=f"{_MAXSIM}.smooth:fake_backward",
        flops=f"{_MAXSIM}.flops_smooth:backward_flops",
        backends={
            "cuda": _NATIVE,
            "triton": f"{_MAXSIM}.triton_smooth_backward:backward",
            "cpu": _NATIVE,
            "torch": f"{_MAXSIM}.torch_smooth:backward",
        },
    ),
)


_ROWS = {operation.name: operation for operation in _TABLE}


@cache
def _load(target: str) -> Callable[..., Any]:
    module, _, function = target.partition(":")
    return getattr(importlib.import_module(module), function)


@cache
def _implementation(name: str, backend: str) -> Callable[..., Any]:
    target = _ROWS[name].backends[backend]
    return native.function(name) if target is _NATIVE else _load(target)


def _register(operation: _Operation) -> None:
    _library.define(operation.name + operation.schema, tags=(torch.Tag.pt2_compliant_tag,))

    def implementation(*args: Any) -> Any:
        return _implementation(operation.name, args[-1])(*args[:-1])

    def fake(*args: Any) -> Any:
        return _load(operation.fake)(*args)

    # CPU and CUDA by name, not a composite key: a meta tensor must reach the fake, never a kernel.
    for device in ("CPU", "CUDA"):
        _library.impl(operation.name, implementation, device)
    torch.library.register_fake(f"{NAMESPACE}::{operation.name}", fake, lib=_library)

    def flops(*args: Any, out_val: Any = None, out_shape: Any = None, **kwargs: Any) -> int:
        return _load(operation.flops)(*args, **kwargs)

    # get_raw: the formula needs the values of cu_seqlens and seq_lens, which shapes alone do not hold.
    register_flop_formula(getattr(getattr(torch.ops, NAMESPACE), operation.name), get_raw=True)(flops)
    if _NATIVE in operation.backends.values():
        native.register_fake(operation.name, lambda *args: fake(*args, ""))


for _operation in _TABLE:
    _register(_operation)


# Bound once: looking them up would cost as much as calling them.
any_autocast = torch._C._is_any_autocast_enabled
# These are torch's own business: a release without one
# of them gets the ordinary ways, some microseconds slower.
try:
    _modes = torch._C._len_torch_dispatch_stack
    _transforms = torch._C._are_functorch_transforms_active
    _tracer = torch._C._get_tracing_state
    _profiled = torch._C._autograd._profiler_enabled
    _is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    _shortcuts = True
except AttributeError:
    _shortcuts = False
_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter, list, str, int, float, bool, type(None)})


def call(operation: str, *arguments: Any) -> Any:
    """The result of a registered operation; its last argument is the backend.

    The dispatcher is for those who watch it: the compiler, a profiler, a mode such as a FLOP counter, a subclass of
    Tensor, a transform, a tracer. Where there is none the backend is called directly, which saves some microseconds.
    """
    if not _shortcuts or is_compiling() or _watched(arguments):
        return getattr(getattr(torch.ops, NAMESPACE), operation).default(*arguments)
    return _implementation(operation, arguments[-1])(*arguments[:-1])


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """``function.apply``, without the microseconds that it spends on functorch where there is none of it."""
    if not _shortcuts or is_compiling() or _transforms() or _is_wrapped(arguments[0]):
        return function.apply(*arguments)
    return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]


def _watched(arguments: tuple[Any, ...]) -> bool:
    if _modes() or _transforms() or _tracer() is not None or _profiled():
        return True
    first = arguments[0]
    if type(first) is list:
        if not _PLAIN.issuperset(map(type, first)):
            return True
        first = first[0]
    return first.is_meta or not _PLAIN.issuperset(map(type, arguments))


# --------------------------------------------------------------------------- backends


def triton_interpreted() -> bool:
    """True when Triton runs its kernels in Python on CPU tensors (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@cache
def _import_problem() -> str | None:
    try:
        importlib.import_module("triton")
    except Exception as error:  # a broken driver or compiler install raises more than ImportError
        return f"triton cannot be imported ({type(error).__name__}: {error}); install triton>=3.6"
    return None


BACKENDS = ("auto", "cuda", "triton", "cpu", "torch")


def _why_not(backend: str, device: torch.device, dtype: torch.dtype, operation: str) -> str | None:
    """Why `backend` cannot run `operation` here, or None when it can."""
    backends = _ROWS[operation].backends
    if backend not in backends:
        others = " or ".join(f"backend={name!r}" for name in backends)
        return f"{operation.removesuffix('_forward')} has no native {backend} kernel; use {others}"
    if backend in ("cuda", "cpu"):
        return native.why_not(_family(operation), backend, device, dtype)
    if backend == "triton":
        if dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"the Triton kernels take float16, bfloat16 and float32, not {dtype}; use backend='torch'"
        if _import_problem():
            return _import_problem()
        if device.type == "cpu" and not triton_interpreted():
            return "Triton runs on CPU tensors only under TRITON_INTERPRET=1; move the tensors to a GPU"
        if device.type == "cpu" and dtype == torch.bfloat16:
            return "Triton's interpreter computes bfloat16 wrongly; use float32 or float16"
        if device.type not in ("cpu", "cuda"):
            return f"the Triton kernels run on CUDA devices, not on {device.type!r}; use backend='torch'"
    return None


def _family(operation: str) -> tuple[str, ...]:
    """The operation and its backward, which must be there too: one backend computes both."""
    backward = operation.replace("_forward", "_backward")
    return (operation, backward) if backward != operation and backward in _ROWS else (operation,)


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)


def resolve_backend(requested: str, tensor: torch.Tensor, operation: str) -> str:
    """The backend that will run `operation` on such a tensor: `requested` itself, or for "auto" the fastest that can.

    Raises:
        ValueError: `requested` is no backend's name.
        RuntimeError: a forced backend cannot run here; the message says why.
    """
    if requested not in BACKENDS:
        raise ValueError(f"backend={requested!r}: choose one of {', '.join(BACKENDS)}")
    return _resolve(requested, tensor.device, tensor.dtype, operation)


def companion_backend(backend: str, tensor: torch.Tensor, operation: str) -> str:
    """The backend of an operation that goes with another one, which runs on `backend`: the same where it can."""
    return _companion(backend, tensor.device, tensor.dtype, operation)


@torch.compiler.assume_constant_result  # what is installed does not change between two calls
def _resolve(requested: str, device: torch.device, dtype: torch.dtype, operation: str) -> str:
    if requested == "auto":
        return _fastest(device, dtype, operation)
    reason = _why_not(requested, device, dtype, operation)
    if reason is not None:
        raise RuntimeError(f"backend={requested!r} cannot run: {reason}")
    return requested


@torch.compiler.assume_constant_result
def _companion(backend: str, device: torch.device, dtype: torch.dtype, operation: str) -> str:
    return _same_or_fastest(backend, device, dtype, operation)


@cache
def _same_or_fastest(backend: str, device: torch.device, dtype: torch.dtype, operation: str) -> str:
    if backend in _ROWS[operation].backends and _why_not(backend, device, dtype, operation) is None:
        return backend
    return _fastest(device, dtype, operation)


@cache
def _fastest(device: torch.device, dtype: torch.dtype, operation: str) -> str:
    if device.type == "cpu":
        reason = _why_not("cpu", device, dtype, operation)
        if reason is None:
            return "cpu"
        missed = native.loaded()
        if "cpu" in _ROWS[operation].backends and missed.problem and not missed.chosen:
            _warn_once(f"jmlr_kernels falls back to plain torch on the CPU: {reason}")
        return "torch"
    if device.type != "cuda":
        return "torch"
    if _why_not("cuda", device, dtype, operation) is None:
        return "cuda"
    reason = _why_not("triton", device, dtype, operation)
    if reason is None:
        return "triton"
    _warn_once(f"jmlr_kernels falls back to plain torch on {device.type}: {reason}")
    return "torch"


def backend_info() -> dict[str, str]:
    """Each backend's name, and "available" or the reason why it cannot run on this machine.

    Where a backend has some of its operations only, the text says which.
    """
    here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {}
    for backend in BACKENDS[1:]:
        device = torch.device("cpu") if backend == "cpu" else here
        rows = [name for name, row in _ROWS.items() if backend in row.backends and not name.endswith("_backward")]
        texts = {
            name.removesuffix("_forward"): _why_not(backend, device, torch.float32, name) or "available"
            for name in rows
        }
        one = len(set(texts.values())) == 1
        found[backend] = texts.popitem()[1] if one else "; ".join(f"{name}: {text}" for name, text in texts.items())
    return found
