"""The host build once more under AddressSanitizer and UBSan: what a thread does with its own arrays and integers."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from host_module import HERE, ROOT

SEEDED = """
import torch
from host_module import load
a, b, c = torch.randn(8, 40), torch.randn(8, 40), torch.empty(8, 8)
load().product(a, b, c, False, {fault})
print("survived")
"""


def sanitized(*arguments):
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    environment = {
        **os.environ,
        "JMLR_HOST_BUILD_SANITIZE": "1",
        "LD_PRELOAD": " ".join(libraries),
        # torch leaks on purpose, and fibers bring their own stacks.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=2300
    )


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_kernels_under_sanitizers():
    options = ["-q", "-x", "-s", "-p", "no:cacheprovider", "-m", "not slow and not gpu"]
    # nvcc does not run with the sanitizers' libraries loaded before its own; the others run no kernel that is not run
    # elsewhere.
    without = ["test_resources.py", "test_executed.py", "test_hopper_choices.py", "test_mutations.py"]
    ignored = [word for name in without for word in ("--ignore", str(HERE / name))]
    # Of the two types of 16 bits one shows the same faults.
    done = sanitized("-m", "pytest", *options, "-k", "not torch.float16", *ignored, str(HERE))
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert " passed" in done.stdout


@pytest.mark.slow
def test_a_seeded_fault_is_found():
    assert "survived" in sanitized("-c", SEEDED.format(fault=0)).stdout
    done = sanitized("-c", SEEDED.format(fault=12))
    assert done.returncode != 0 and "out of bounds" in done.stderr, done.stdout + done.stderr
