"""MaxSim's forward on the emulated kernels for compute capability 9.0, and on those of 8.0 what they do not take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import maxsim_calls
import pytest
from host_module import device, load

# Of the calls since `in_place_of_triton` began: which ones the kernels for compute capability 9.0 computed.
served: list[bool] = []


class _Sm90:
    """A module of kernels as maxsim_calls sees it, whose forward is another."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def maxsim_forward(self, *arguments: Any) -> None:
        served.append(self.module.maxsim_sm90_forward(*arguments))
        if not served[-1]:
            self.module.maxsim_forward(*arguments)


@contextmanager
def on_sm80() -> Iterator[None]:
    """Within it, the kernels for compute capability 8.0 alone."""
    both = maxsim_calls.kernels
    assert isinstance(both, _Sm90)
    maxsim_calls.kernels = both.module
    try:
        yield
    finally:
        maxsim_calls.kernels = both


@contextmanager
def in_place_of_triton(monkeypatch: pytest.MonkeyPatch, module: Any = None) -> Iterator[list[bool]]:
    """As maxsim_calls.in_place_of_triton, on a GPU with 227 KB of shared memory a block; gives `served`."""
    module = module or load()
    served.clear()
    with monkeypatch.context() as patch:
        patch.setattr(maxsim_calls, "kernels", _Sm90(module))
        with maxsim_calls.in_place_of_triton(patch), device(module, kilobytes=227):
            yield served
