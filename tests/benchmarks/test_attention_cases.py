"""The attention benchmark's cases, oracle and baselines in torch's own words, each against the definition."""

from __future__ import annotations

import types
from dataclasses import replace

import pytest
import torch

from benchmarks import attention, maxsim, oracle, roofline, run
from benchmarks import attention_baselines as baselines
from benchmarks.attention_cases import DRY_CASES, GPU_CASES, AttentionCase
from benchmarks.candidate import BACKWARD, FORWARD, STEP
from benchmarks.prepare import prepare, steps_of
from jmlr_kernels import native
from jmlr_kernels.shifted_attention import config
from jmlr_kernels.shifted_attention.executed import library_flops
from jmlr_kernels.shifted_attention.reference import allowed, shifted_sparse_attention_reference

CPU = torch.device("cpu")
CASES = (
    AttentionCase(64, 16, heads=4, kv_heads=2, dim=8, batch=2),
    AttentionCase(45, 16, heads=6, kv_heads=3, dim=8, batch=3, layout="padded"),
    AttentionCase(90, 7, heads=5, kv_heads=1, dim=8, layout="packed"),
    AttentionCase(10, 30, heads=1, kv_heads=1, dim=8),
)


def definition(case: AttentionCase, dtype: torch.dtype = torch.float64) -> tuple[list[torch.Tensor], ...]:
    """(inputs, the upstream gradient last; output and gradients by autograd through the definition)."""
    *tensors, grad = case.inputs(CPU, dtype)
    out = shifted_sparse_attention_reference(*tensors, case.group_size, **case.arguments(CPU))
    return [*tensors, grad], [out.detach(), *torch.autograd.grad(out, tensors, grad.to(dtype))]


