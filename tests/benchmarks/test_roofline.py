"""Work and floors against figures worked out by hand for an H200 (790 TFLOP/s, 4.3 TB/s, bfloat16, D = 128)."""

from __future__ import annotations

import pytest
import torch

from benchmarks import roofline
from benchmarks.maxsim_cases import MaxSimCase

H200 = roofline.PUBLISHED["H200"]

# queries, documents, Lq, Ld, layout -> forward GFLOP, MB, microseconds of products and of bytes
FORWARD = [
    (64, 64, 32, 180, "in-batch", 6.04, 3.49, 7.65, 0.812),
    (256, 256, 32, 300, "in-batch", 161.1, 22.0, 204, 5.12),
    (128, 128, 32, 1030, "in-batch", 138.2, 34.9, 175, 8.11),
    (128, 128, 1024, 1024, "in-batch", 4398, 67.2, 5570, 15.6),
    (32, 64, 32, 180, "candidates", 3.02, 94.6, 3.82, 22.0),
    (256, 16, 32, 1030, "candidates", 34.56, 1080, 43.7, 252),
    (1, 10_000, 32, 300, "in-batch", 24.58, 768, 31.1, 179),
    (1, 1000, 32, 300, "in-batch", 2.458, 76.8, 3.11, 17.9),
]


@pytest.mark.parametrize("row", FORWARD, ids=str)
def test_forward_work_and_floor(row: tuple) -> None:
    queries, documents, query_length, document_length, layout, gflop, megabytes, compute, memory = row
    case = MaxSimCase(queries, documents, query_length, document_length, backward=False, layout=layout)
    work = case.work(2)
    assert work.forward_flops / 1e9 == pytest.approx(gflop, rel=4e-3)
    assert work.forward_bytes / 1e6 == pytest.approx(megabytes, rel=4e-3)
    assert roofline.time_floor(work, H200, "forward") * 1e6 == pytest.approx(max(compute, memory), rel=4e-3)


# queries, documents, Lq, Ld, layout -> backward GFLOP, MB with int32 winners, gathered MB, forward+backward floor
# where winners are re-read from L2 at 5.5 TB/s
BACKWARD = [
    (64, 64, 32, 180, "in-batch", 0.0671, 8.01, 67.11, 19.8),
    (256, 256, 32, 300, "in-batch", 1.07, 60.6, 1074, 399),
    (512, 512, 32, 180, "in-batch", 4.29, 124, 4295, 1270),
    (128, 128, 1024, 1024, "in-batch", 8.59, 269, 8590, 7130),
    (128, 8, 32, 1030, "candidates", 0.0168, 281, 16.78, 128),
]


@pytest.mark.parametrize("row", BACKWARD, ids=str)
def test_backward_work_and_floor(row: tuple) -> None:
    queries, documents, query_length, document_length, layout, gflop, megabytes, gathered, microseconds = row
    shared = layout != "candidates"
    count = documents if shared else queries * documents
    work = roofline.maxsim_work(
        queries, query_length, count * document_length, count, 128, 2, shared=shared, index_bytes=4
    )
    assert work.backward_flops / 1e9 == pytest.approx(gflop, rel=4e-3)
    assert work.backward_bytes / 1e6 == pytest.approx(megabytes, rel=6e-3)
    assert work.gathered_bytes / 1e6 == pytest.approx(gathered, rel=4e-3)
    backward = max(roofline.gather_seconds(work), work.backward_bytes / H200.bandwidth)
    ideal = (roofline.time_floor(work, H200, "forward") + backward) * 1e6
    assert ideal == pytest.approx(microseconds, rel=6e-3)


def test_the_floor_of_a_step_counts_both_directions() -> None:
    work = MaxSimCase(256, 256, 32, 300, backward=True).work(2)
    forward = roofline.time_floor(work, H200, "forward")
    assert roofline.time_floor(work, H200, "forward+backward") == forward + work.backward_bytes / H200.bandwidth
    assert roofline.share(work, 2 * forward * 1e3, H200, "forward") == pytest.approx(0.5)


def test_padding_is_no_work() -> None:
    packed = MaxSimCase(4, 6, 8, 50, backward=True, layout="packed", shortest=3)
    assert packed.forward_flops() == 2 * 128 * 4 * 8 * sum(packed.lengths()) and max(packed.lengths()) == 50
    assert packed.work(2).input_bytes == (4 * 8 + sum(packed.lengths())) * 128 * 2


def test_ceilings_of_a_name() -> None:
    assert roofline.published("NVIDIA H200") is H200
    assert roofline.published("NVIDIA H100 80GB HBM3") is roofline.PUBLISHED["H100"]
    assert roofline.published("Quadro") is None and roofline.published(None) is None


def test_ceilings_are_measured_where_there_is_no_name() -> None:
    ceilings = roofline.measured(torch.device("cpu"))
    assert ceilings.flops > 1e6 and ceilings.bandwidth > 1e6 and "measured in this run" in ceilings.source
