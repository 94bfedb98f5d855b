#!/usr/bin/env bash
set -euo pipefail

usage() {
  cat <<'USAGE'
Run a program once per rank, with each rank on its own machine of an emulated network.

  launch/network.sh [--mpi] RANKS RATE -- PROGRAM [ARGUMENTS]

Two ranks joined by 100 Mbit/s:

  launch/network.sh 2 100mbit -- python3 launch/train_ddp.py --hook rht --bits 4 --threads 1

Four ranks at 1 Gbit/s that exchange through MPI:

  launch/network.sh --mpi 4 1gbit -- \
    python3 -m mpi4py launch/train_ddp.py --communicator mpi --threads 1

Two sites, 50 ms apart by ping, that lose one packet in a thousand:

  DELAY=25ms LOSS=0.1% launch/network.sh 2 100mbit -- python3 launch/train_ddp.py --hook rht --threads 1

RATE is a whole number of mbit or gbit per second. It applies to Ethernet frames, in each direction of
each rank's link; TCP payload gets 95.6% of it. After idling, a link may send at most 1 ms of data at
once. One switch joins the links, which add no delay.

With DELAY or LOSS a program joins the ranks instead (launch/relay.py), which moves packets one by one:
up to about 400 Mbit/s in all. Each direction of a link has a queue of 50 ms, and drops what comes when
it is full.

The program is told its rank by RANK, WORLD_SIZE, LOCAL_RANK (0), LOCAL_WORLD_SIZE (1), MASTER_ADDR,
MASTER_PORT and GLOO_SOCKET_IFNAME, as under torchrun. With --mpi one mpiexec starts the ranks, and
MPICH may not bypass the links through shared memory.

All ranks end when one fails or on Ctrl-C; the exit status is that of the first that failed. The
namespaces and processes belong to this command: the kernel removes them however it ends. Several
commands may run at once.

Needs Linux, root, iproute2 and util-linux. Variables:

  DELAY    how long a packet travels one way, such as 25ms; a ping then takes 50 ms (default: 0ms)
  LOSS     share of the packets that are lost, independently of each other, such as 0.1% (default: 0%)
  PYTHON   interpreter for the relay; with --mpi: mpiexec is searched next to it (python3)
  MPIEXEC  with --mpi: mpiexec of the MPI that mpi4py uses (default: the one next to PYTHON, or on PATH)
USAGE
}

fail() {
  echo "launch/network.sh: $*" >&2
  exit 2
}

# A token bucket for what leaves through a device; further arguments go to tc itself.
shape() {
  local device="$1" mbit="$2"
  shift 2
  local burst=$((mbit * 125 > 16000 ? mbit * 125 : 16000)) # bytes: 1 ms, or a few frames
  tc "$@" qdisc add dev "$device" root tbf rate "${mbit}mbit" burst "$burst" latency 50ms
}

# The links meet in this namespace; each rank gets one of its own, whose name only this command sees.
set_up() {
  local ranks="$1" mbit="$2" delay="$3" loss="$4" rank
  mount -t tmpfs tmpfs /run/netns
  ip link set lo up
  if [[ "$delay$loss" ]]; then
    coproc RELAY {
      exec "${PYTHON:-python3}" "${0%/*}/relay.py" "$ranks" "$mbit" "${delay:-0}" "${loss:-0}"
    }
    read -r -u "${RELAY[0]}" _
  else
    ip link add switch type bridge
    ip link set switch up
  fi
  for ((rank = 0; rank < ranks; rank++)); do
    ip netns add "rank$rank"
    ip -n "rank$rank" link set lo up
    if [[ "$delay$loss" ]]; then
      ip link set "wire$rank" netns "rank$rank" name veth0
    else
      ip link add "port$rank" type veth peer name veth0 netns "rank$rank"
      ip link set "port$rank" master switch up
      shape "port$rank" "$mbit"
      shape veth0 "$mbit" -n "rank$rank"
    fi
    ip -n "rank$rank" address add "10.0.$((rank / 250)).$((rank % 250 + 1))/16" dev veth0
    ip -n "rank$rank" link set veth0 up
    # BBR, the default of some machines, reaches half of what a token bucket would let through.
    ip -n "rank$rank" route change 10.0.0.0/16 dev veth0 congctl lock cubic
  done
}

