"""Runs a compiler and fails where it says that it made a kernel's asynchronous products wait for each other.

ptxas only remarks on it ("Potential Performance Loss: wgmma.mma_async instructions are serialized"), and no flag makes
an error of the remark; a kernel for compute capability 9.0 without that overlap has lost what it was written for.

    python checked_ptxas.py nvcc ...
"""

import subprocess
import sys

# The second: registers that warps were to hand to each other stay where they are.
REMARKS = ("Potential Performance Loss", "setmaxnreg ignored")


def main(command: list[str]) -> int:
    """The compiler's exit code, or 1 where it remarked."""
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(run.stdout, end="")
    return run.returncode or int(any(remark in run.stdout for remark in REMARKS))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
