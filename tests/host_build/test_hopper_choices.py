"""The choices of csrc/*/sm90*_tiles.h: they fit, a tuner can take their place, and what it finds is read."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tools import hopper_tiles, tune_hopper

ROOT = Path(__file__).resolve().parents[2]
PAIRS = [(name, dimension) for name, kernel in hopper_tiles.KERNELS.items() for dimension in kernel.dimensions]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="reads C++ headers with g++")


@pytest.mark.parametrize(("name", "dimension"), PAIRS)
def test_choices_fit_a_multiprocessor(name: str, dimension: int) -> None:
    kernel, choice = hopper_tiles.KERNELS[name], hopper_tiles.chosen()[name][dimension]
    estimate = kernel.estimate(dimension, choice)
    assert estimate.feasible, (choice, estimate)
    assert choice in [tiles for tiles, _ in hopper_tiles.search(kernel, dimension)]


@pytest.mark.parametrize(("name", "dimension"), PAIRS)
def test_no_search_offers_what_does_not_fit(name: str, dimension: int) -> None:
    kernel = hopper_tiles.KERNELS[name]
    offered = [estimate for _, estimate in hopper_tiles.search(kernel, dimension)]
    everything = [kernel.estimate(dimension, tiles) for tiles in kernel.candidates()]
    assert 0 < len(offered) < len(everything)
    for estimate in offered:
        assert estimate.shared <= 227 * 1024 and estimate.registers <= estimate.granted
        assert 0 < estimate.share <= 1


def answer(name: str, dimension: int, header: str, include: Path) -> dict[str, int]:
    """What the C++ function answers in a build that begins with this header."""
    kernel = hopper_tiles.KERNELS[name]
    program = include / "answer"
    source = "\n".join(
        [
            header,
            "#include <cstdio>",
            f'#include "{kernel.family}/{kernel.header}"',
            f"using namespace jmlr::{kernel.family}::sm90;",
            f"int main() {{ constexpr auto tiles = {kernel.choice.format(dimension=dimension)};",
            *(f'std::printf("%d ", int(tiles.{field}));' for field in kernel.fields),
            "}",
        ]
    )
    program.with_suffix(".cpp").write_text(source)
    command = ["g++", "-std=c++17", f"-I{include}", str(program.with_suffix(".cpp")), "-o", str(program)]
    subprocess.run(command, check=True, capture_output=True)
    values = subprocess.run([program], check=True, capture_output=True, text=True).stdout.split()
    return dict(zip(kernel.fields, map(int, values), strict=True))


@pytest.mark.parametrize("name", hopper_tiles.KERNELS)
def test_a_variant_of_the_tuner_has_its_tiles_at_its_dimension_alone(name: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "csrc", tmp_path, dirs_exist_ok=True)
    variant = tune_hopper.variants(name, 128, 2)[1]
    assert answer(name, 128, variant.header(), tmp_path) == dict(variant.tiles)
    assert answer(name, 64, variant.header(), tmp_path) == hopper_tiles.chosen()[name][64]


@pytest.mark.parametrize("name", hopper_tiles.KERNELS)
def test_what_a_tuner_writes_down_is_what_the_kernels_take(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    monkeypatch.setattr(tune_hopper, "ROOT", tmp_path)
    first, second = (dict(variant.tiles) for variant in tune_hopper.variants(name, 128, 3)[1:])
    environment = {"gpu": "NVIDIA H200", "date": "2026-01-01", "commit": "0123456789abcdef"}
    for tiles in (first, second):  # the second takes the first one's place
        path = tune_hopper.write_winner(name, 128, {"tiles": tiles}, environment)
        assert path.is_file() and "NVIDIA H200" in path.read_text()
        assert answer(name, 128, "", tmp_path / "csrc") == tiles
        assert answer(name, 64, "", tmp_path / "csrc") == hopper_tiles.chosen()[name][64]


def test_libraries_of_variants_differ_in_name_and_tiles() -> None:
    usual = ["nvcc", "-DJMLR_NAMESPACE=jmlr_native", "-c", "x.cu", "-o", "x.o"]
    variant = tune_hopper.Variant("maxsim-forward", 128, (("groups", 2), ("row_tiles", 1)), 3)
    command = tune_hopper._for_variant(usual, Path("y.o"), variant)
    assert command == [
        "nvcc", "-DJMLR_NAMESPACE=jmlr_tune_maxsim_forward_128_3", "-c", "x.cu", "-o", "y.o", "-include", "variant.h",
    ]  # fmt: skip
    assert variant.header() == "#define JMLR_TUNE_MAXSIM_FORWARD 2, 1\n#define JMLR_TUNE_DIMENSION 128\n"
    family = ROOT / "csrc" / "maxsim"
    for source, differs in (
        ("sm90_bfloat16.cu", True),
        ("sm90_half.cu", False),
        ("sm90_backward_bfloat16.cu", False),
        ("sm80_bfloat16.cu", False),
        ("torch_cuda.cpp", True),
    ):
        assert tune_hopper._differs(family / source, variant) == differs, source
