#!/usr/bin/env bash
# Everything that needs a GPU, in one command and in bounded time. See usage below.
set -uo pipefail

usage() {
    cat <<'END'
Usage: benchmarks/run_gpu.sh [--minutes N] [--out DIR] [--dry-run]

On a machine with an NVIDIA GPU, and without a network: the tests that need one, on Hopper those of attention's Gluon
kernels, every op timed beside its peers, and compute-sanitizer over a few kernels where it is installed. Results go to DIR/<device>.json, logs to DIR/<device>.log/.

  --minutes N   time for all of it (default 10); each step has its share, and is ended when that is over
  --out DIR     where results go (default benchmarks/results)
  --dry-run     print the steps and their limits, and run none
  PYTHON=...    the interpreter that has fastlm, pytest and triton (default python3)
  JOBS=...      test files at once (default 4)

A step that fails does not stop the next. Exit code: 0 all passed, 1 a step failed, 2 wrong usage or no GPU.

Example: PYTHON=.venv/bin/python benchmarks/run_gpu.sh --minutes 10
END
}

minutes=10 out='' dry=false
while [ $# -gt 0 ]; do
    case $1 in
    -h | --help) usage && exit 0 ;;
    --dry-run) dry=true ;;
    --minutes | --out)
        [ $# -ge 2 ] || { echo "$1 needs a value; see --help" >&2 && exit 2; }
        if [ "$1" = --minutes ]; then minutes=$2; else out=$2; fi
        shift
        ;;
    *) echo "no option $1; see --help" >&2 && exit 2 ;;
    esac
    shift
done
[[ $minutes =~ ^[1-9][0-9]*$ ]] || { echo "--minutes takes a whole number above 0, not $minutes" >&2 && exit 2; }

case $out in '' | /*) ;; *) out=$PWD/$out ;; esac
cd "$(dirname "$0")/.." || exit 2
out=${out:-$PWD/benchmarks/results}
python=${PYTHON:-python3}
jobs=${JOBS:-4}
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 PYTHONUNBUFFERED=1
seconds=$((minutes * 60))
deadline=$((SECONDS + seconds))
ops=(attention decode_attention sampling fused_linear_sample linear_cross_entropy rms_norm rotary swiglu)
failed=()

step() {  # step NAME PERCENT COMMAND...: the command has PERCENT of the time, or what is left when that is less
    local name=$1 limit=$((seconds * $2 / 100)) left=$((deadline - SECONDS)) start=$SECONDS code
    shift 2
    [ "$limit" -lt "$left" ] || limit=$left
    if $dry; then
        printf '%-12s at most %4d s: %s\n' "$name" "$limit" "$*"
        return
    fi
    if [ "$limit" -lt 1 ]; then
        failed+=("$name (no time left)")
        return
    fi
    printf '=== %s, at most %d s\n' "$name" "$limit"
    # An interrupt, as Ctrl-C gives: what is measured by then is on disk. After 10 s more, an end.
    timeout --signal=INT --kill-after=10 "$limit" "$@" >"$log/$name.log" 2>&1
    code=$?
    tail -n 15 "$log/$name.log"
    if [ $code -eq 0 ]; then
        printf '=== %s: ok, %d s\n\n' "$name" $((SECONDS - start))
    else
        [ $code -ne 124 ] && [ $code -ne 137 ] || code="time out"
        failed+=("$name")
        printf '=== %s: FAILED (%s), %d s; all of it: %s\n\n' "$name" "$code" $((SECONDS - start)) "$log/$name.log"
    fi
}

one_file() {  # one_file TEST_FILE LOG: its last line; pytest's code 5 says that no test of the file needs a GPU
    "$python" -m pytest -m gpu -p no:cacheprovider "$1" >"$2" 2>&1
    local code=$?
    [ $code -eq 5 ] && return 0
    echo "$1: $(tail -n 1 "$2")"
    [ $code -eq 0 ] || grep -E '^(FAILED|ERROR)' "$2"
    return $code
}

test_files() {  # test_files LOG_DIR: several at once, because most of the time goes to compiling kernels
    grep -lE 'def test_.*\bdevice\b|mark\.gpu' -r tests --include='test_*.py' | sort |
        xargs -P "$jobs" -I{} bash -c 'one_file {} "$0/$(basename {} .py).log"' "$1"
}
export -f one_file test_files
export python jobs

device=$("$python" -c 'import torch
if torch.cuda.is_available():
    print("-".join(torch.cuda.get_device_name().lower().split()))' 2>/dev/null | tail -n 1)
if [ -z "$device" ]; then
    if ! $dry; then
        echo "no GPU: $python -m fastlm doctor says what torch sees here; nothing was run" >&2
        exit 2
    fi
    device=no-gpu
fi
log=$out/$device.log
$dry || mkdir -p "$log" || exit 2

step tests 40 bash -c 'test_files "$0"' "$log"
# These kernels serve nothing that does not ask for them until a GPU has shown them right; a hang ends with the step.
step gluon 12 env FASTLM_BACKEND=gluon bash -c 'one_file tests/ops/test_attention_gluon.py "$0/gluon_tests.log"' "$log"
[[ " ${failed[*]} " != *" gluon"* ]] || export FASTLM_BENCH_GLUON=0
step bench 33 "$python" -m fastlm bench "${ops[@]}" --gpu --seconds 0.2 --json "$out/$device.json"
if command -v compute-sanitizer >/dev/null; then
    step sanitizer 15 compute-sanitizer --tool memcheck --error-exitcode 1 "$python" -m pytest -m gpu -x \
        -p no:cacheprovider tests/ops/test_decode_attention_triton.py -k "sinks or batch"
elif ! $dry; then
    echo "compute-sanitizer is not installed, so no step with it"
fi

$dry && exit 0
echo "results: $out/$device.json"
if [ ${#failed[@]} -gt 0 ]; then
    printf 'failed: %s\n' "$(IFS=';' && echo "${failed[*]}")"
    exit 1
fi
echo "all steps passed"
