#!/usr/bin/env bash
set -euo pipefail

usage() {
  cat <<'USAGE'
Start launch/train_ddp.py with torchrun. All arguments are passed on to it.

  launch/torchrun.sh [ARGUMENTS OF train_ddp.py]

One machine, four ranks:

  NPROC_PER_NODE=4 launch/torchrun.sh --hook rht --bits 4

Two machines: run this on both, with NODE_RANK=0 on the one that MASTER_ADDR names, and NODE_RANK=1
on the other. Every machine needs the same Python version, as the training data is its library.

  NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 launch/torchrun.sh --hook rht --bits 4

Variables:

  NPROC_PER_NODE  ranks on each machine (2)
  NNODES          machines (1)
  NODE_RANK       number of this machine, from 0; needed where NNODES is above 1
  MASTER_ADDR     address of machine 0; needed where NNODES is above 1
  MASTER_PORT     free port on machine 0 (29500); unused on one machine
  MAX_RESTARTS    how often a machine starts its ranks again (0). When one rank fails, all ranks of
                  all machines start again and go on from the file that --checkpoint names, so give
                  it and --checkpoint-every; all machines must see the same file. Give all machines
                  the same number.
  PYTHON          interpreter that has torch and rhtcomm (python3)

Where a machine has several networks, GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME picks the interface.
For the trainer's own arguments: python3 launch/train_ddp.py --help
USAGE
}

case "${1:-}" in
  -h | --help)
    usage
    exit
    ;;
esac

nnodes="${NNODES:-1}"
options=(--nproc-per-node="${NPROC_PER_NODE:-2}" --max-restarts="${MAX_RESTARTS:-0}")
if [[ "$nnodes" == 1 ]]; then
  options+=(--standalone)
else
  options+=(
    --nnodes="$nnodes"
    --node-rank="${NODE_RANK:?must be the number of this machine, from 0, where NNODES is above 1}"
    --master-addr="${MASTER_ADDR:?must be the address of machine 0 where NNODES is above 1}"
    --master-port="${MASTER_PORT:-29500}"
  )
fi

# torchrun would let restarted ranks share a store with the ranks before them, whose addresses they
# would then find there (torch 2.13).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# The trainer sets its threads itself; torchrun would warn that it does.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "${PYTHON:-python3}" -m torch.distributed.run "${options[@]}" \
  "$(dirname "${BASH_SOURCE[0]}")/train_ddp.py" "$@"
