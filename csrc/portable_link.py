"""Links the library so that it loads on glibc 2.28, on a machine whose own glibc is newer.

A linker binds a symbol to its newest version: on glibc 2.36, ``pthread_create`` to version 2.34, which an older system
does not have, although the older version (2.2.5) is still there beside it. So the library is linked against stubs of
libc and libm that offer each symbol in its newest version up to 2.28 and nothing else. They have the real libraries'
names and are needed at link time only.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

LIMITS = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 25), "CXXABI": (1, 3, 11), "GCC": (8, 0, 0)}  # of manylinux_2_28
STUBBED = ("libc.so.6", "libm.so.6")


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


def is_portable(version: str) -> bool:
    """Whether a symbol version such as "GLIBC_2.14" is in manylinux_2_28."""
    name, _, digits = version.partition("_")
    return name not in LIMITS or (digits[:1].isdigit() and _number(version) <= LIMITS[name])


def symbols(library: Path, which: str) -> list[tuple[str, str, str]]:
    """(kind, symbol, version) of the dynamic symbols; the version of an unversioned one is empty."""
    printed = subprocess.run(["nm", "-D", which, str(library)], capture_output=True, text=True, check=True).stdout
    return re.findall(r"^[0-9a-f]* *(\w) ([^@\s]+)@{0,2}(\S*)$", printed, re.MULTILINE)


def not_portable(library: Path) -> list[str]:
    """What the library takes from a newer system than manylinux_2_28, as "symbol@version".

    A symbol without a version is in none of the libraries that were linked; those of libtorch are expected.
    """
    wanted = [one for one in symbols(library, "--undefined-only") if one[0] == "U"]
    return [
        f"{symbol}@{version}".rstrip("@")
        for _, symbol, version in wanted
        if not (is_portable(version) if version else re.match("(aoti_)?torch_", symbol))
    ]


def needed_libraries(library: Path) -> list[str]:
    """What the library asks the loader for."""
    printed = subprocess.run(["objdump", "-p", str(library)], capture_output=True, text=True, check=True).stdout
    return re.findall(r"^\s+NEEDED\s+(\S+)$", printed, re.MULTILINE)


def unexpected_libraries(library: Path) -> list[str]:
    """What it asks for besides libtorch and the system's own."""
    known = r"(libtorch|libc|libm|libstdc\+\+|libgcc_s|ld-linux.*)\.so"
    return [name for name in needed_libraries(library) if not re.match(known, name)]


def link(compiler: str, command: Callable[[list[str]], list[str]], library: Path, scratch: Path) -> None:
    """Run `command`, which takes what to put before the system's libraries.

    Where the stubs lack a symbol the library is linked as usual, and setup.py names the wheel for this system alone.
    """
    subprocess.run(command([str(_stub(compiler, name, scratch)) for name in STUBBED]), check=True)
    lacking = not_portable(library)
    if lacking:
        print(f"not portable to manylinux_2_28: {', '.join(lacking)}", flush=True)
        subprocess.run(command([]), check=True)


def _stub(compiler: str, name: str, scratch: Path) -> Path:
    printed = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
    newest: dict[str, str] = {}
    kinds: dict[str, str] = {}
    for kind, symbol, version in symbols(Path(printed.strip()), "--defined-only"):
        if symbol != version and version.startswith("GLIBC_") and is_portable(version):
            newest[symbol] = max(newest.get(symbol, version), version, key=_number)
            kinds[symbol] = "object" if kind in "BDRVG" else "function"
    folder = scratch / "stubs"
    folder.mkdir(exist_ok=True)
    code, script, stub = folder / f"{name}.s", folder / f"{name}.map", folder / name
    code.write_text("".join(f".globl {one}\n.type {one}, @{kinds[one]}\n.size {one}, 8\n{one}:\n" for one in newest))
    script.write_text(
        "".join(
            f"{version} {{ {' '.join(f'{symbol};' for symbol, own in newest.items() if own == version)} }};\n"
            for version in sorted(set(newest.values()), key=_number)
        )
    )
    options = [f"-Wl,-soname,{name}", f"-Wl,--version-script={script}"]
    subprocess.run([compiler, "-shared", "-nostdlib", str(code), "-o", str(stub), *options], check=True)
    return stub
