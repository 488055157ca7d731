"""What an operation declares for its calls. What tests, compile and bench draw of it is in cases.py."""

import inspect
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, wraps
from typing import Any

import torch

from . import checks
from .checks import Argument, Binder, Within


@cache
def read_annotations(run: Callable[..., Any]) -> tuple[tuple[Argument, ...], tuple[Argument, ...]]:
    """Return the arguments and the results of an operation."""
    hints = typing.get_type_hints(run, include_extras=True)
    returned = hints["return"]
    parts = typing.get_args(returned) if typing.get_origin(returned) is tuple else (returned,)
    arguments = (Argument.parse(name, hints.get(name, Any)) for name in inspect.signature(run).parameters)
    return tuple(arguments), tuple(Argument.parse("", part) for part in parts if part is not type(None))


def by_position(run: Callable[..., Any]) -> Callable[..., Any]:
    """Return `run` with its keyword-only arguments also by position, as torch's operators and plans give them."""
    parameters = inspect.signature(run).parameters.values()
    by_name = tuple(parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY)
    count = len(parameters) - len(by_name)

    @wraps(run)
    def function(*args: Any, **kwargs: Any) -> Any:
        return run(*args[:count], **dict(zip(by_name, args[count:], strict=False)), **kwargs)

    return function if by_name else run


def compile_binder(name: str, parameters: Iterable[inspect.Parameter]) -> Callable[..., tuple[Any, ...]]:
    """Return a function of these parameters that returns its arguments in their order, defaults filled in, or raises a
    TypeError, which names `name`."""
    plain = inspect.Signature([parameter.replace(annotation=parameter.empty) for parameter in parameters])
    # Python itself binds them, as a compiler follows: 1.2 us for the 7 arguments of expert_swiglu, where
    # `Signature.bind` takes 20 and a loop over names 1.8.
    bind = eval(f"lambda {str(plain)[1:-1]}: ({', '.join(plain.parameters)},)")
    bind.__qualname__ = name
    return bind  # type: ignore[no-any-return]


class SignatureError(ValueError, TypeError):
    """A call that does not fit the signature: Python's TypeError, and a ValueError like an operation's other errors."""


@dataclass(frozen=True, kw_only=True)
class Op:
    """What a call of an operation needs. Its signature is that of `run` and stands nowhere else: the checks, torch's
    operator, the shapes of its results and the torch backend derive from the annotations there (checks.py).

    name               its name in `mixtral_triton.ops` and in `torch.ops.mixtral_triton`
    run                launches the Triton kernels, its arguments already checked, and each of them also by position
    reference          the same in plain torch; it takes the arguments it shares with `run`, by name
    mutates            names of the arguments that the operation writes into
    rule               rule(name, args, sizes) raises ValueError where the arguments do not fit together
    growing            growing(args) -> where tensors grow from call to call, the key of a call without their sizes,
                       the paths of the kernel arguments that have these, as "keys.stride_kb", and their values;
                       None: as any other call
    gradients          backward and setup_context of `torch.library.register_autograd`; None: a backward raises
    """

    name: str
    run: Callable[..., Any]
    reference: Callable[..., Any]
    mutates: tuple[str, ...] = ()
    rule: Callable[[str, Mapping[str, Any], Mapping[str, Any]], None] | None = None
    growing: Callable[[Sequence[Any]], tuple[tuple[Any, ...], Sequence[str], tuple[int, ...]] | None] | None = None
    gradients: tuple[Callable[..., Any], Callable[..., None]] | None = None

    @cached_property
    def signature(self) -> inspect.Signature:
        return inspect.signature(self.run)

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(self.signature.parameters)

    @cached_property
    def deterministic_index(self) -> int | None:
        """The position of the argument `deterministic`, or None."""
        return self.names.index("deterministic") if "deterministic" in self.names else None

    @cached_property
    def arguments(self) -> tuple[Argument, ...]:
        return read_annotations(self.run)[0]

    @cached_property
    def results(self) -> tuple[Argument, ...]:
        return read_annotations(self.run)[1]

    @cached_property
    def bind(self) -> Callable[..., tuple[Any, ...]]:
        """A function that returns the arguments of a call, all of which may be by position, in the order of `run`."""
        parameters = self.signature.parameters.values()
        return compile_binder(self.name, (x.replace(kind=x.POSITIONAL_OR_KEYWORD) for x in parameters))

    def bind_by_name(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return dict(zip(self.names, self.bind(*args, **kwargs), strict=True))

    def check(self, *args: Any, **kwargs: Any) -> Binder:
        """Raise ValueError on a wrong shape, dtype, device or number; return what was bound."""
        values, binder = self.bind_by_name(*args, **kwargs), Binder(self.name)
        binder.bind(self.arguments, values)
        if self.rule is not None:
            self.rule(binder.op, values, binder.sizes)
        return binder

    def bounds(self, args: Mapping[str, Any]) -> Iterator[tuple[str, int, int]]:
        """`check`, then yield each bounded integer tensor's name with the least and greatest value it may hold."""
        sizes = {**args, **self.check(**args).sizes}
        for argument in self.arguments:
            if argument.tensor and isinstance(argument.rule, Within) and args[argument.name] is not None:
                yield argument.name, argument.rule.low, checks.evaluate(argument.rule.high, sizes)

    def empty(self, *args: Any, **kwargs: Any) -> Any:
        """Return unset results of the right shapes and dtypes: the fake kernel."""
        binder = self.check(*args, **kwargs)
        results = tuple(
            torch.empty(
                checks.shape_of(result.shape_spec, binder.sizes),
                dtype=binder.dtype if result.dtypes is None else result.dtypes[0],
                device=binder.device,
            )
            for result in self.results
        )
        return results if len(results) > 1 else results[0] if results else None

    @property
    def public_signature(self) -> inspect.Signature:
        """The signature with plain types: Tensor, int, ..."""
        results: dict[int, Any] = {0: None, 1: torch.Tensor}
        returned = results.get(len(self.results), tuple[(torch.Tensor,) * len(self.results)])  # type: ignore[misc]
        parameters = [
            parameter.replace(annotation=argument.kind | None if argument.optional else argument.kind)
            for argument, parameter in zip(self.arguments, self.signature.parameters.values(), strict=True)
        ]
        return inspect.Signature(parameters, return_annotation=returned)

    @cached_property
    def _reference_names(self) -> frozenset[str]:
        return frozenset(inspect.signature(self.reference).parameters)

    def call_reference(self, *args: Any, **kwargs: Any) -> Any:
        """Call the reference with those arguments of `run` that it takes."""
        values = {**dict(zip(self.names, args, strict=False)), **kwargs}
        return self.reference(**{name: value for name, value in values.items() if name in self._reference_names})
