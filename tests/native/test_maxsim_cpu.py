"""The C++ path of MaxSim on the CPU: precision, instruction sets, threads, strides, values that do not fit.

The semantics (ties, NaN, empty and excluded tokens, losses) are tested with the other backends in tests/kernels.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import assert_as_exact_as_torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from maxsim_cases import Case, make_case  # noqa: E402

from jmlr_kernels import maxsim, maxsim_candidates, maxsim_tokens, native  # noqa: E402

hypothesis = pytest.importorskip("hypothesis")
strategies = hypothesis.strategies

pytestmark = pytest.mark.skipif(
    not native.has("maxsim_backward", "cpu"), reason=f"no native library: {native.loaded().problem}"
)

ROOT = Path(__file__).parents[2]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
INSTRUCTIONS = ["portable", "avx2", "avx512", "avx512bf16"]


def check(case: Case, dtype: torch.dtype) -> None:
    low = case.to(dtype)
    exact, found = low.exact(), low.run("cpu")
    assert torch.equal(found.pop("winners"), exact["winners"])
    plain = low.plain(exact["winners"])
    plain["scores"] = plain["scores"].float()
    for name, value in found.items():
        assert_as_exact_as_torch(name, value, plain[name], exact[name])


def forward(*tensors: Tensor | None, **switches: Any) -> tuple[Tensor, ...]:
    """The operation itself: queries, documents, query_mask, document_mask, query_weights, cu_seqlens."""
    values = {"candidates": False, "normalize": False, "per_token": False, "need_winners": True, "max_length": 0}
    return torch.ops.jmlr_native.maxsim_forward(*tensors, *([None] * (6 - len(tensors))), *(values | switches).values())


def backward(grad: list[Tensor], *tensors: Tensor | None, rule: str = "scores", candidates: bool = False) -> Any:
    """queries, documents, winners, query_mask, document_mask, query_weights, cu_seqlens, both scales."""
    padded = (*tensors, *([None] * (9 - len(tensors))))
    return torch.ops.jmlr_native.maxsim_backward(grad, *padded, rule, candidates, 0)


# --------------------------------------------------------------------------- values


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(
    dtype=strategies.sampled_from(DTYPES),
    query_count=strategies.integers(1, 6),
    documents=strategies.integers(1, 6),
    query_length=strategies.integers(1, 40),
    document_length=strategies.integers(1, 60),
    dimension=strategies.integers(16, 140),
    candidates=strategies.booleans(),
    packed=strategies.booleans(),
    masked=strategies.booleans(),
    weighted=strategies.booleans(),
    normalize=strategies.booleans(),
    seed=strategies.integers(0, 2**16),
)
def test_as_exact_as_torch(dtype: torch.dtype, **sizes: Any) -> None:
    check(make_case(**sizes), dtype)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(
    dtype=strategies.sampled_from(DTYPES),
    query_length=strategies.integers(1, 36),
    document_length=strategies.integers(1, 40),
    dimension=strategies.integers(1, 6),
    candidates=strategies.booleans(),
    packed=strategies.booleans(),
    masked=strategies.booleans(),
    seed=strategies.integers(0, 2**16),
)
def test_ties_are_exact_in_every_type(dtype: torch.dtype, **sizes: Any) -> None:
    """Small integers: sums are exact, many similarities are equal, and the lowest position wins."""
    case = make_case(**sizes)
    case.queries, case.documents = case.queries.mul(2).round(), case.documents.mul(2).round()
    case.grad_scores = case.grad_scores.mul(2).round()
    found, exact = case.to(dtype).run("cpu"), case.exact()
    for name, value in found.items():
        expected = exact[name]
        if name.startswith("grad"):  # one rounding of a sum of integers
            expected = expected.to(dtype)
        assert torch.equal(value.double(), expected.double()), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("winners", [False, True])
@pytest.mark.parametrize("dimension", [16, 17])
def test_nan_at_any_place_of_a_tile(dtype: torch.dtype, winners: bool, dimension: int) -> None:
    """The first NaN wins, in any lane and any row of a tile; -inf and +inf are ordinary values."""
    queries, documents = torch.randn(1, 19, dimension), torch.randn(1, 30, dimension)
    for place in range(30):
        for element in (0, dimension - 1):
            poisoned = documents.clone()
            poisoned[0, place:, element] = float("nan")
            scores, positions, *_ = forward(queries.to(dtype), poisoned.to(dtype), need_winners=winners)
            assert scores.isnan().all()
            assert not winners or (positions == place).all()
    for row in range(19):
        poisoned = queries.clone()
        poisoned[0, row, dimension - 1] = float("nan")
        maxima, positions, *_ = forward(poisoned.to(dtype), documents.to(dtype), per_token=True, need_winners=winners)
        assert maxima[0, 0].isnan().nonzero().flatten().tolist() == [row]
        assert not winners or positions[0, 0, row] == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_excluded_tokens_are_not_read(dtype: torch.dtype) -> None:
    case = make_case(masked=True, weighted=True, query_length=20, document_length=40, dimension=17).to(dtype)
    expected = case.run("cpu")
    for poison in (float("nan"), float("inf")):
        case.queries[~case.options["query_mask"]] = poison
        case.query_weights[~case.options["query_mask"]] = poison
        case.documents[~case.options["document_mask"]] = poison
        for name, value in case.run("cpu").items():
            assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("candidates", [False, True])
def test_maxima_of_query_tokens(dtype: torch.dtype, candidates: bool) -> None:
    case = make_case(masked=True, candidates=candidates, dimension=32).to(dtype)
    results = []
    for backend, precision in (("torch", torch.float64), ("cpu", dtype)):
        queries, documents, _ = case.to(precision).leaves()
        maxima = maxsim_tokens(queries, documents, candidates=candidates, backend=backend, **case.options)
        maxima.backward(torch.linspace(-1, 1, maxima.numel()).to(maxima.dtype).view_as(maxima))
        results.append((maxima.detach(), queries.grad, documents.grad))
    for found, exact in zip(results[1], results[0], strict=True):
        one_rounding = torch.finfo(found.dtype).eps * exact.abs().max().item()
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=max(1e-5, one_rounding))


def test_weights_of_other_types_keep_theirs() -> None:
    case = make_case(weighted=True).to(torch.float32)
    for dtype in (torch.float16, torch.float64):
        case.query_weights = case.query_weights.to(dtype)
        found, exact = case.run("cpu"), case.exact()
        assert found["grad_weights"].dtype == dtype
        torch.testing.assert_close(found["grad_weights"].double(), exact["grad_weights"], rtol=1e-3, atol=1e-2)


# ------------------------------------------------------------- instructions, threads, memory


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_every_instruction_set(name: str) -> None:
    """Against the definition, in a process whose fresh memory is not zero: whatever is not written shows."""
    ran = _worker(JMLR_CPU_ISA=name)
    if "this processor has no such instructions" in ran.stderr:
        pytest.skip(f"this processor has no {name}")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == [name]


def test_unknown_instruction_set_is_named() -> None:
    ran = _worker(JMLR_CPU_ISA="sse9")
    assert ran.returncode != 0 and "JMLR_CPU_ISA=sse9: choose portable, avx2, avx512 or avx512bf16" in ran.stderr


def _worker(**variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_PERTURB_": "165", **variables}
    command = [sys.executable, str(Path(__file__).with_name("cpu_worker.py"))]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("candidates", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_threads(candidates: bool, normalize: bool, dtype: torch.dtype) -> None:
    """Large enough that two and five threads get tasks, in both directions; also run by run, and query by query."""
    case = make_case(
        query_count=13, query_length=29, documents=17, document_length=70, dimension=64, candidates=candidates,
        normalize=normalize, masked=True, weighted=True,
    ).to(dtype)  # fmt: skip
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5, 2):
            torch.set_num_threads(count)
            results.append(case.run("cpu"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name, value in other.items():
            assert torch.equal(value, results[0][name]), name
    function = maxsim_candidates if candidates else maxsim
    mask = case.options["document_mask"]
    alone = function(
        case.queries[5:6], case.documents[5:6] if candidates else case.documents, normalize=normalize,
        query_mask=case.options["query_mask"][5:6], document_mask=mask[5:6] if candidates else mask,
        query_weights=case.query_weights[5:6], backend="cpu",
    )  # fmt: skip
    assert torch.equal(alone, results[0]["scores"][5:6])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_of_every_kind(dtype: torch.dtype) -> None:
    """Reversed roles, gaps, expanded documents, odd offsets, a strided dimension: as their contiguous copies, to the
    bit, because nothing of the arithmetic depends on where a row lies."""
    wide = torch.randn(9, 50, 3, 80).to(dtype)
    views = [
        (wide[:3, :20, 0, :33], wide[:, :, 1, 1:34]),
        (wide[:3, ::5, 2, 7:40].transpose(0, 1), wide[4:, 3:40:3, 2, :33]),
        (wide[0, :20, :, :66:2].transpose(0, 1), wide[1, :1, :, 14:80:2].expand(4, 3, 33)),
        (wide[0, 0, :1, :33].expand(5, 7, 33), wide[2:3, :, 0, 3:36].expand(6, 50, 33)),
    ]
    for queries, documents in views:
        grad = torch.randn(queries.shape[0], documents.shape[0])
        found, copied = (
            (scores := forward(q, d), backward([grad], q, d, scores[1]))
            for q, d in ((queries, documents), (queries.contiguous(), documents.contiguous()))
        )
        for one, other in zip((*found[0], *found[1]), (*copied[0], *copied[1]), strict=True):
            assert torch.equal(one, other) and one.is_contiguous()


def test_packed_offsets_past_two_to_the_31() -> None:
    """Packed rows 2**29 elements apart; the memory between them is reserved, not touched."""
    stride = 2**29 + 8
    storage = torch.empty(5 * stride + 64, dtype=torch.bfloat16)
    documents = storage.as_strided((6, 32), (stride, 1), 16)
    documents.copy_(torch.randn(6, 32))
    queries, offsets = torch.randn(2, 3, 32).bfloat16(), torch.tensor([0, 4, 6], dtype=torch.int32)
    results = []
    for text in (documents, documents.contiguous()):
        scores, winners, *_ = forward(queries, text, None, None, None, offsets)
        results.append(
            (scores, winners, *backward([torch.ones(2, 2)], queries, text, winners, None, None, None, offsets))
        )
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


# --------------------------------------------------------------------------- refusals


def test_direct_calls_are_checked() -> None:
    """The public functions explain more; a direct call must not read memory that is not there."""
    queries, documents = torch.randn(2, 3, 8), torch.randn(4, 5, 8)
    packed = documents.flatten(0, 1)
    _, winners, *_ = forward(queries, documents)
    grad = torch.ones(2, 4)
    calls: list[tuple[str, Any]] = [
        ("must rise within 0", lambda: forward(queries, packed, None, None, None, torch.tensor([0, 5, 21]).int())),
        ("must rise within 0", lambda: forward(queries, packed, None, None, None, torch.tensor([0, 9, 5, 20]).int())),
        ("must rise within 0", lambda: forward(queries, packed, None, None, None, torch.tensor([-1, 20]).int())),
        ("not float64", lambda: forward(queries.double(), documents.double())),
        ("documents must be float32", lambda: forward(queries, documents.half())),
        ("documents have D=7", lambda: forward(queries, documents[..., :7])),
        ("query_mask must have the shape", lambda: forward(queries, documents, torch.ones(2, 2, dtype=torch.bool))),
        ("document_mask must be bool", lambda: forward(queries, documents, None, torch.ones(4, 5))),
        ("candidates for 4 queries", lambda: forward(queries, torch.randn(4, 1, 5, 8), candidates=True)),
        ("cannot share evenly",
         lambda: forward(queries, packed, None, None, None, torch.tensor([0, 5, 9, 20]).int(), candidates=True)),
        ("winners must be uint8", lambda: backward([grad], queries, documents, winners.int())),
        ("winners must have the shape", lambda: backward([grad], queries, documents, winners[:, :3])),
        ("position outside of its document", lambda: backward([grad], queries, documents, winners + 5)),
        ("rule 'best' is not one of", lambda: backward([grad], queries, documents, winners, rule="best")),
        ("rule 'teacher' takes 6", lambda: backward([grad], queries, documents, winners, rule="teacher")),
        ("the scores' gradient must have", lambda: backward([grad[:1]], queries, documents, winners)),
        ("both inverse norms or neither",
         lambda: backward([grad], queries, documents, winners, None, None, None, None, torch.ones(2, 3))),
    ]  # fmt: skip
    for message, call in calls:
        with pytest.raises(RuntimeError, match=message):
            call()


@pytest.mark.slow
@pytest.mark.parametrize(("sanitizer", "problems"), [("address,undefined", 1000), ("thread", 200)])
def test_sanitizers(sanitizer: str, problems: int, tmp_path: Path) -> None:
    """Random problems in exactly sized buffers, with every instruction set that this processor has."""
    flags = {"avx2": "-mavx2 -mfma -mf16c"}
    flags["avx512"] = flags["avx2"] + " -mavx512f -mavx512bw -mavx512dq -mavx512vl"
    flags["avx512bf16"] = flags["avx512"] + " -mavx512bf16"
    common = ["g++", "-std=c++17", "-O1", "-g1", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    objects = []
    sources = [*sorted((ROOT / "csrc" / "maxsim").glob("cpu*.cpp")), Path(__file__).with_name("cpu_sanitize.cpp")]
    for source in sources:
        objects.append(str(tmp_path / f"{source.stem}.o"))
        extra = flags.get(source.stem.removeprefix("cpu_"), "").split()
        subprocess.run([*common, *extra, "-I", str(ROOT / "csrc"), "-c", str(source), "-o", objects[-1]], check=True)
    driver = str(tmp_path / "driver")
    subprocess.run([*common, *objects, "-pthread", "-o", driver], check=True)
    for seed, name in enumerate(INSTRUCTIONS):
        environment = {**os.environ, "JMLR_CPU_ISA": name}
        ran = subprocess.run([driver, str(problems), str(seed)], env=environment, capture_output=True, text=True)
        if "this processor has no such instructions" in ran.stderr:
            continue
        assert ran.returncode == 0, ran.stderr[-4000:]
        assert ran.stdout == f"{name}: {problems} problems\n"
