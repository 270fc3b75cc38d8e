"""Build entry point. What is declared is in pyproject.toml; here is the native library (csrc/, docs/native.md).

The library has no Python in it and links to libtorch alone, so one wheel serves every Python and every torch from
2.10: py3-none-manylinux_2_28. Where it cannot be built (no torch, no compiler, JMLR_NATIVE=0) the package is installed
without it, and ``jmlr_kernels.backend_info()`` says why. A compiler's error is an error.
"""

import platform
import sys
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))
import build_library  # noqa: E402  beside the sources, so that it works without setuptools too
import portable_link  # noqa: E402

PLAN = build_library.plan()
LIBRARY = "jmlr_kernels/_C.so"


class BuildPackage(build_py):
    """Adds the record of what was built, or why not."""

    def run(self) -> None:
        super().run()
        root = ROOT if self.editable_mode else Path(self.build_lib)
        if self.editable_mode and PLAN.problem:
            (ROOT / LIBRARY).unlink(missing_ok=True)  # an earlier build's
        build_library.write_record(PLAN, root / "jmlr_kernels" / "_build.json")


class BuildLibrary(build_ext):
    """Compiles csrc/ with g++ and nvcc, through ninja where it is found."""

    def get_ext_filename(self, fullname: str) -> str:
        return f"{fullname.replace('.', '/')}.so"  # no Python's tag

    def build_extension(self, ext: Extension) -> None:
        build_library.build(PLAN, Path(self.get_ext_fullpath(ext.name)), Path(self.build_temp).resolve())


class NativeDistribution(Distribution):
    """With the library the package is bound to a platform, though to no Python."""

    def has_ext_modules(self) -> bool:
        return PLAN.problem is None


class Wheel(bdist_wheel):
    """Any Python 3; the platform's oldest system where the library loads."""

    def get_tag(self) -> tuple[str, str, str]:
        if PLAN.problem:
            return "py3", "none", "any"
        library = Path(self.bdist_dir or "", LIBRARY)
        portable = library.is_file() and not portable_link.not_portable(library)
        return "py3", "none", f"{'manylinux_2_28' if portable else 'linux'}_{platform.machine()}"


for absent in filter(None, (PLAN.problem, PLAN.cuda_problem)):
    print(f"jmlr-kernels without {'its native library' if absent is PLAN.problem else 'CUDA kernels'}: {absent}")
setup(
    distclass=NativeDistribution,
    ext_modules=[] if PLAN.problem else [Extension("jmlr_kernels._C", sources=[])],
    cmdclass={"build_py": BuildPackage, "build_ext": BuildLibrary, "bdist_wheel": Wheel},
)
