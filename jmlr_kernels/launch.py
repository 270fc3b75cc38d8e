"""One way from Python to a Triton kernel, short for launches whose kernel is compiled already.

Triton's own launcher binds and classifies every argument anew at each call, some tens of microseconds for kernels with
as many arguments as ours: more than the kernel itself takes for a small batch. Here the compiled kernel is remembered
under the few facts that Triton specialises on, and called directly. A profiler's launch hooks run; what Triton looks up
anew at each call (its debug switch, pre-run hooks, changed globals) holds as it was at a kernel's first launch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Options = tuple[int, int, int | None]  # warps, stages, most registers of a thread


# Positions of the integers that a kernel is not specialised on, by kernel.
_plain: dict[Any, frozenset[int]] = {}
_compiled: dict[tuple[Any, ...], Any] = {}


def launch(
    kernel: Any, programs: int, arguments: tuple[Any, ...], constants: tuple[Any, ...], options: Options
) -> None:
    """Start `programs` programs of a ``@triton.jit`` kernel on the current stream of the arguments' device.

    `arguments` are the kernel's parameters up to its compile-time ones, in order: tensors, descriptors of tensors,
    integers or None (an absent optional one); `constants` are the compile-time ones. Nothing is started for zero programs.
    """
    if programs == 0:
        return
    first = arguments[0]
    device = first.device if isinstance(first, Tensor) else first.base.device
    if device.type != "cuda":
        _start(kernel, programs, arguments, constants, options)
    elif device.index == torch.cuda.current_device():
        _start_remembered(kernel, programs, arguments, constants, options, device.index)
    else:  # Triton launches on the current device
        with torch.cuda.device(device):
            _start_remembered(kernel, programs, arguments, constants, options, device.index)


def _start(kernel: Any, programs: int, arguments: tuple[Any, ...], constants: tuple[Any, ...], options: Options) -> Any:
    warps, stages, registers = options
    return kernel[(programs,)](
        *arguments, *constants, num_warps=warps, num_stages=stages, maxnreg=registers, enable_fp_fusion=True
    )


def _start_remembered(
    kernel: Any, programs: int, arguments: tuple[Any, ...], constants: tuple[Any, ...], options: Options, device: int
) -> None:
    key = (kernel, device, constants, options, *_specialization(kernel, arguments))
    compiled = _compiled.get(key)
    if compiled is None:
        _compiled[key] = _start(kernel, programs, arguments, constants, options)
    else:
        compiled[(programs, 1, 1)](*arguments, *constants)


def _specialization(kernel: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The facts about each argument that Triton compiles into a kernel: dtype and 16-byte alignment of a tensor; of an
    integer whether it is 1, divisible by 16, and its width, the first two not for those in `do_not_specialize`; of
    anything else the type."""
    plain = _plain.get(kernel)
    if plain is None:
        names = kernel.do_not_specialize
        plain = _plain[kernel] = frozenset(i for i, name in enumerate(kernel.arg_names) if name in names or i in names)
    facts: list[Any] = []
    for position, argument in enumerate(arguments):
        if isinstance(argument, Tensor):
            facts.append((argument.dtype, argument.data_ptr() % 16 == 0))
        elif hasattr(argument, "block_shape"):  # a descriptor: its shape and strides are ordinary arguments
            facts.append((argument.base.dtype, tuple(argument.block_shape)))
        elif type(argument) is not int:  # a float, a boolean or None: True equals 1 and 1.0, but is another kernel
            facts.append(type(argument))
        elif position in plain:
            facts.append(-(2**31) <= argument < 2**31)
        else:
            facts.append((argument == 1, argument % 16 == 0, -(2**31) <= argument < 2**31))
    return tuple(facts)