# Become the program of a rank.
become() {
  export RANK="$1" WORLD_SIZE="$2" LOCAL_RANK=0 LOCAL_WORLD_SIZE=1
  export MASTER_ADDR=10.0.0.1 MASTER_PORT=29500 GLOO_SOCKET_IFNAME=veth0
  export MPIR_CVAR_NOLOCAL=1 MPIR_CVAR_CH4_NETMOD=ofi FI_PROVIDER=tcp FI_TCP_IFACE=veth0
  shift 2
  exec ip netns exec "rank$RANK" "$@"
}

# What runs inside, as process 1: when it ends the kernel kills whatever is left.
inside() {
  local mpi="$1" ranks="$2" mbit="$3" delay="$4" loss="$5" rank status=0 others
  shift 5
  trap 'exit 143' TERM
  set_up "$ranks" "$mbit" "$delay" "$loss" || fail "the links could not be set up; what failed is said above"
  if [[ "$mpi" ]]; then
    "$mpi" -n "$ranks" "$0" --become pmi "$ranks" "$@" <&0 &
    ranks=1
  else
    for ((rank = 0; rank < ranks; rank++)); do
      (become "$rank" "$ranks" "$@") <&0 &
    done
  fi
  for ((rank = 0; rank < ranks && status == 0; rank++)); do
    wait -n || status=$?
  done
  # The others may still want to say why they end.
  mapfile -t others < <(jobs -p | grep -vx "${RELAY_PID:-none}")
  kill -TERM "${others[@]}" 2>/dev/null || true
  for ((rank = 0; rank < 30; rank++)); do
    jobs -rp | grep -qvx "${RELAY_PID:-none}" || break
    sleep 0.1
  done
  exit "$status"
}

case "${1:-}" in
  -h | --help)
    usage
    exit
    ;;
  --inside)
    shift
    inside "$@"
    ;;
  --become)
    shift 2
    become "${PMI_RANK:?is set by mpiexec, which did not start this}" "$@"
    ;;
esac

mpi=
if [[ "${1:-}" == --mpi ]]; then
  shift
  python="${PYTHON:-python3}"
  mpi="${MPIEXEC:-$("$python" -c 'import sys; print(sys.prefix)')/bin/mpiexec}"
  command -v "$mpi" >/dev/null || mpi=mpiexec
  command -v "$mpi" >/dev/null || fail "mpiexec was not found: set MPIEXEC, or pip install mpich"
fi
[[ "${1:-}" =~ ^[1-9][0-9]{0,3}$ ]] || fail "RANKS must be a positive number; see --help"
[[ "${2:-}" =~ ^([1-9][0-9]*)(mbit|gbit)$ ]] ||
  fail "RATE must be like 100mbit or 1gbit, not '${2:-}'; see --help"
mbit="${BASH_REMATCH[1]}"
[[ "${BASH_REMATCH[2]}" == mbit ]] || mbit=$((mbit * 1000))
[[ "${DELAY:-0ms}" =~ ^([0-9]+(\.[0-9]+)?)ms$ ]] || fail "DELAY must be like 25ms, not '$DELAY'"
delay="${DELAY:+${BASH_REMATCH[1]}}"
[[ "${LOSS:-0%}" =~ ^([0-9]+(\.[0-9]+)?)%$ ]] || fail "LOSS must be like 0.1%, not '$LOSS'"
loss="${LOSS:+${BASH_REMATCH[1]}}"
[[ "${3:-}" == -- && $# -ge 4 ]] || fail "give the program after '--'; see --help"
ranks="$1"
shift 3

for tool in ip tc unshare setpriv; do
  command -v "$tool" >/dev/null ||
    fail "$tool was not found: install iproute2 and util-linux (Linux only)"
done
[[ -z "$delay$loss" || -c /dev/net/tun ]] ||
  fail "DELAY and LOSS need /dev/net/tun, which this machine does not have: try modprobe tun"
[[ "$EUID" == 0 ]] || fail "only root can make network namespaces: run it by sudo, or as root"
mkdir -p /run/netns

# A process group of its own, so that a signal reaches the inside once, from here.
set -m
setpriv --pdeathsig KILL \
  unshare --net --mount --pid --fork --kill-child --mount-proc \
  "$0" --inside "$mpi" "$ranks" "$mbit" "$delay" "$loss" "$@" <&0 &
child=$!
set +m
interrupted=
trap 'interrupted=130; kill -TERM -- "-$child"' INT
trap 'interrupted=143; kill -TERM -- "-$child"' TERM HUP
status=0
wait "$child" || status=$?
while kill -0 "$child" 2>/dev/null; do
  wait "$child" || true
done
exit "${interrupted:-$status}"
