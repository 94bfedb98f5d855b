#!/usr/bin/env bash
# Everything that needs a GPU, in one go and without a network: installs this checkout for the run
# alone, runs the tests that skip elsewhere, then benchmarks/gpu.py. Ends within nine minutes.
#
#     benchmarks/gpu.sh [--dry-run] [--out FOLDER] [--parts NAME ...] [--variants NAME ...]
#
# Results go to FOLDER row by row (default: $OUT where that is set, else gpu-results): gpu.md,
# gpu.json and logs. --dry-run does the same on a CPU at toy sizes, and measures nothing.
# PYTHON (default: python3) must have torch, Triton, pytest, scikit-build-core, CMake and Ninja.
set -u

case "${1:-}" in -h | --help) sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
started=$(date +%s)
repository=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
out=${OUT:-gpu-results}
given=()
while [ $# -gt 0 ]; do
    case $1 in
        --out) out=${2:?--out needs a folder}; shift ;;
        *) given+=("$1") ;;
    esac
    shift
done
mkdir -p "$out" || exit 1
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT

# --target and PYTHONPATH, since a virtual environment made from another one does not see its
# packages; and a copy of the sources, so that none of the build stays in the checkout.
site=$work/site
install() {
    RHTCOMM_REQUIRE_KERNELS=1 timeout 120 "$python" -m pip install --quiet --no-deps --no-index \
        --no-build-isolation --no-compile --no-cache-dir --disable-pip-version-check \
        --target "$site" "$repository" </dev/null
}
# Where pip cannot: the sources and the library beside them.
put() {
    rm -rf "$site" && mkdir -p "$site" && cp -RL "$repository/rhtcomm" "$site/rhtcomm" &&
        timeout 120 cmake -S "$repository" -B "$work/build" -DCMAKE_BUILD_TYPE=Release &&
        timeout 120 cmake --build "$work/build" --parallel &&
        cp "$work/build/rhtcomm_cpu.so" "$site/rhtcomm/kernels/"
}
if ! install >"$out/install.log" 2>&1; then
    echo "pip could not install the checkout (install.log says why); CMake alone is tried"
    if ! put >>"$out/install.log" 2>&1; then
        echo "the C kernels could not be built: the CPU's side of all comparisons is slow"
        rm -rf "$site" && mkdir -p "$site" && cp -RL "$repository/rhtcomm" "$site/rhtcomm"
    fi
fi
echo "installed after $(($(date +%s) - started)) s"

export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$work/triton}
"$python" "$repository/benchmarks/gpu.py" --out "$out" --started "$started" "${given[@]}"
