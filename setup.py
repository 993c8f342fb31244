"""Builds the native core. Everything else about the package is in pyproject.toml.

`csrc/` becomes `fastlm._native` with any C++20 compiler. With `FASTLM_CUDA=1`, `csrc/cuda/` becomes
`fastlm._cuda` by nvcc; no GPU is needed to build it. Neither links to torch, so one build serves every torch.

Environment:
    CXX                  the C++ compiler (default: c++, g++ or clang++, whichever is found first)
    FASTLM_CUDA=1        also build fastlm._cuda
    FASTLM_CUDA_ARCHS    its chips, default "80;90;100"
    FASTLM_NO_NATIVE=1   install without a native core: no tokenizer, no C++ CPU kernels
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CXX_FLAGS = ["-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-pthread", "-Wall", "-Wextra", "-DNDEBUG"]


def find_compiler() -> str:
    """Path of a C++ compiler, or SystemExit with what to install."""
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["c++", "g++", "clang++"]:
        path = shutil.which(shlex.split(name)[0])
        if path:
            return name if wanted else path
    raise SystemExit(
        f"fastlm: no C++ compiler found ({'CXX=' + wanted if wanted else 'looked for c++, g++, clang++'}).\n"
        "  Debian/Ubuntu: apt install g++      Fedora: dnf install gcc-c++      macOS: xcode-select --install\n"
        "  Or install without the native core (no tokenizer, no C++ CPU kernels): "
        "FASTLM_NO_NATIVE=1 pip install ."
    )


def check_cxx20(compiler: str) -> None:
    probe = subprocess.run(
        [*shlex.split(compiler), "-std=c++20", "-x", "c++", "-fsyntax-only", "-"],
        input="#include <span>\n#include <bit>\nint main() { return std::popcount(0u); }\n",
        text=True,
        capture_output=True,
    )
    if probe.returncode:
        raise SystemExit(
            f"fastlm: {compiler} does not compile C++20 (g++ 10 or clang++ 12 and later do). It said:\n"
            + probe.stderr.strip()
        )


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    nvcc = shutil.which("nvcc") or shutil.which(str(Path(home) / "bin" / "nvcc"))
    if nvcc is None:
        raise SystemExit(
            f"fastlm: FASTLM_CUDA=1 but nvcc is neither on PATH nor in {home}/bin.\n"
            "  Install the CUDA toolkit or set CUDA_HOME; without FASTLM_CUDA=1 the GPU kernels run by Triton."
        )
    return nvcc


class NinjaBuild(build_ext):
    """Writes one build.ninja for each extension module and runs it."""

    def run(self) -> None:
        check_cxx20(find_compiler())
        if os.environ.get("FASTLM_CUDA") == "1":
            find_nvcc()
        super().run()

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        build_dir = Path(self.build_temp).resolve() / ext.name
        build_dir.mkdir(parents=True, exist_ok=True)
        self.write_ninja_file(build_dir / "build.ninja", [ROOT / s for s in ext.sources], output)
        command = [sys.executable, "-m", "ninja", "-f", "build.ninja"]
        if subprocess.run(command, cwd=build_dir).returncode:
            raise SystemExit(f"fastlm: building {ext.name} failed; the compiler's message is above")

    def write_ninja_file(self, path: Path, sources: list[Path], output: Path) -> None:
        import pybind11
        from ninja.ninja_syntax import Writer

        compiler = find_compiler()
        includes = [ROOT / "csrc", pybind11.get_include(), sysconfig.get_paths()["include"]]
        include_flags = [f"-I{shlex.quote(str(p))}" for p in includes]
        is_cuda = any(s.suffix == ".cu" for s in sources)
        # nvcc compiles and links every file of a CUDA module, so that its own headers and runtime are found.
        if is_cuda:
            archs = os.environ.get("FASTLM_CUDA_ARCHS", "80;90;100").split(";")
            codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
            driver = f"{find_nvcc()} -ccbin {shlex.quote(compiler)}"
            flags = ["-O3", "-std=c++20", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall", "-Xptxas=-v", *codes]
            link_flags = ["-shared", "-cudart=static"]
        else:
            driver, flags, link_flags = compiler, CXX_FLAGS, ["-shared", "-pthread"]
            if sys.platform == "darwin":
                link_flags += ["-undefined", "dynamic_lookup"]
        with path.open("w") as handle:
            ninja = Writer(handle)
            ninja.rule(
                "compile",
                f"{driver} -MMD -MF $out.d {' '.join(flags + include_flags)} -c $in -o $out",
                depfile="$out.d",
                deps="gcc",
                description="compile $in",
            )
            ninja.rule("link", f"{driver} $in -o $out {' '.join(link_flags)}", description="link $out")
            objects = []
            for source in sources:
                name = str(source.relative_to(ROOT / "csrc")).replace("/", "_") + ".o"
                objects += ninja.build(name, "compile", str(source))
            ninja.build(str(output), "link", objects)
            ninja.default(str(output))


def sources(*patterns: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for pattern in patterns for p in (ROOT / "csrc").glob(pattern))


extensions = []
if os.environ.get("FASTLM_NO_NATIVE") != "1":
    if platform.system() == "Windows":
        raise SystemExit(
            "fastlm: the native core builds with g++ or clang++ on Linux and macOS. On Windows use WSL, or set "
            "FASTLM_NO_NATIVE=1 to install without the tokenizer and the C++ CPU kernels."
        )
    extensions.append(Extension("fastlm._native", sources("module.cpp", "tokenizer/*.cpp", "cpu/*.cpp")))
    if os.environ.get("FASTLM_CUDA") == "1":
        extensions.append(Extension("fastlm._cuda", sources("cuda/*.cpp", "cuda/*.cu")))

setup(ext_modules=extensions, cmdclass={"build_ext": NinjaBuild})
