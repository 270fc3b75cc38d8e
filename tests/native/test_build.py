"""What is built where, and what becomes of it when something is missing or wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "csrc"))
if (ROOT / "csrc").is_dir():
    import build_library

pytestmark = [
    pytest.mark.source,
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++"),
]


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty csrc folder, in place of the real one."""
    folder = tmp_path / "csrc"
    folder.mkdir()
    shutil.copy(ROOT / "csrc" / "exports.map", folder)
    monkeypatch.setattr(build_library, "SOURCES", folder)
    return folder


def without(monkeypatch: pytest.MonkeyPatch, *programs: str) -> None:
    real = shutil.which
    monkeypatch.setattr(build_library.shutil, "which", lambda name: None if Path(name).name in programs else real(name))


def pretended_torch(folder: Path, version: str) -> dict[str, str]:
    (folder / "include").mkdir(parents=True)
    (folder / "version.py").write_text(f"__version__ = '{version}'\n")
    return {"JMLR_TORCH": str(folder)}


# --------------------------------------------------------------------------- what is there


def test_reasons_for_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "JMLR_NATIVE=0" in (build_library.plan({"JMLR_NATIVE": "0"}).problem or "")
    assert "torch was not found" in (build_library.plan({"JMLR_TORCH": str(tmp_path)}).problem or "")
    old = pretended_torch(tmp_path / "old", "2.9.1+cu128")
    assert "torch 2.9.1" in (build_library.plan(old).problem or "")
    assert "no C++ compiler" in (build_library.plan({"CXX": "no-such-compiler"}).problem or "")
    with pytest.raises(RuntimeError, match="JMLR_NATIVE=1.*torch 2.9.1"):
        build_library.plan({**old, "JMLR_NATIVE": "1"})
    assert build_library.plan(pretended_torch(tmp_path / "new", "2.10.0")).problem is None


