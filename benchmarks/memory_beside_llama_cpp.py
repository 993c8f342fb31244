"""Peak memory of one request over a GGUF model, beside llama.cpp: python -m fastlm.benchmarks.memory_beside_llama_cpp

Each side runs in a process of its own that imports nothing of the other: it loads the file of `bench_llama_cpp`, takes
memory for one sequence of 2048 tokens, fills it with a prompt, and generates. What is counted is the peak of resident
memory, with the pages of the mapped file and, on our side, PyTorch, which is shown alone as well.
"""

from __future__ import annotations

import subprocess
import sys

CONTEXT, NEW_TOKENS = 2048, 64
SIDES = ("PyTorch alone", "fastlm", "llama.cpp")


def run_fastlm(path: str, prompt: list[int]) -> None:
    from fastlm.benchmarks.bench_generation import serve
    from fastlm.benchmarks.bench_llama_cpp import loaded

    serve(loaded(path, sequences=1), [prompt], [NEW_TOKENS])()


def run_llama_cpp(path: str, prompt: list[int]) -> None:
    import llama_cpp

    model = llama_cpp.Llama(path, n_ctx=CONTEXT, verbose=False)
    for _ in zip(range(NEW_TOKENS), model.generate(prompt, temp=0), strict=False):
        pass


def peak() -> float:
    """MiB."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def main() -> None:
    if len(sys.argv) > 1:
        side, path = sys.argv[1:]
        prompt = list(range(1000, 1000 + CONTEXT - NEW_TOKENS))
        if side == "PyTorch alone":
            import torch  # noqa: F401
        elif side == "fastlm":
            run_fastlm(path, prompt)
        else:
            run_llama_cpp(path, prompt)
        print(peak())
        return
    from fastlm.benchmarks.bench_llama_cpp import gguf_file
    from fastlm.benchmarks.llama_cpp_peer import llama_cpp

    file = gguf_file()
    if file is None:
        sys.exit("needs a model: set FASTLM_BENCH_GGUF, or install fastlm[gemma]")
    peaks = {}
    for side in SIDES if llama_cpp() else SIDES[:2]:
        done = subprocess.run([sys.executable, __file__, side, file], check=True, stdout=subprocess.PIPE, text=True)
        peaks[side] = float(done.stdout.split()[-1])
        print(f"{side:14}{peaks[side]:6.0f} MiB")
    if "llama.cpp" in peaks:
        print(f"fastlm takes {peaks['fastlm'] / peaks['llama.cpp']:.2f} times as much as llama.cpp")
    else:
        print("llama-cpp-python is not installed, so llama.cpp is left out")


if __name__ == "__main__":
    main()
