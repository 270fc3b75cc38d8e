"""Shifted sparse attention on a CUDA device, at real sizes: what the interpreter on a CPU cannot show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import assert_as_exact_as_torch

import jmlr_kernels
from jmlr_kernels.shifted_attention.reference import shifted_sparse_attention_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# batch, length, group size, heads, kv heads, head dim
SHAPES = [
    (1, 4096, 1024, 4, 2, 128),
    (2, 1000, 333, 6, 3, 64),  # odd group, ragged end, an odd number of kv heads
    (2, 777, 128, 4, 1, 80),  # one kv head serves both halves; the head dim is no power of two
    (1, 1024, 256, 2, 2, 256),
]


def inputs(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    """q, k, v that ask for gradients, and a gradient of the output."""
    batch, length, _, heads, kv_heads, dim = shape
    generator = torch.Generator(device="cuda").manual_seed(seed)

    def random(count: int) -> torch.Tensor:
        return torch.randn((batch, length, count, dim), generator=generator, device="cuda").to(dtype)

    return [*(random(count).requires_grad_() for count in (heads, kv_heads, kv_heads)), random(heads)]


def results(function: Callable[..., torch.Tensor], tensors: list[torch.Tensor], **options: Any) -> list[torch.Tensor]:
    """Output and the gradients of q, k, v."""
    *leaves, grad = tensors
    out = function(*leaves, **options)
    return [out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def in_float64(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in tensors]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensors, group_size = inputs(shape, dtype), shape[2]
    exact = results(shifted_sparse_attention_reference, in_float64(tensors), group_size=group_size)
    low = results(shifted_sparse_attention_reference, tensors, group_size=group_size)
    actual = results(jmlr_kernels.shifted_sparse_attention, tensors, group_size=group_size, backend=backend)
    for name, *triple in zip(("out", "dq", "dk", "dv"), actual, low, exact, strict=True):
        assert_as_exact_as_torch(f"{name} {shape} {dtype}", *triple)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_padding_and_packing(backend: str, layout: str) -> None:
    lengths = [700, 1, 1024, 333]
    if layout == "padded":
        tensors = inputs((4, 1024, 256, 8, 2, 128), torch.bfloat16)
        options: dict[str, Any] = {"seq_lens": torch.tensor(lengths, dtype=torch.int32, device="cuda")}
    else:
        tensors = [tensor[0] for tensor in inputs((1, sum(lengths), 256, 8, 2, 128), torch.bfloat16)]
        tensors = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors]
        ends = torch.tensor([0, *lengths]).cumsum(0)
        options = {"cu_seqlens": ends.to(device="cuda", dtype=torch.int32)}
    options["group_size"] = 256
    exact = results(shifted_sparse_attention_reference, in_float64(tensors), **options)
    low = results(shifted_sparse_attention_reference, tensors, **options)
    actual = results(jmlr_kernels.shifted_sparse_attention, tensors, backend=backend, **options)
    for name, *triple in zip(("out", "dq", "dk", "dv"), actual, low, exact, strict=True):
        assert_as_exact_as_torch(f"{name} {layout}", *triple)


def test_two_runs_are_bit_identical(backend: str) -> None:
    tensors = inputs((4, 4096, 1024, 32, 8, 128), torch.bfloat16)
    first, second = (
        results(jmlr_kernels.shifted_sparse_attention, tensors, group_size=1024, backend=backend) for _ in range(2)
    )
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_forward_takes_no_memory_beyond_output_and_lse(backend: str) -> None:
    q, k, v, _ = inputs((4, 4096, 1024, 32, 8, 128), torch.bfloat16)
    with torch.no_grad():
        jmlr_kernels.shifted_sparse_attention(q, k, v, 1024, backend=backend)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = jmlr_kernels.shifted_sparse_attention(q, k, v, 1024, backend=backend)
    extra = torch.cuda.max_memory_allocated() - before
    lse = out.numel() // out.shape[-1] * 4
    assert extra <= out.numel() * out.element_size() + lse + 2**16, f"{extra} bytes beyond the inputs"


def test_cuda_graph_replays_on_new_inputs(backend: str) -> None:
    shape = (2, 1024, 256, 8, 2, 128)
    tensors = inputs(shape, torch.bfloat16)

    def step() -> list[torch.Tensor]:
        return results(jmlr_kernels.shifted_sparse_attention, tensors, group_size=256, backend=backend)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static = step()
    with torch.no_grad():
        for tensor, fresh in zip(tensors, inputs(shape, torch.bfloat16, seed=1), strict=True):
            tensor.copy_(fresh)
    graph.replay()
    assert all(torch.equal(replayed, eager) for replayed, eager in zip(static, step(), strict=True))


def test_the_backward_alone_is_captured_for_timing(backend: str) -> None:
    """As the benchmark does it: a graph kept from a forward on the capture's own stream."""
    from benchmarks.candidate import BACKWARD
    from benchmarks.prepare import steps_of
    from benchmarks.timing import captured, warm_up

    *tensors, grad = inputs((2, 1024, 256, 8, 2, 128), torch.bfloat16)
    device = torch.device("cuda")
    results_of_replay: list[tuple[torch.Tensor, ...]] = []
    backward = steps_of(
        lambda *leaves: jmlr_kernels.shifted_sparse_attention(*leaves, 256, backend=backend), tensors, grad
    )[BACKWARD]
    warm_up(backward, device)
    replay, method = captured(lambda: results_of_replay.append(backward()), torch.cuda.graph_pool_handle())
    assert method == "graph"
    for gradient in results_of_replay[-1]:
        gradient.fill_(float("nan"))
    replay()
    torch.cuda.synchronize()
    assert all(torch.equal(replayed, eager) for replayed, eager in zip(results_of_replay[-1], backward(), strict=True))


