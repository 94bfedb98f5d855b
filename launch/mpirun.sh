#!/usr/bin/env bash
set -euo pipefail

usage() {
  cat <<'USAGE'
Start launch/train_ddp.py with mpiexec: DDP's own process group is Gloo (or NCCL), and the hook
exchanges its payloads through MPI.

  launch/mpirun.sh RANKS [ARGUMENTS OF train_ddp.py]

One machine, two ranks:

  launch/mpirun.sh 2 --hook rht --bits 4

Several machines: name them (or a file of them) for mpiexec. Every machine needs this checkout at the
same path, and the same Python version, as the training data is its library.

  MPIEXEC_OPTIONS="-hosts node0,node1" launch/mpirun.sh 2 --hook rht --bits 4

Variables:

  PYTHON           interpreter that has torch, mpi4py and rhtcomm (python3)
  MPIEXEC          mpiexec of the MPI that mpi4py uses (the one next to PYTHON, else that on PATH)
  MPIEXEC_OPTIONS  further options for mpiexec, split at blanks

`pip install 'rhtcomm[mpi]'` brings mpi4py and MPICH.
USAGE
}

case "${1:-}" in
  -h | --help)
    usage
    exit
    ;;
  '' | *[!0-9]*)
    echo "launch/mpirun.sh: the first argument must be the number of ranks; see --help" >&2
    exit 2
    ;;
esac

ranks="$1"
shift
python="${PYTHON:-python3}"
if [[ -z "${MPIEXEC:-}" ]]; then
  MPIEXEC="$("$python" -c 'import sys; print(sys.prefix)')/bin/mpiexec"
  [[ -x "$MPIEXEC" ]] || MPIEXEC=mpiexec
fi
read -r -a options <<<"${MPIEXEC_OPTIONS:-}"

# The trainer sets its threads itself. `-m mpi4py` ends all ranks when one fails.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$MPIEXEC" -n "$ranks" ${options[@]+"${options[@]}"} "$python" -m mpi4py \
  "$(dirname "${BASH_SOURCE[0]}")/train_ddp.py" --communicator mpi "$@"
