#!/usr/bin/env bash
set -euo pipefail

usage() {
  cat <<'USAGE'
Start launch/train_ddp.py with torchrun. All arguments are passed on to it.

  launch/torchrun.sh [ARGUMENTS OF train_ddp.py]

One machine, four ranks:

  NPROC_PER_NODE=4 launch/torchrun.sh --hook rht --bits 4

Two machines: run this on both, with NODE_RANK=0 on the machine of MASTER_ADDR and NODE_RANK=1 on the
other. All machines need the same Python version, since its library is the training data.

  NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 launch/torchrun.sh --hook rht --bits 4

Variables:

  NPROC_PER_NODE  ranks on each machine (2)
  NNODES          machines (1)
  NODE_RANK       number of this machine, from 0; needed if NNODES is above 1. (The machines connect to
                  machine 0; rank 0 may be on another one.)
  MASTER_ADDR     address of machine 0; needed if NNODES is above 1
  MASTER_PORT     free port on machine 0 (29500); unused on one machine
  MAX_RESTARTS    how often a machine restarts its ranks (0). If one rank fails, all ranks of all
                  machines restart and resume from the file of --checkpoint, so pass --checkpoint
                  and --checkpoint-every; all machines must see the same file. Use the same number
                  on all machines.
  PYTHON          interpreter with torch and rhtcomm (python3)

If a machine has several networks, GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME selects the interface.
For the trainer's own arguments: python3 launch/train_ddp.py --help
USAGE
}

case "${1:-}" in
  -h | --help)
    usage
    exit
    ;;
esac

python="${PYTHON:-python3}"
nnodes="${NNODES:-1}"
options=(--nproc-per-node="${NPROC_PER_NODE:-2}" --max-restarts="${MAX_RESTARTS:-0}")
if [[ "$nnodes" == 1 ]]; then
  options+=(--standalone)
else
  : "${NODE_RANK:?must be the number of this machine, from 0, where NNODES is above 1}"
  : "${MASTER_ADDR:?must be the address of machine 0 where NNODES is above 1}"
  port="${MASTER_PORT:-29500}"
  # Rank 0 may be on any machine, whose name the others need not know: give its address.
  own_address="$MASTER_ADDR"
  if [[ "$NODE_RANK" != 0 ]]; then
    own_address="$("$python" -c '
import socket, sys
family, kind, *_, address = socket.getaddrinfo(*sys.argv[1:], type=socket.SOCK_DGRAM)[0]
probe = socket.socket(family, kind)
probe.connect(address)  # of UDP: sends nothing
print(probe.getsockname()[0])' "$MASTER_ADDR" "$port")"
  fi
  # With --node-rank instead, restarted ranks find in their store the addresses of the ranks before
  # them (torch 2.13).
  options+=(
    --nnodes="$nnodes"
    --rdzv-backend=c10d
    --rdzv-id=rhtcomm
    --rdzv-endpoint="$MASTER_ADDR:$port"
    --rdzv-conf="is_host=$((NODE_RANK == 0))"
    --local-addr="$own_address"
  )
fi

# torchrun would let restarted ranks share a store with the ranks before them, whose addresses they
# would then find there (torch 2.13).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# The trainer sets its threads itself; torchrun would warn that it does.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$python" -m torch.distributed.run "${options[@]}" \
  "$(dirname "${BASH_SOURCE[0]}")/train_ddp.py" "$@"