def test_compiled_equals_eager(backend: str) -> None:
    tensors = inputs((2, 1024, 256, 8, 2, 128), torch.bfloat16)

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return jmlr_kernels.shifted_sparse_attention(q, k, v, 256, backend=backend)

    eager = results(attention, tensors)
    compiled = results(torch.compile(attention, fullgraph=True), tensors)
    assert all(torch.equal(one, other) for one, other in zip(eager, compiled, strict=True))


def _need_memory(gibibytes: int) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < gibibytes * 2**30:
        pytest.skip(f"needs {gibibytes} GiB of free GPU memory, there are {free / 2**30:.0f}")


@pytest.mark.parametrize("layout", ["batch", "one document"])
def test_tensors_past_two_to_the_31_elements(backend: str, layout: str) -> None:
    """The last rows, whose offsets need 64 bits, equal the same rows computed on their own."""
    _need_memory(60)
    group_size, heads, dim = 1024, 16, 128
    length = 4096 if layout == "batch" else 2**31 // (heads * dim) + 4096
    batch = 2**31 // (length * heads * dim) + 1 if layout == "batch" else 1
    shape = (batch, length, heads, dim)
    assert batch * length * heads * dim > 2**31
    generator = torch.Generator(device="cuda").manual_seed(0)
    q, k, v, grad = (
        torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(generator=generator) for _ in range(4)
    )
    # The last document of the batch, or the last whole group of the only document.
    rows = slice(-1, None) if layout == "batch" else slice(None)
    tokens = slice(None) if layout == "batch" else slice(length - length % group_size - group_size, None)
    q.requires_grad_(), k.requires_grad_(), v.requires_grad_()
    whole = results(
        jmlr_kernels.shifted_sparse_attention,
        [q, k, v, grad],
        group_size=group_size,
        backend=backend,
    )
    part = [tensor[rows, tokens].detach().clone() for tensor in (q, k, v, grad)]
    part = [part[0].requires_grad_(), part[1].requires_grad_(), part[2].requires_grad_(), part[3]]
    alone = results(jmlr_kernels.shifted_sparse_attention, part, group_size=group_size, backend=backend)
    # The plain heads' groups begin where the slice begins; the shifted heads' first half group does not.
    heads_to_compare = slice(None) if layout == "batch" else slice(0, heads // 2)
    for full, own in zip(whole, alone, strict=True):
        torch.testing.assert_close(full[rows, tokens][:, :, heads_to_compare], own[:, :, heads_to_compare])