@pytest.mark.parametrize("rows", [5, 512])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_oracle_is_the_definition(case: AttentionCase, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracle, "ATTENTION_ROWS", rows)
    (*tensors, grad), right = definition(case)
    for got, expected in zip(attention.exact(case, tensors, grad), right, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_candidate_computes_the_same(case: AttentionCase) -> None:
    records, ready = prepare(
        attention, case, attention.candidates(case, CPU, 0), CPU, torch.float32, list(case.directions), float("inf")
    )
    expected = {"jmlr", "torch", "definition"}
    expected |= {"sdpa-dense"} if case.layout == "dense" else set()
    expected |= {"sdpa-groups"} if case is CASES[0] else set()
    assert set(ready[FORWARD]) == set(ready[BACKWARD]) == set(ready[STEP]) == expected
    for name, record in records.items():
        assert "problem" not in record, (name, record)
        assert name == "sdpa-dense" or max(record["error"].values()) < 1e-6, (name, record)


def test_a_wrong_gradient_alone_is_found() -> None:
    """The backward is compared too, output or not."""
    from benchmarks.candidate import Candidate

    case = CASES[0]

    def wrong(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = attention.ours(case)(q, k, v)
        return out + (v - v.detach()).sum() * 1e-2  # its value is 0

    found = {"jmlr": Candidate(lambda: wrong)}
    records, ready = prepare(attention, case, found, CPU, torch.float32, [BACKWARD], float("inf"))
    assert "backward is off" in records["jmlr"]["problem"] and not ready[BACKWARD]


def test_backward_repeats_over_one_graph() -> None:
    case, forwards = CASES[0], []

    def function(*tensors: torch.Tensor) -> torch.Tensor:
        forwards.append(1)
        return attention.ours(case)(*tensors)

    (*tensors, grad), right = definition(case, torch.float32)
    backward = steps_of(function, tensors, grad)[BACKWARD]
    for results in (backward(), backward()):
        assert len(results) == 3
        for got, expected in zip(results, right[1:], strict=True):
            torch.testing.assert_close(got, expected)
    assert len(forwards) == 1


# --------------------------------------------------------------------------- FlexAttention on the CPU


@pytest.mark.parametrize("case", CASES[:3], ids=lambda case: case.name)
def test_flex_mask_is_the_definition(case: AttentionCase) -> None:
    mask = baselines.mask_of(case, CPU)
    tokens = torch.arange(case.length)
    rows = 1 if case.layout == "packed" else case.batch
    expected = torch.zeros(rows, case.heads, case.length, case.length, dtype=torch.bool)
    for start, end in case.documents():
        row, first = (0, start) if case.layout == "packed" else divmod(start, case.length)
        inside = slice(first, first + end - start)
        expected[row, :, inside, inside] = allowed(end - start, case.group_size, case.heads)
    for row in range(rows):
        for head in range(case.heads):
            got = mask(torch.tensor(row), torch.tensor(head), tokens[:, None], tokens[None, :])
            assert torch.equal(got.expand(case.length, -1), expected[row, head])


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("layout", ["dense", "padded", "packed"])
def test_flex_with_its_block_mask(layout: str) -> None:
    """Run eagerly: longer than a block, a group that is no multiple of one, ends that are none."""
    case = AttentionCase(300, 100, heads=4, kv_heads=2, dim=16, batch=1 if layout == "packed" else 2, layout=layout)
    (q, k, v, _), (out, *_) = definition(case, torch.float32)
    got = baselines.flex(case, CPU)(q.detach(), k.detach(), v.detach())
    torch.testing.assert_close(got, out)
    blocks = baselines.block_mask(case, CPU)
    assert blocks.shape[1] == 4 and 0 < blocks.sparsity() < 100


def test_flex_blocks_leave_nothing_out_and_little_in() -> None:
    """Blocks that the mask names full are; those that it does not name are empty."""
    case = AttentionCase(1024, 256, heads=4, kv_heads=4, dim=16)
    blocks, seen = baselines.block_mask(case, CPU), allowed(1024, 256, 4)
    tiles = seen.view(4, 8, 128, 8, 128).permute(0, 1, 3, 2, 4).flatten(3)
    dense = blocks.to_dense()[0].bool()  # partial and full blocks
    assert torch.equal(dense, tiles.any(-1))
    assert int(blocks.full_kv_num_blocks.sum()) == int(tiles.all(-1).sum()) > 0


# --------------------------------------------------------------------------- cases and their work


def test_cases_with_bars_come_first_and_cover_what_was_asked() -> None:
    bars = [case.bar for case in GPU_CASES]
    assert bars == sorted(bars, reverse=True) and sum(bars) == 8
    for case in GPU_CASES[:8]:
        assert case.group_size == case.length // 4 and case.dim == 128 and case.heads == 32
        assert (case.bar_tflops is None) == (case.group_size == 4096) and case.least_ratio == 1.0
    assert {(case.length, case.kv_heads) for case in GPU_CASES[:8]} == {
        (length, kv_heads) for length in (2048, 4096, 8192, 16384) for kv_heads in (32, 8)
    }
    assert {256, 4096} <= {case.group_size for case in GPU_CASES} and 32768 in {case.length for case in GPU_CASES}
    assert {case.dim for case in GPU_CASES} == {64, 128} and any(case.group_size % 16 for case in GPU_CASES)
    assert {case.layout for case in GPU_CASES} == {case.layout for case in DRY_CASES} == {"dense", "padded", "packed"}
    assert any(case.kv_heads % 2 for case in GPU_CASES)
    assert len({case.name for case in GPU_CASES}) == len(GPU_CASES)


@pytest.mark.parametrize("case", [*CASES, *DRY_CASES], ids=lambda case: case.name)
def test_work_is_counted_over_masks(case: AttentionCase) -> None:
    pairs = sum(int(allowed(length, case.group_size, case.heads).sum()) for length in case.lengths())
    assert case.pairs() == pairs
    assert case.forward_flops() == 4 * case.dim * pairs and case.backward_flops() == 10 * case.dim * pairs
    rows = case.inputs(CPU, torch.float32)[0].flatten(0, -3).shape[0]
    assert case.lengths() == case.lengths() and max(end for _, end in case.documents()) <= rows


def test_packed_documents_are_of_many_lengths() -> None:
    lengths = AttentionCase(16384, 512, layout="packed").lengths()
    assert sum(lengths) == 16384 and len(lengths) >= 10 and max(lengths) > 4 * min(lengths)
    padded = AttentionCase(4096, 1024, batch=8, layout="padded").lengths()
    assert padded[0] == 4096 and len(set(padded)) > 4


def test_bytes_are_those_of_the_tensors() -> None:
    case = AttentionCase(64, 16, heads=4, kv_heads=2, dim=8, batch=2)
    q, k, *_ = case.inputs(CPU, torch.bfloat16)
    size, kv_size, lse = 2 * q.numel(), 2 * k.numel(), 4 * q.numel() // 8
    work = case.work(2)
    assert work.forward_bytes == 2 * size + 2 * kv_size + lse and work.backward_bytes == 4 * size + 4 * kv_size + lse
    assert case.memory_bar(FORWARD, 2) == size + lse
    assert case.memory_bar(STEP, 2) == size + lse + size + 2 * kv_size
    assert case.memory_bar(STEP, 2) == case.memory_bar(FORWARD, 2) + case.memory_bar(BACKWARD, 2)
    ceilings = roofline.Ceilings(1e12, 1e9, "made up: bytes are what limits")
    assert roofline.time_floor(work, ceilings, STEP) == pytest.approx((work.forward_bytes + work.backward_bytes) / 1e9)
    assert roofline.time_floor(work, ceilings, BACKWARD) == pytest.approx(work.backward_bytes / 1e9)


def test_executed_flops_of_a_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiles are those that the operation would launch; a padded head dimension counts."""
    case = AttentionCase(1024, 256, heads=4, kv_heads=4, dim=80)
    assert attention.executed_flops(case, CPU, torch.bfloat16) is None  # plain torch runs there
    monkeypatch.setattr("jmlr_kernels.ops.resolve_backend", lambda *_: "triton")
    monkeypatch.setattr("jmlr_kernels.shifted_attention.triton_common.capability_of", lambda _: 90)
    monkeypatch.setattr(config, "tiles", lambda *_: config.Tiles(128, 128, 8, 3))
    found = attention.executed_flops(case, CPU, torch.bfloat16)
    # Groups of two tiles: 3 score tiles of 4 in each; the shifted half has two half groups of one tile.
    walked = 2 * (4 * 3) + 2 * (1 + 3 * 3 + 1)
    expected = {
        FORWARD: 2 * 2 * 128 * 128**2 * walked,
        BACKWARD: 7 * 2 * 128 * 128**2 * walked,
        STEP: 9 * 2 * 128 * 128**2 * walked,
    }
    assert found == expected
    # Tiles that start where groups start waste less where groups are no multiples of them.
    odd = replace(case, group_size=200)
    copied = attention.executed_flops(odd, CPU, torch.bfloat16)
    monkeypatch.setattr(config, "tma_kernel", lambda *_: None)
    plain = attention.executed_flops(odd, CPU, torch.bfloat16)
    assert attention.executed_flops(case, CPU, torch.bfloat16) == expected
    assert copied and plain and copied[FORWARD] < plain[FORWARD]


@pytest.mark.parametrize("kilobytes", [227, 99])
def test_executed_flops_of_the_native_library(monkeypatch: pytest.MonkeyPatch, kilobytes: int) -> None:
    """Its tiles are those that the library tells for the device."""
    if native.loaded().problem:
        pytest.skip(f"the library tells its tile sizes, and is not there: {native.loaded().problem}")
    chip = types.SimpleNamespace(shared_memory_per_block_optin=kilobytes * 1024)
    monkeypatch.setattr("jmlr_kernels.ops.resolve_backend", lambda *_: "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: chip)
    case = AttentionCase(1024, 256, heads=2, kv_heads=1, dim=128)
    found = attention.executed_flops(case, CPU, torch.bfloat16)
    # Queries by 128: the first tile of a group meets 128 keys, the second 256, whether they come by 32 or by 64. So do
    # keys by 128 with their queries. The shifted half begins and ends with half a group.
    pairs = 128 * (4 * (128 + 256) + (128 + 3 * (128 + 256) + 128))
    assert found == {
        FORWARD: 2 * 2 * 128 * pairs, BACKWARD: (3 + 4) * 2 * 128 * pairs, STEP: (2 + 3 + 4) * 2 * 128 * pairs,
    }  # fmt: skip
    odd = replace(case, group_size=200)
    expected = library_flops([1024], 200, 2, 128, torch.bfloat16, kilobytes * 1024)
    assert attention.executed_flops(odd, CPU, torch.bfloat16) == {
        FORWARD: expected["forward"],
        BACKWARD: expected["backward_dq"] + expected["backward_dkdv"],
        STEP: sum(expected.values()),
    }


def test_rates_and_the_backward_that_was_not_timed() -> None:
    flops = {FORWARD: 2 * 10**9, BACKWARD: 6 * 10**9, STEP: 8 * 10**9}
    record = {FORWARD: {"median": 1.0}, BACKWARD: {"median": 2.0}, STEP: {"median": 4.0}}
    assert run._tflops(record, flops) == {FORWARD: 2.0, BACKWARD: 3.0, STEP: 2.0}
    del record[BACKWARD]
    assert run._tflops(record, flops)[BACKWARD] == 2.0
    assert run._tflops({FORWARD: {"median": 1.0}, STEP: {"median": 0.5}}, flops) == {FORWARD: 2.0, STEP: 16.0}


def test_the_cuda_library_would_be_timed_beside_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    for suite, case in ((attention, CASES[0]), (maxsim, maxsim.DRY_CASES[0])):
        monkeypatch.setattr("jmlr_kernels.backend_info", lambda: {"cuda": "no CUDA part"})
        assert "jmlr-triton" not in suite.candidates(case, CPU, 0)
        monkeypatch.setattr("jmlr_kernels.backend_info", lambda: {"cuda": "available"})
        assert "jmlr-triton" in suite.candidates(case, CPU, 0) and not suite.is_baseline("jmlr-triton")