def test_reasons_for_no_cuda_part(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no CUDA kernels" in (build_library.plan({}).cuda_problem or "")
    (sources / "sm80.cu").write_text("")
    assert "JMLR_CUDA_ARCHS=none" in (build_library.plan({"JMLR_CUDA_ARCHS": "none"}).cuda_problem or "")
    without(monkeypatch, "nvcc")
    found = build_library.plan({})
    assert found.problem is None and found.cuda_problem == "no nvcc was found when it was built"
    for archs, sentence in (("80", "no nvcc was found"), ("ampere", "no architecture"), ("75", "sm_80 or newer")):
        with pytest.raises(RuntimeError, match=sentence):
            build_library.plan({"JMLR_CUDA_ARCHS": archs})


def test_torch_is_found_behind_the_environment_of_a_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('the environment of the build')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = build_library.plan({})
    assert found.problem is None and (found.torch / "lib").is_dir() and tmp_path not in found.torch.parents


def test_jobs_follow_the_switch_and_the_machine() -> None:
    assert build_library.jobs({"MAX_JOBS": "7"}) == 7
    assert 1 <= build_library.jobs({}) <= (os.cpu_count() or 1)


# --------------------------------------------------------------------------- commands


def test_names_of_files_say_how_they_are_compiled(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "a.cpp",
        "a_avx2.cpp",
        "a_avx512.cpp",
        "a_avx512bf16.cpp",
        "torch_cuda.cpp",
        "sm80.cu",
        "sm90_half.cu",
    ):
        (sources / name).write_text("")
    found = build_library.Plan(torch=Path("/torch"), compiler="g++")
    commands = {source.name: command for source, _, command in build_library.compile_steps(found, sources)}
    assert set(commands) == {"a.cpp", "a_avx2.cpp", "a_avx512.cpp", "a_avx512bf16.cpp"}
    assert "-DJMLR_CUDA" not in commands["a.cpp"] and not [flag for flag in commands["a.cpp"] if "avx" in flag]
    assert "-mavx2" in commands["a_avx2.cpp"] and "-mavx512f" not in commands["a_avx2.cpp"]
    assert "-mavx512f" in commands["a_avx512.cpp"] and "-mavx512bf16" not in commands["a_avx512.cpp"]
    assert "-mavx512bf16" in commands["a_avx512bf16.cpp"]

    monkeypatch.setattr(build_library, "_cuda_home", lambda nvcc: Path("/cuda"))
    found.nvcc, found.cuda_version, found.archs = "nvcc", "13.0", ["80", "90a"]
    commands = {source.name: command for source, _, command in build_library.compile_steps(found, sources)}
    assert "-DJMLR_CUDA" in commands["torch_cuda.cpp"] and commands["torch_cuda.cpp"][0] == "g++"
    targets = [flag for flag in commands["sm80.cu"] if flag.startswith("arch=")]
    ptx = "arch=compute_80,code=compute_80"
    assert targets == ["arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a", ptx]
    assert [flag for flag in commands["sm90_half.cu"] if flag.startswith("arch=")] == ["arch=compute_90a,code=sm_90a"]
    assert "-DJMLR_SM90" in commands["torch_cuda.cpp"]
    assert Path(commands["sm90_half.cu"][1]).name == "checked_ptxas.py"


@pytest.mark.parametrize("archs", [["80"], ["80", "90"], ["80", "100a"]])
def test_kernels_of_one_chip_are_left_out_where_it_is_not_asked_for(
    archs: list[str], sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("torch_cuda.cpp", "sm80.cu", "sm90_half.cu"):
        (sources / name).write_text("")
    monkeypatch.setattr(build_library, "_cuda_home", lambda nvcc: Path("/cuda"))
    found = build_library.Plan(torch=Path("/torch"), compiler="g++", nvcc="nvcc", cuda_version="13.0", archs=archs)
    commands = {source.name: command for source, _, command in build_library.compile_steps(found, sources)}
    assert set(commands) == {"torch_cuda.cpp", "sm80.cu"} and "-DJMLR_SM90" not in commands["torch_cuda.cpp"]


_SERIALIZED = r"""
__global__ void __launch_bounds__(128) serialized(float* out, unsigned long long a, unsigned long long b) {
    float c[4] = {};
    for (int i = 0; i < 4; ++i) {
        asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 0;"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "l"(a), "l"(b));
        c[0] *= 2;  // touched while a product is under way
    }
    asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
    out[threadIdx.x] = c[0] + c[1] + c[2] + c[3];
}
"""


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_products_that_wait_for_each_other_are_an_error(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (sources / "sm90_serialized.cu").write_text(_SERIALIZED)
    with pytest.raises(subprocess.CalledProcessError):
        build_library.build(build_library.plan({"JMLR_CUDA_ARCHS": "90a"}), tmp_path / "_C.so", tmp_path / "scratch")
    assert "serialized" in capfd.readouterr().out


@pytest.mark.parametrize("ninja", [True, False])
def test_a_compilers_error_is_an_error(
    ninja: bool, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (sources / "broken.cpp").write_text("this is no C++\n")
    if not ninja:
        monkeypatch.setattr(build_library.sys, "executable", str(tmp_path / "python"))
        without(monkeypatch, "ninja")
    found = build_library.Plan(torch=Path("/torch"), compiler="g++")
    with pytest.raises(subprocess.CalledProcessError):
        build_library.build(found, tmp_path / "_C.so", tmp_path / "scratch")
    assert not (tmp_path / "_C.so").exists()


def test_without_ninja_it_compiles_one_file_after_the_other(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("library.cpp", "portable.cpp"):
        shutil.copy(ROOT / "csrc" / name, sources)
    found = build_library.plan({})
    monkeypatch.setattr(build_library.sys, "executable", str(tmp_path / "python"))
    without(monkeypatch, "ninja")
    build_library.build(found, tmp_path / "_C.so", tmp_path / "scratch folder")
    code = "import sys, torch; torch.ops.load_library(sys.argv[1]); print(torch.ops.jmlr_native.build_info())"
    monkeypatch.undo()
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "_C.so")], capture_output=True, text=True)
    assert json.loads(run.stdout)["cuda"] == "", run.stderr


_SPILLING = """
__global__ void __launch_bounds__(1024, 2) spill(float* x) {
    float a[96];
    for (int i = 0; i < 96; ++i) a[i] = x[i * 1024 + threadIdx.x];
    for (int k = 0; k < 3; ++k)
        for (int i = 0; i < 96; ++i) a[i] = a[i] * a[(i * 7 + k + 1) % 96] + a[(i * 5 + 3) % 96];
    for (int i = 0; i < 96; ++i) x[i * 1024 + threadIdx.x] = a[i];
}
"""


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_a_spilled_register_is_an_error(sources: Path, tmp_path: Path) -> None:
    (sources / "sm80.cu").write_text(_SPILLING.replace("    for", "#pragma unroll\n    for"))
    found = build_library.plan({"JMLR_CUDA_ARCHS": "80"})
    ((_, _, command),) = build_library.compile_steps(found, tmp_path)
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode != 0 and "spilled" in run.stdout + run.stderr
    other = build_library.plan({"JMLR_CUDA_ARCHS": "86"})
    ((_, _, elsewhere),) = build_library.compile_steps(other, tmp_path)
    run = subprocess.run(elsewhere, capture_output=True, text=True)
    assert run.returncode == 0 and "spilled" in run.stdout + run.stderr  # said, and built
    (sources / "sm80.cu").write_text("__global__ void one(float* x) { *x = 1; }\n")
    assert subprocess.run(command, capture_output=True).returncode == 0


# --------------------------------------------------------------------------- the package


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources alone, without what was built among them."""
    folder = tmp_path_factory.mktemp("tree")
    for name in ("csrc", "jmlr", "jmlr_kernels"):
        ignored = shutil.ignore_patterns("__pycache__", "_C.so", "_build.json")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "DATA_LICENSES.md"):
        shutil.copy(ROOT / name, folder)
    return folder


def hook(name: str, tree: Path, out: Path, **switches: str) -> Path:
    """Call a build hook as pip does; the file that it made."""
    code = f"from setuptools import build_meta; print(build_meta.{name}({str(out)!r}))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tree, capture_output=True, text=True, env={**os.environ, **switches}
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return out / run.stdout.splitlines()[-1]


def test_a_wheel_without_the_library_is_pure_and_says_why(tree: Path, tmp_path: Path) -> None:
    wheel = hook("build_wheel", tree, tmp_path, JMLR_NATIVE="0")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert "jmlr_kernels/_C.so" not in archive.namelist()
        assert "JMLR_NATIVE=0" in json.loads(archive.read("jmlr_kernels/_build.json"))["problem"]


def test_a_source_package_holds_all_that_is_compiled(tree: Path, tmp_path: Path) -> None:
    package = hook("build_sdist", tree, tmp_path, JMLR_NATIVE="0")
    with tarfile.open(package) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {str(path.relative_to(tree)) for path in (tree / "csrc").rglob("*") if path.is_file()}
    wanted = {name for name in wanted if "__pycache__" not in name}
    assert len(wanted) > 5 and wanted <= held


@pytest.mark.slow
def test_a_wheel_with_the_library_is_for_every_python(tree: Path, tmp_path: Path) -> None:
    wheel = hook("build_wheel", tree, tmp_path, JMLR_NATIVE="1", JMLR_CUDA_ARCHS="none")
    run = subprocess.run([sys.executable, "-m", "tools.wheel", "check", str(wheel)], cwd=ROOT, capture_output=True)
    assert run.returncode == 0 and b"no CUDA part: " in run.stdout, run.stderr


def test_setup_is_short_and_the_hub_file_names_every_source() -> None:
    assert len((ROOT / "setup.py").read_text().splitlines()) < 150
    tomllib = pytest.importorskip("tomllib")
    listed = tomllib.loads((ROOT / "build.toml").read_text())
    named = {name for kernel in (*listed["kernel"].values(), listed["torch"]) for name in kernel["src"]}
    there = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.[chiu]*")} - {"csrc/portable.cpp"}
    assert named == there
