"""What a compiled kernel's machine code says of its time: the instructions of its innermost matrix-product loop."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

_LABEL = re.compile(r"\s*(\.L_\w+):")
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(.*?);")
_BRANCH = re.compile(r"\bBRA\b.*`\((\.L_\w+)\)")
_PRODUCT = re.compile(r"\b(?:HGMMA|HMMA|QGMMA|IMMA|UTCHMMA)\b")


def innermost_product_loop(listing: str) -> int | None:
    """Instructions a thread in the shortest loop that holds a matrix instruction; None if there is no such loop.

    `listing` is what ``nvdisasm -c`` prints. A loop is what lies between a label and a branch back to it.
    """
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in listing.splitlines():
        label, found = _LABEL.match(line), _INSTRUCTION.match(line)
        if label:
            labels[label.group(1)] = len(instructions)
        elif found:
            instructions.append(found.group(1))
    lengths = []
    for end, instruction in enumerate(instructions):
        branch = _BRANCH.search(instruction)
        start = labels.get(branch.group(1), end + 1) if branch else end + 1
        if start <= end and any(map(_PRODUCT.search, instructions[start : end + 1])):
            lengths.append(end + 1 - start)
    return min(lengths, default=None)


def disassemble(cubin: bytes) -> str:
    """The listing of a compiled kernel, by the disassembler that Triton carries.

    Raises:
        RuntimeError: it is missing or failed.
    """
    from triton import knobs

    tool = Path(knobs.nvidia.cuobjdump.path).with_name("nvdisasm")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        try:
            run = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise RuntimeError(f"{tool} did not disassemble the kernel: {error}") from error
    return run.stdout
