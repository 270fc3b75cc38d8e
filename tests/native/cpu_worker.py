"""Run by test_maxsim_cpu.py in processes of their own, because instructions are chosen once per process.

Compares the "cpu" backend with the definition in float64 over sizes at every edge of a tile, and prints the
instruction set that it ran with.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1] / "kernels"), str(Path(__file__).parents[1])]

from maxsim_cases import make_case  # noqa: E402
from maxsim_smooth_cases import Smooth  # noqa: E402
from oracles import assert_as_exact_as_torch  # noqa: E402

# Query rows that fill vectors of 4, 8 and 16 lanes, and panels of two, or nearly; documents around tiles of 4 to 12
# tokens; dimensions that vectors and pairs do not divide.
SIZES = [
    {"query_length": query_length, "document_length": document_length, "dimension": dimension}
    for query_length in (1, 4, 7, 16, 17, 32, 33)
    for document_length, dimension in ((1, 16), (3, 33), (5, 128), (12, 17), (13, 31), (25, 47), (300, 20))
]


def main() -> None:
    for seed, sizes in enumerate(SIZES):
        switches = {name: bool(seed >> bit & 1) for bit, name in enumerate(("candidates", "packed", "normalize"))}
        case = make_case(masked=seed % 3 > 0, weighted=seed % 3 > 1, documents=3, seed=seed, **sizes, **switches)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            low = case.to(dtype)
            exact, found = low.exact(), low.run("cpu")
            assert torch.equal(found.pop("winners"), exact["winners"]), (dtype, sizes, switches)
            plain = low.plain(exact["winners"])
            plain["scores"] = plain["scores"].float()
            for name, value in found.items():
                assert_as_exact_as_torch(f"{name} {dtype} {sizes} {switches}", value, plain[name], exact[name])
        low.options.pop("normalize", None)  # which smooth MaxSim does not have
        compare_smooth(Smooth(low, 0.7), f"smooth {sizes} {switches}")
    print(torch.ops.jmlr_native.cpu_instructions())


def compare_smooth(call: Smooth, what: str) -> None:
    exact, found, plain = call.exact(), call.run("cpu"), call.plain()
    plain["scores"] = plain["scores"].float()
    for name, value in found.items():
        assert_as_exact_as_torch(f"{name} {value.dtype} {what}", value, plain[name], exact[name])


if __name__ == "__main__":
    main()
