"""What tensors may be given, and that what is refused leaves nothing behind."""

import pickle
from collections.abc import Callable
from hashlib import blake2b
from typing import Any

import pytest
import torch
from harness import in_fresh_process
from interpreter import has_triton
from lattices import sum_of

from rhtcomm import Codec, Eden, Key, Lattice, QuicFL, RandomizedHadamard, VectorQuantizer
from rhtcomm.kernels import choose, cpu, lattice_kernel_for, use
from rhtcomm.memory import address_of, memory_of, overlap

KEY = Key(3)
NUMEL = 9000
CODEC = Codec(QuicFL(4))


def gaussian(numel: int = NUMEL) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(numel))


def payloads_of(x: torch.Tensor) -> torch.Tensor:
    return CODEC.encode(x, KEY)[None]


# Tensors without memory of their own ------------------------------------------------------------


class Wrapper(torch.Tensor):
    """Holds another tensor; with an offset, its data_ptr() is not 0."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor, offset: int = 0) -> "Wrapper":
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined, no-any-return]
            cls, inner.shape, dtype=inner.dtype, strides=inner.stride(), storage_offset=offset
        )

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any) -> Any:
        raise NotImplementedError(func)


def fake(x: torch.Tensor) -> torch.Tensor:
    with torch._subclasses.FakeTensorMode() as mode:
        return mode.from_tensor(x)


def freed(x: torch.Tensor, offset: int = 0, left: int = 0) -> torch.Tensor:
    whole = torch.cat([torch.zeros(offset, dtype=x.dtype), x.flatten()])
    x = whole[offset:].view(x.shape)
    whole.untyped_storage().resize_(left)
    return x


def functional(x: torch.Tensor) -> torch.Tensor:
    from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode

    with FunctionalTensorMode():
        return FunctionalTensor.to_functional(x)


WITHOUT_MEMORY: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "wrapper": (Wrapper, "is a Wrapper, which has no memory of its own; pass the tensor that it"),
    "wrapper with offset": (lambda x: Wrapper(x, 64), "is a Wrapper, which has no memory"),
    "fake": (fake, "is a FakeTensor, which has no memory; pass a real tensor"),
    "functional": (torch._to_functional_tensor, "is a wrapper of torch.func"),
    "FunctionalTensor": (functional, "is a FunctionalTensor, which has no memory of its own"),
    "freed": (freed, "has no memory: its storage was freed, shrunk"),
    "freed, with offset": (lambda x: freed(x, 16), "has no memory: its storage was freed, shrunk"),
    "made smaller": (lambda x: freed(x, 16, 400), "has no memory: its storage was freed, shrunk"),
    "meta": (lambda x: x.to("meta"), "is on the meta device"),
    "sparse": (
        torch.Tensor.to_sparse,
        r"has the layout torch.sparse_coo; pass [a-z ]+.to_dense\(\)",
    ),
    "nested": (lambda x: torch.nested.nested_tensor([x, x]), "is a nested tensor"),
    "array": (torch.Tensor.numpy, "is a ndarray; make it a torch.Tensor"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", WITHOUT_MEMORY)
@pytest.mark.parametrize("name", ["x", "out of encode", "payloads", "shards", "out"])
def test_tensors_without_memory_are_refused(kind: str, name: str) -> None:
    make, fault = WITHOUT_MEMORY[kind]
    x = gaussian()
    payload = payloads_of(x)
    calls: dict[str, Callable[[], object]] = {
        "x": lambda: CODEC.encode(make(x), KEY),
        "out of encode": lambda: CODEC.encode(x, KEY, out=make(payload[0])),
        "payloads": lambda: CODEC.decode_mean(make(payload), KEY, NUMEL),
        "shards": lambda: CODEC.decode_shards(make(payload), KEY, NUMEL),
        "out": lambda: CODEC.decode_mean(payload, KEY, NUMEL, out=make(x)),
    }
    argument = {"out of encode": "out", "shards": "payloads"}.get(name, name)
    owner = {"x": "encode", "out of encode": "encode", "shards": "decode_shards"}
    with pytest.raises(
        TypeError, match=rf"^Codec\.{owner.get(name, 'decode_mean')}: {argument} {fault}"
    ):
        calls[name]()


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit")  # torch 2.15 warns of itself in jvp
@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x: torch.vmap(f)(x[None]),
        lambda f, x: torch.func.grad(lambda y: f(y).sum())(x),
        lambda f, x: torch.func.jvp(f, (x,), (x,)),
        lambda f, x: torch.func.functionalize(f)(x),
    ],
    ids=["vmap", "grad", "jvp", "functionalize"],
)
def test_tensors_inside_transforms_are_refused(transform: Callable[..., object]) -> None:
    x = gaussian()

    def inside(y: torch.Tensor) -> torch.Tensor:
        with pytest.raises(TypeError, match=r"Codec\.encode: x is a wrapper of torch\.func \(vmap"):
            CODEC.encode(y, KEY)
        return y

    transform(inside, x)


def test_distributed_tensors_are_refused_by_what_to_pass() -> None:
    program = """
