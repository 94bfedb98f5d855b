"""Which gradients are compressed, and how: warm-up, excluded parameters, bits by bucket."""

import weakref
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from functools import cache

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ..arguments import natural, number
from ..codec import Codec
from ..lattice import Lattice
from ..reduce import Treatment

__all__ = ["Bits", "Exclude", "Policy"]

Bits = float | Callable[[Sequence[torch.Tensor]], float]
Exclude = Sequence[str] | Callable[[torch.Tensor], bool]

UNCOMPRESSED = 32  # bits


class Policy:
    """How the buckets of a model are sent.

    Args:
        bits: bits per coordinate, or a function of the parameters in a bucket that returns them.
        codec: makes the codec for a number of bits.
        warmup_steps: number of first steps of a run whose payloads have at least `warmup_bits`.
        warmup_bits: bits per coordinate; 32: uncompressed.
        exclude: names of parameters, as shell patterns, or a predicate on the parameter; these are
            sent exactly, within their buckets.
        owner: for errors.

    Raises:
        TypeError, ValueError: an argument has another type or is out of its range.
    """

    def __init__(
        self,
        bits: Bits,
        codec: Callable[[float], Codec | Lattice],
        warmup_steps: int,
        warmup_bits: float,
        exclude: Exclude,
        owner: str,
    ) -> None:
        self.warmup_steps = natural(warmup_steps, owner, "warmup_steps")
        if not callable(exclude):
            if isinstance(exclude, str) or not all(isinstance(name, str) for name in exclude):
                raise TypeError(
                    f"{owner}: exclude={exclude!r} must be a list of parameter names, such as "
                    '["*.bias"], or a function of a parameter'
                )
            exclude = tuple(exclude)
        self._owner, self._exclude = owner, exclude
        self._bits, self.warmup_bits = bits, warmup_bits
        self._make_codec = codec
        self.codec = codec(4 if callable(bits) else bits)
        """For all buckets; if bits depend on the bucket, only to describe what they share."""
        self.by_bucket = bool(self._exclude) or callable(bits)
        """Whether buckets are treated differently."""
        self.reset()
        if warmup_bits != UNCOMPRESSED:
            try:
                self._codec(warmup_bits)
            except (TypeError, ValueError) as error:
                raise type(error)(
                    f"{owner}: warmup_bits={warmup_bits!r} must be bits that the quantizer "
                    f"supports, or 32 for uncompressed ({error})"
                ) from error
        self._warmup = callable(bits) or bits < warmup_bits

    def __getstate__(self) -> dict[str, object]:
        left_behind = ("_names", "_treatments", "_alive", "_codec")
        return {name: value for name, value in vars(self).items() if name not in left_behind}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self.reset()

    def reset(self) -> None:
        """Forget all models."""
        self._codec = cache(self._make_codec)
        self._names = WeakTensorKeyDictionary()
        self._treatments: dict[tuple[int, ...], tuple[Treatment, Treatment]] = {}
        self._alive: list[weakref.ref[torch.Tensor]] = []

    @property
    def facts(self) -> dict[str, object]:
        """What the ranks compare; exclusions and bits by bucket are compared per bucket."""
        facts: dict[str, object] = {"warmup_steps": self.warmup_steps}
        if self.warmup_steps:
            facts["warmup_bits"] = self.warmup_bits
        if callable(self._bits):
            facts["bits"] = "a function of the bucket"
        if self._exclude:
            function = callable(self._exclude)
            facts["exclude"] = "a predicate" if function else list(self._exclude)  # type: ignore[arg-type]
        return facts

    def learn(self, named: Iterable[tuple[str, torch.Tensor]]) -> None:
        """The names of a model's parameters.

        Raises:
            ValueError: a name to exclude matches none of them.
        """
        names = dict(named)
        for name, parameter in names.items():
            self._names[parameter] = name
        if not callable(self._exclude):
            for pattern in self._exclude:
                if not any(fnmatchcase(name, pattern) for name in names):
                    some = ", ".join(list(names)[:3])
                    raise ValueError(
                        f"{self._owner}: exclude has {pattern!r}, but no parameter of the model "
                        f"matches; its names are, for example, {some}"
                    )

    def treatment(self, step: int, parameters: Sequence[torch.Tensor]) -> Treatment | None:
        """The treatment of a bucket of these parameters in a step; None: all of it by `codec`."""
        warm = step >= self.warmup_steps or not self._warmup
        if warm and not self.by_bucket:
            return None
        place = tuple(map(id, parameters)) if self.by_bucket else ()
        known = self._treatments.get(place)
        if known is None:
            known = self._treatments[place] = self._work_out(parameters)
            # When a parameter is freed, another one may get its id.
            forget = self._treatments.clear
            self._alive += [weakref.ref(p, lambda _: forget()) for p in parameters]
        return known[warm]

    def _work_out(self, parameters: Sequence[torch.Tensor]) -> tuple[Treatment, Treatment]:
        """The treatments during the warm-up and after it."""
        bits = self._bits
        if callable(bits):
            bits = number(bits(parameters), self._owner, "what bits() returns")
        codec, most = self._codec(bits), max(bits, self.warmup_bits)
        warm_up = None if most == UNCOMPRESSED else self._codec(most)
        if not self.by_bucket:
            return Treatment(warm_up), Treatment(codec)
        exact = tuple(self._is_excluded(parameter) for parameter in parameters)
        return _by(warm_up, exact), _by(codec, exact)

    def _is_excluded(self, parameter: torch.Tensor) -> bool:
        if callable(self._exclude):
            return bool(self._exclude(parameter))
        if not self._exclude:
            return False
        name = self._names.get(parameter)
        if name is None:
            raise ValueError(
                f"{self._owner}: exclude has names, but the model of these parameters was not "
                "found; register it with rhtcomm.hooks.register(model, exclude=...)"
            )
        return any(fnmatchcase(name, pattern) for pattern in self._exclude)


def _by(codec: Codec | Lattice | None, exact: tuple[bool, ...]) -> Treatment:
    """A treatment that the ranks compare."""
    if codec is None or (all(exact) and exact):
        return Treatment(None, compare=True)
    return Treatment(codec, exact if any(exact) else None, compare=True)
