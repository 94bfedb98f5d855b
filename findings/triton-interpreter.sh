#!/usr/bin/env bash
# Triton 3.7.1: in two cases, kernels in the interpreter (TRITON_INTERPRET=1) silently compute other
# results than on a GPU.
#
# `tl.fma(x, y, z)` rounds the product before adding z: for x = y = 1 + 2^-12 and z = -(1 + 2^-11)
# it gives 0, but a fused multiply-add, which rounds x y + z once, gives 2^-24. `tl.umulhi` of int32
# multiplies signed numbers, but compiled code multiplies unsigned ones: the upper half of the product
# of 2^32 - 1 and 2, both as int32, is -1 instead of 1. So a kernel that passes its tests in the
# interpreter may give other bits on a device.
#
# Seen:
#   fma 0.0, rounded once 5.960464477539063e-08
#   umulhi(-1, 2) = -1, of unsigned numbers 1
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 triton==3.7.1
cat >"$folder/case.py" <<'PYTHON'
import torch
import triton
import triton.language as tl


@triton.jit
def fused(x, y, z, out):
    tl.store(out, tl.fma(tl.load(x), tl.load(y), tl.load(z)))


@triton.jit
def upper(x, y, out):
    tl.store(out, tl.umulhi(tl.load(x), tl.load(y)))


x, z = torch.tensor([1 + 2.0**-12]), torch.tensor([-(1 + 2.0**-11)])
out = torch.empty(1)
fused[(1,)](x, x, z, out)
once = (x.double() * x.double() + z.double()).float()
print(f"fma {out.item()}, rounded once {once.item()}")

a, b = torch.tensor([-1], dtype=torch.int32), torch.tensor([2], dtype=torch.int32)
found = torch.empty(1, dtype=torch.int32)
upper[(1,)](a, b, found)
print(f"umulhi(-1, 2) = {found.item()}, of unsigned numbers {((2**32 - 1) * 2) >> 32}")
PYTHON
seen="$(TRITON_INTERPRET=1 "$folder/venv/bin/python" -W ignore "$folder/case.py" 2>/dev/null)"
echo "$seen"
[[ "$seen" == "fma 0.0, rounded once 5.960464477539063e-08
umulhi(-1, 2) = -1, of unsigned numbers 1" ]]
