"""What PyTorch asks of an operation: fakes, torch.compile, autocast, checkpointing, FLOP counts."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from maxsim_cases import make_case
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from jmlr_kernels import maxsim, maxsim_candidates

LAYOUTS = [(False, False), (False, True), (True, False), (True, True)]


@pytest.mark.parametrize(("candidates", "packed"), LAYOUTS)
@pytest.mark.parametrize("weighted", [False, True])
def test_opcheck(candidates: bool, packed: bool, weighted: bool) -> None:
    case = make_case(candidates=candidates, packed=packed, masked=weighted, weighted=weighted).to(torch.float32)
    offsets = case.options.get("cu_seqlens")
    masks = (case.options.get("query_mask"), case.options.get("document_mask"))
    forward = torch.ops.jmlr_kernels.maxsim_forward.default
    backward = torch.ops.jmlr_kernels.maxsim_backward.default
    arguments = (case.queries, case.documents, *masks, case.query_weights, offsets, candidates)
    for normalize, per_token, need_winners in ((False, False, False), (True, False, True), (False, True, True)):
        torch.library.opcheck(forward, (*arguments, normalize, per_token, need_winners, 0, "torch"))
    for normalize, rule in ((False, "scores"), (True, "tokens")):
        _, winners, *scales = forward(*arguments, normalize, False, True, 0, "torch")
        grad = case.grad_scores if rule == "scores" else torch.randn(winners.shape)
        inputs = (case.queries, case.documents, winners, *masks, case.query_weights, offsets)
        scales = scales if normalize else [None, None]
        torch.library.opcheck(backward, ([grad], *inputs, *scales, rule, candidates, 0, "torch"))


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize(("candidates", "packed"), LAYOUTS)
def test_compile_without_graph_breaks(candidates: bool, packed: bool, backend: str) -> None:
    """The Triton backend too: what "auto" is on a GPU must not be found out by what torch.compile cannot trace."""
    torch.compiler.reset()
    case = make_case(candidates=candidates, packed=packed, masked=True, weighted=True).to(torch.float32)
    function = maxsim_candidates if candidates else maxsim

    def loss(queries: Tensor, documents: Tensor, weights: Tensor) -> Tensor:
        scores = function(queries, documents, query_weights=weights, normalize=True, backend=backend, **case.options)
        return scores.logsumexp(-1).sum()

    gradients = []
    for call in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = case.leaves()
        value = call(*leaves)
        value.backward()
        gradients.append([value.detach()] + [leaf.grad for leaf in leaves])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)


def test_autocast_takes_its_dtype_and_keeps_float32_scores() -> None:
    """The inputs are rounded once; neither the operation nor its backward is rounded again inside."""
    case = make_case(dimension=64, masked=True, weighted=True).to(torch.float32)
    queries, documents, weights = case.leaves()
    with torch.autocast("cpu", torch.bfloat16):
        scores = maxsim(queries, documents, query_weights=weights, **case.options)
        scores.backward(case.grad_scores)
    rounded = case.to(torch.bfloat16).run("auto")
    assert scores.dtype == torch.float32 and torch.equal(scores, rounded["scores"])
    assert queries.grad.dtype == torch.float32 and torch.equal(queries.grad, rounded["grad_queries"].float())
    assert torch.equal(documents.grad, rounded["grad_documents"].float())


def test_activation_checkpointing() -> None:
    case = make_case(masked=True)
    expected = case.run("torch")
    queries, documents, _ = case.leaves()
    scores = checkpoint(lambda q, d: maxsim(q, d, **case.options), queries, documents, use_reentrant=False)
    scores.backward(case.grad_scores)
    assert torch.equal(queries.grad, expected["grad_queries"])
    assert torch.equal(documents.grad, expected["grad_documents"])


def test_fakes_follow_shapes() -> None:
    queries = torch.empty(3, 5, 8, device="meta", dtype=torch.bfloat16)
    assert maxsim(queries, torch.empty(4, 9, 8, device="meta", dtype=torch.bfloat16)).shape == (3, 4)
    packed = torch.empty(50, 8, device="meta", dtype=torch.bfloat16)
    offsets = torch.empty(7, device="meta", dtype=torch.int32)
    scores, winners = maxsim_candidates(queries, packed, cu_seqlens=offsets, return_alignment=True)
    assert scores.shape == (3, 2) and scores.dtype == torch.float32
    assert winners.shape == (3, 2, 5) and winners.dtype == torch.int32


@pytest.mark.parametrize(("candidates", "packed"), LAYOUTS)
def test_flops(candidates: bool, packed: bool) -> None:
    case = make_case(candidates=candidates, packed=packed).to(torch.float32)
    queries, documents, _ = case.leaves()
    function = maxsim_candidates if candidates else maxsim
    with FlopCounterMode(display=False) as counter:
        function(queries, documents, **case.options).sum().backward()
    tokens = documents.numel() // 20
    forward = 2 * 20 * 5 * tokens * (1 if candidates else 3)
    assert counter.get_total_flops() == forward + 2 * 2 * 20 * (3 * 4 * 5)


def test_saved_state_is_inputs_and_winners() -> None:
    case = make_case(query_count=4, documents=50, document_length=60, query_length=8)
    saved: list[int] = []
    queries, documents, _ = case.leaves()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.numel() * t.element_size()) or t, lambda t: t
    ):
        maxsim(queries, documents)
    assert sum(saved) == 8 * (queries.numel() + documents.numel()) + 4 * 50 * 8


def test_without_triton_the_torch_backend_still_works() -> None:
    """Where Triton is not to be had (it is no dependency outside Linux), everything but the kernels runs."""
    script = """
import sys
sys.modules["triton"] = None
import torch, jmlr_kernels
q, d = torch.randn(2, 3, 8, requires_grad=True), torch.randn(4, 5, 8, requires_grad=True)
jmlr_kernels.maxsim(q, d, normalize=True).sum().backward()
jmlr_kernels.maxsim_contrastive_loss(q, d).backward()
jmlr_kernels.maxsim_smooth(q, d, temperature=0.1).sum().backward()
jmlr_kernels.xtr_scores(q, d, 3).sum().backward()
jmlr_kernels.maxsim_topk(q.detach(), d.detach(), 2)
values, scales = jmlr_kernels.quantize_documents(d.detach())
jmlr_kernels.maxsim_quantized(q.detach(), values, scales)
jmlr_kernels.shifted_sparse_attention(*(torch.randn(1, 8, 2, 32) for _ in range(3)), group_size=4)
print(jmlr_kernels.backend_info()["triton"])
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=120)
    assert run.returncode == 0 and "triton cannot be imported" in run.stdout, run.stdout + run.stderr
