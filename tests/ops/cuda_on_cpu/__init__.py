"""Runs the CUDA core's own source on the CPU: its headers replaced by those of this folder, built by the C++ compiler.

What differs from the source that nvcc sees is `kernel<<<grid, block, bytes, stream>>>(…)`, rewritten as a call. How
long a kernel takes, and whether a chip keeps its threads in this order, such a run does not tell; indices, barriers,
masks and sums it does.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[2] / "csrc"
_LAUNCH = re.compile(r"(\w+<\w+>)<<<(.+?), (\w+), (\w+), stream>>>\((.*?)\);")


def build(folder: Path) -> ModuleType:
    """`fastlm._cuda` for the CPU, made in `folder`."""
    import pybind11

    compiler = [*shlex.split(os.environ.get("CXX", "c++")), "-std=c++20", "-fPIC", "-fvisibility=hidden"]
    compiler += ["-fsanitize=alignment,bounds,signed-integer-overflow,shift", "-fno-sanitize-recover=all"]
    includes = [HERE, CSRC, pybind11.get_include(), sysconfig.get_paths()["include"]]
    flags = [f"-I{path}" for path in includes]
    jobs = []
    for source, level in ((HERE / "machine.cpp", "-O2"), *((s, "-O1") for s in sorted((CSRC / "cuda").glob("*.cu")))):
        copy = folder / f"{source.stem}.cpp"
        text, launches = _LAUNCH.subn(r"cuda_on_cpu::launch(\2, \3, \4, [&] { \1(\5); });", source.read_text())
        assert bool(launches) == (source.suffix == ".cu"), source
        copy.write_text(text)
        jobs.append([*compiler, level, "-w", *flags, "-c", str(copy), "-o", f"{copy}.o"])
    module = CSRC / "cuda" / "module.cpp"
    jobs.append([*compiler, "-O0", "-w", *flags, "-c", str(module), "-o", str(folder / "module.cpp.o")])
    running = [subprocess.Popen(job, stderr=subprocess.PIPE, text=True) for job in jobs]
    errors = [process.communicate()[1] for process in running]
    assert not any(process.returncode for process in running), "\n".join(errors)[:4000]
    library = folder / "_cuda.so"
    subprocess.run([*compiler, "-shared", "-o", library, *(job[-1] for job in jobs)], check=True)
    spec = importlib.util.spec_from_file_location("_cuda", library)
    assert spec
    assert spec.loader
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded
