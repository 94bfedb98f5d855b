"""The emulator of PTX by itself: what it computes, and what it refuses."""

from collections.abc import Callable

import ptx
import pytest
import torch
from ptx_memory import Global

HEAD = """
.visible .entry kernel(
    .param .u64 .ptr .global .align 1 kernel_param_0
)
{
    .reg .pred %p<9>;
    .reg .b16 %rs<9>;
    .reg .b32 %r<99>;
    .reg .b64 %rd<9>;
    ld.param.b64 %rd1, [kernel_param_0];
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd2, %r1, 4;
    add.s64 %rd3, %rd1, %rd2;
    shl.b32 %r2, %r1, 2;
"""


def run(body: str, x: torch.Tensor, warps: int = 2) -> None:
    """%r1 is the thread, %r2 four times that, %rd1 the address of x, and %rd3 that of x[thread]."""
    kernel = ptx.parse(HEAD + body + "\nret;\n}\n")
    ptx.Program(kernel, warps, (0, 0), [x.data_ptr()], Global([x]), 1024).run()


def result(body: str) -> list[int]:
    """%r9 of each of 64 threads."""
    x = torch.zeros(64, dtype=torch.int32)
    run(body + "\nst.global.b32 [%rd3], %r9;", x)
    return x.tolist()


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("shfl.sync.bfly.b32 %r9, %r1, 3, 31, -1;", lambda i: i ^ 3),
        ("shfl.sync.up.b32 %r9, %r1, 2, 0, -1;", lambda i: i - 2 if i % 32 >= 2 else i),
        ("shfl.sync.down.b32 %r9|%p1, %r1, 2, 31, -1;", lambda i: i + 2 if i % 32 < 30 else i),
        ("shfl.sync.idx.b32 %r9, %r1, 5, 31, -1;", lambda i: i // 32 * 32 + 5),
        ("redux.sync.add.s32 %r9, %r1, -1;", lambda i: sum(range(i // 32 * 32, i // 32 * 32 + 32))),
        ("mov.b32 {%rs1, %rs2}, %r1; mov.b32 %r9, {%rs2, %rs1};", lambda i: i << 16),
        ("prmt.b32 %r9, %r1, %r98, 0x1011U;", lambda i: i << 16),
        ("shf.l.wrap.b32 %r9, %r1, %r2, 8;", lambda i: 4 * i << 8),
        ("mov.u32 %r9, 7; setp.gt.u32 %p1, %r1, 40; @%p1 mov.u32 %r9, 8;", lambda i: 7 + (i > 40)),
    ],
)
def test_what_instructions_compute(body: str, expected: Callable[[int], int]) -> None:
    assert result(body) == [expected(i) for i in range(64)]


def test_bfloat16_is_rounded_to_even() -> None:
    """The low half is 1 + 2^-8, as far from 1 as from the next bfloat16."""
    body = "cvt.rn.f32.u32 %r3, %r1; cvt.rn.bf16x2.f32 %r9, %r3, 0f3F808000;"
    high = torch.arange(64).bfloat16().view(torch.int16).int()
    assert result(body) == ((high << 16) + 0x3F80).tolist()


def test_threads_that_part_meet_again() -> None:
    """Each loops as often as its number says; after that a shuffle needs all of them."""
    body = """
        mov.u32 %r3, 0;
        mov.u32 %r4, %r1;
    $loop:
        setp.eq.b32 %p1, %r4, 0;
        @%p1 bra $done;
        add.s32 %r3, %r3, 2;
        sub.s32 %r4, %r4, 1;
        bra.uni $loop;
    $done:
        shfl.sync.bfly.b32 %r9, %r3, 1, 31, -1;"""
    assert result(body) == [2 * (i ^ 1) for i in range(64)]


def test_matrices_are_transposed_as_documented() -> None:
    """Of the 8 x 8 matrix whose entry (i, j) is 8 i + j, thread l has entries 2 l and 2 l + 1."""
    store = """
        and.b32 %r3, %r1, 31;
        shl.b32 %r4, %r3, 1;
        shl.b32 %r5, %r3, 17;
        add.s32 %r6, %r4, %r5;
        add.s32 %r6, %r6, 65536;
        and.b32 %r7, %r3, 7;
        shl.b32 %r7, %r7, 4;
        and.b32 %r8, %r1, 32;
        shl.b32 %r8, %r8, 2;
        add.s32 %r7, %r7, %r8;
        stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r7], {%r6};
        ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%r9}, [%r7];"""
    lane = torch.arange(64) % 32
    low = 8 * (2 * (lane % 4)) + lane // 4
    assert result(store) == (low + ((low + 8) << 16)).tolist()


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("sin.approx.f32 %r9, %r1;", r"line 15: sin.approx.f32 %r9, %r1: .* not know"),
        ("add.rz.f32 %r9, %r1, %r1;", r"add.rz.f32 .* not know"),
        ("add.f32 %r9, %r1, %r1;", r"add.f32 .* not know"),  # may be fused
        ("fma.rn.f32 %r9, %r1, 0f40000000, %r1;", "fma of other products"),
        ("shl.b32 %r9, %r1, %r1;", "shifts 32 bits by 63"),
        ("add.s32 %r9, %rd1, 1;", "%rd1 does not have the width"),
        ("cvt.u16.u32 %r9, %r1;", "%r9 does not have the width of the result"),
        ("ld.global.b32 %r9, [%rd1+2];", "no multiple of 4"),
        ("ld.global.b32 %r9, [%rd3+4];", "bounds of every tensor"),
        ("st.global.b32 [%rd3+-4], %r9;", "bounds of every tensor"),
        ("ld.shared.b32 %r9, [%r2];", "never written"),
        ("st.shared.b32 [%r2+960], %r1;", "out of the 1024 bytes"),
        ("st.shared.b32 [global_smem], %r1;", "different values to one place"),
        (
            "st.shared.b32 [%r2], %r1; xor.b32 %r3, %r2, 128; ld.shared.b32 %r9, [%r3];",
            "race: reads",
        ),
        (
            "st.shared.b32 [%r2], %r1; bar.sync 0; xor.b32 %r3, %r2, 128;"
            "ld.shared.b32 %r9, [%r3]; st.shared.b32 [%r2], %r2;",
            "race: changes what another warp used",
        ),
        ("setp.gt.u32 %p1, %r1, 40; @%p1 bar.sync 0;", "not all threads"),
        ("setp.gt.u32 %p1, %r1, 40; @%p1 redux.sync.max.u32 %r9, %r1, -1;", "part of a warp"),
        ("$again: bra.uni $again;", "not end"),
    ],
)
def test_what_is_refused(body: str, fault: str) -> None:
    with pytest.raises(ptx.Fault, match=fault):
        result(body.replace("$again: ", "\n$again:\n"))


def test_a_barrier_ends_a_race() -> None:
    body = """
        st.shared.b32 [%r2], %r1;
        bar.sync 0;
        xor.b32 %r3, %r2, 128;
        ld.shared.b32 %r9, [%r3];"""
    assert result(body) == [i ^ 32 for i in range(64)]
