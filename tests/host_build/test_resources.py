"""The resource table: what nvcc compiled is read, and a kernel that spills fails."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from host_module import HERE, ROOT

from tools import resources

SOURCE = """
#include "{header}"
struct Kernel : host_build::Product<tiles::BFloat16, false> {{
    static constexpr int kMinBlocks = {blocks};
}};
void start(const Kernel::Params& params) {{ tiles::launch<Kernel>(params, 1, nullptr); }}
"""
LISTING = """
Fatbin elf code:
================
arch = sm_80
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:0
 Function _Z5firstv:
  REG:40 STACK:0 SHARED:16 LOCAL:0 CONSTANT[0]:384 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _Z6secondv:
  REG:255 STACK:24 SHARED:0 LOCAL:8 CONSTANT[0]:384 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin elf code:
================
arch = sm_90a
 Function _Z5firstv:
  REG:41 STACK:0 SHARED:16 LOCAL:0 CONSTANT[0]:384
"""


def test_listing():
    first, second, third = resources.parse(LISTING)
    assert (first.architecture, first.registers, first.stack, first.shared) == ("sm_80", 40, 0, 16)
    assert (second.registers, second.stack) == (255, 32)
    assert (third.architecture, third.registers) == ("sm_90a", 41)


def test_names_hold_the_class_and_the_shared_memory():
    name = (
        "void tiles::kernel_entry<Dq<Half, 256, (tiles::SharedMemory)0>, 98304>(Dq<Half, 256, (tiles::SharedMemory)0>)"
    )
    kernel = resources._named(resources.Kernel("sm_80", "_Z1k", 40, 0, 16), name)
    assert (kernel.name, kernel.shared, kernel.dynamic) == ("Dq<Half, 256, small>", 16, 98304)
    platform = (ROOT / "csrc" / "tiles" / "platform.h").read_text(encoding="utf-8")
    assert f"enum class SharedMemory {{ {', '.join(resources._CLASSES)} }};" in platform


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize(("blocks", "verdict"), [(1, 0), (16, 1)])  # 16 blocks leave 32 registers a thread
def test_spills_fail(blocks, verdict, tmp_path, capsys):
    (tmp_path / "kernel.cu").write_text(SOURCE.format(header=HERE / "product.cuh", blocks=blocks), encoding="utf-8")
    command = ["nvcc", "-O3", "-std=c++17", "-arch=sm_80", "--expt-relaxed-constexpr"]
    subprocess.run([*command, "-c", "kernel.cu", "-o", "kernel.o"], cwd=tmp_path, check=True)
    assert resources.main([str(tmp_path / "kernel.o")]) == verdict
    lines = capsys.readouterr().out.rstrip().splitlines()
    bytes_asked = (64 + 32) * 32 * 2  # tiles of host_build::Product
    assert lines[1].startswith("sm_80") and lines[1].endswith(f"{bytes_asked}  Kernel")
    assert lines[-1] == f"1 kernels (sm_80), {verdict} with a stack"


def test_nothing_to_read(tmp_path, capsys):
    (tmp_path / "empty.o").write_bytes(b"")
    assert resources.main([str(tmp_path / "empty.o")]) == 2
    assert "tools.resources:" in capsys.readouterr().err