import torch
import torch.distributed as dist
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from rhtcomm import Codec, Key, QuicFL

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
x = torch.randn(9000)
for y in (
    DTensor.from_local(x, init_device_mesh("cpu", (1,)), [Replicate()]),
    torch.nn.Parameter(DTensor.from_local(x, init_device_mesh("cpu", (1,)), [Replicate()])),
    AsyncCollectiveTensor(x),
):
    try:
        Codec(QuicFL(4)).encode(y, Key(0))
    except TypeError as error:
        print(error)
dist.destroy_process_group()
"""
    printed = in_fresh_process("import warnings; warnings.simplefilter('ignore')\n" + program)
    # Gloo greets there with torch 2.9.
    first, second, third = [line for line in printed if not line.startswith("[Gloo]")]
    assert (
        first == "Codec.encode: x is a DTensor, which has no memory of its own; pass x.to_local()"
    )
    assert second == first
    assert third.endswith(
        "is a AsyncCollectiveTensor, which has no memory of its own; pass x.wait()"
    )


@pytest.mark.parametrize("real", [False, True])
def test_calls_under_a_fake_mode_are_refused(real: bool) -> None:
    x = gaussian()
    payloads, out, row = (
        payloads_of(x),
        torch.empty(NUMEL),
        torch.empty(CODEC.nbytes(NUMEL), dtype=torch.uint8),
    )
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=real):
        for call in (
            lambda: CODEC.encode(x, KEY),
            lambda: CODEC.encode(x, KEY, out=row),
            lambda: CODEC.decode_mean(payloads, KEY, NUMEL),
            lambda: CODEC.decode_mean(payloads, KEY, NUMEL, out=out),
            lambda: CODEC.decode_shards(payloads, KEY, NUMEL, out=out),
        ):
            with pytest.raises(TypeError, match="new tensors have no memory here, as under Fake"):
                call()


def test_addresses_are_refused_where_there_is_none() -> None:
    x = gaussian()
    assert address_of(x) == x.data_ptr() != 0
    assert address_of(x[5:]) == x.data_ptr() + 20
    assert address_of(torch.empty(0)) == 0
    for kind, (make, fault) in WITHOUT_MEMORY.items():
        if kind not in ("nested", "array", "made smaller"):  # others have an address
            with pytest.raises(TypeError, match=fault):
                address_of(make(x))


# Tensors that have it ---------------------------------------------------------------------------


class Subclass(torch.Tensor):
    """Owns its memory."""


class Dispatching(torch.Tensor):
    """Owns its memory, and sees each operation."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C._DisableTorchDispatch():
            return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "make",
    [
        torch.nn.Parameter,
        torch.nn.Buffer,
        lambda x: x.clone().requires_grad_() * 1,
        lambda x: torch.Tensor._make_subclass(Subclass, x),
        lambda x: torch.Tensor._make_subclass(Dispatching, x),
        lambda x: torch.stack([x, x], 1)[:, 0],
        lambda x: torch.cat([x, x])[NUMEL:],
        lambda x: torch.complex(x, -x).conj().imag,
        lambda x: torch._neg_view(-x),
    ],
    ids=[
        "parameter",
        "buffer",
        "graph",
        "subclass",
        "dispatching",
        "strided",
        "offset",
        "conjugate",
        "negated",
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_of_all_kinds_give_the_same_payload(
    make: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype
) -> None:
    x = gaussian().to(dtype)
    if dtype is torch.bfloat16 and make(torch.zeros(NUMEL)).is_neg():
        pytest.skip("there are no complex numbers of it")
    assert torch.equal(CODEC.encode(make(x), KEY), CODEC.encode(x, KEY))


def test_expanded_tensors() -> None:
    x = torch.tensor([1.5]).expand(NUMEL)
    assert torch.equal(CODEC.encode(x, KEY), CODEC.encode(x.clone(), KEY))
    payload = payloads_of(gaussian())
    with pytest.raises(ValueError, match="made for another key, rank"):
        CODEC.decode_mean(payload.expand(2, -1), KEY, NUMEL)


@pytest.mark.parametrize(
    "out",
    [
        torch.empty(1).expand(NUMEL),
        torch._neg_view(torch.empty(NUMEL)),
        torch.empty(2 * NUMEL)[::2],
    ],
    ids=["expanded", "negated", "strided"],
)
def test_out_that_cannot_be_written_into_is_refused(out: torch.Tensor) -> None:
    payload = payloads_of(gaussian())
    with pytest.raises(ValueError, match=r"Codec\.decode_mean: out is (strided|negated)"):
        CODEC.decode_mean(payload, KEY, NUMEL, out=out)


def test_out_that_overlaps_the_input_is_refused() -> None:
    memory = torch.zeros(1 << 16, dtype=torch.uint8)
    nbytes = CODEC.nbytes(NUMEL)
    x = memory[: 4 * NUMEL].view(torch.float32)
    for start in (0, 4 * NUMEL - 4):
        with pytest.raises(ValueError, match=r"Codec\.encode: out overlaps x; give"):
            CODEC.encode(x, KEY, out=memory[start : start + nbytes])
    row = CODEC.encode(x, KEY, out=memory[4 * NUMEL : 4 * NUMEL + nbytes])
    with pytest.raises(ValueError, match=r"Codec\.decode_mean: out overlaps the payloads"):
        CODEC.decode_mean(row[None], KEY, NUMEL, out=memory[8 : 8 + 4 * NUMEL].view(torch.float32))
    assert torch.equal(CODEC.decode_mean(row[None], KEY, NUMEL, out=x), torch.zeros(NUMEL))
    views = (x[::2], x[1::2], x[:5], x[5:])
    even, odd, before, behind = (memory_of(view, "the test", "a view") for view in views)
    assert overlap(even, odd)
    assert not overlap(before, behind)


@pytest.mark.parametrize(
    "make", [torch.nn.Parameter, lambda x: torch.Tensor._make_subclass(Subclass, x)]
)
def test_out_of_all_kinds(make: Callable[[torch.Tensor], torch.Tensor]) -> None:
    payload, out = payloads_of(gaussian()), make(torch.empty(NUMEL))
    assert CODEC.decode_mean(payload, KEY, NUMEL, out=out) is out
    assert torch.equal(
        out.detach().as_subclass(torch.Tensor), CODEC.decode_mean(payload, KEY, NUMEL)
    )


# What the first use leaves behind ---------------------------------------------------------------


def everything(kernel: str) -> str:
    """A hash of what all quantizers, rotations and the lattice give, on CPU tensors."""
    digest = blake2b(digest_size=8)
    x = torch.arange(40, dtype=torch.float32, device="cpu").sub(20).square().sub(70)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RHTCOMM_KERNELS", kernel)
        chosen = choose("cpu", QuicFL)
    for quantizer in (QuicFL(4), QuicFL(2, 1 / 512), Eden(3), VectorQuantizer(4)):
        codec = Codec(quantizer, block=32)
        with use(chosen):
            payloads = codec.encode(x, KEY, shards=1)
            digest.update(payloads.numpy().tobytes() + codec.fingerprint)
            digest.update(codec.decode_mean(payloads, KEY, 40).numpy().tobytes())
    digest.update(RandomizedHadamard(3, 32).forward(x, KEY).numpy().tobytes())
    with use(chosen):
        kernel_of_lattice = lattice_kernel_for(x.device)
    found = sum_of(Lattice(4, block=32), [x, -x, x], KEY, kernel=kernel_of_lattice)
    digest.update(b"".join(part.numpy().tobytes() for part in found.everything()))
    return digest.hexdigest()


def kernels() -> list[str]:
    return [
        "reference",
        *(["cpu"] if cpu.library_path() else []),
        *(["gpu"] if has_triton else []),
    ]


def first_use(mode: str) -> None:
    """For a process of its own: everything within a mode, however that ends, and then without."""
    outcomes = []

    def within(*_: object) -> torch.Tensor:
        for kernel in kernels():
            try:
                outcomes.append(everything(kernel))
            except Exception as error:
                outcomes.append(type(error).__name__)
        return torch.zeros(1, device="cpu")

    if mode == "fake":
        with torch._subclasses.FakeTensorMode():
            for quantizer in (QuicFL(4), Eden(3), VectorQuantizer(4)):
                quantizer.encode(torch.zeros(2, 32), KEY, 0, 0, 1)
            RandomizedHadamard(3, 32).rotate(torch.zeros(2, 32), KEY, 0)
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
            within()
    elif mode == "inference":
        with torch.inference_mode():
            within()
    elif mode == "default device":
        torch.set_default_device("meta")
        within()
    elif mode in ("float64", "float16"):
        torch.set_default_dtype(getattr(torch, mode))
        within()
    elif mode == "vmap":
        torch.vmap(within)(torch.zeros(1))
    elif mode == "functionalize":
        torch.func.functionalize(within)(torch.zeros(1))
    print(*outcomes, *map(everything, kernels()))


REFUSED = ("fake", "functionalize")


@pytest.mark.parametrize(
    "mode", [*REFUSED, "inference", "default device", "float64", "float16", "vmap"]
)
def test_the_mode_of_the_first_use_changes_nothing(mode: str) -> None:
    *_, line = in_fresh_process(
        f"import warnings; warnings.simplefilter('ignore')\n"
        f"import test_memory; test_memory.first_use({mode!r})",
        OMP_NUM_THREADS="1",
        TRITON_INTERPRET="1",
    )
    expected, count = everything("reference"), len(kernels())
    within = "TypeError" if mode in REFUSED else expected
    assert line.split() == [within] * count + [expected] * count


def test_quantizers_travel_without_their_tables() -> None:
    for quantizer in (QuicFL(4), Eden(3), VectorQuantizer(4)):
        before = Codec(quantizer).encode(gaussian(), KEY)
        copy = pickle.loads(pickle.dumps(quantizer))
        assert len(pickle.dumps(quantizer)) < 200
        assert torch.equal(Codec(copy).encode(gaussian(), KEY), before)
        (plan,), (other,) = (cpu.plans_of(Codec(q).task(32)).array for q in (copy, quantizer))
        assert (plan.levels, plan.boundaries) == (other.levels, other.boundaries)
