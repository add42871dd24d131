"""Run a chat template that somebody else wrote: in jinja2's sandbox, within limits.

The sandbox keeps a template from reaching out of itself, but not from looping for ever or from
asking for more memory than there is. Here everything that can make a value larger or run again
is counted before it is done: operators, calls, filters, `~`, lists, loops and output. What is
left between two counts takes milliseconds, so that a deadline holds in any thread.

Source    the tags, filters and globals that transformers gives to chat templates.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, MappingView
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils
import jinja2.visitor

__all__ = ["TemplateLimitError", "compile_template"]

MAX_SECONDS = 2.0
MAX_SOURCE = 1 << 18  # characters
MAX_SIZE = 1 << 20  # characters and items of one value, and of the whole text
MAX_STEPS = 1 << 17  # turns of loops, and calls
_MAX_BITS = 4096  # of a whole number

# Methods and filters whose result may be larger than all they are given together.
_GROWING = frozenset(
    "batch center expandtabs format format_map indent join ljust replace rjust round slice "
    "tojson translate zfill".split()
)
_LEFT_OUT = ("pprint", "striptags", "sum", "urlize", "wordwrap")  # slow on long values
_LONG_NUMBER = re.compile(r"\d{5}")
_CONCATENATE, _COUNTED, _WEIGHED = "_concatenate", "_counted", "_weighed"


class TemplateLimitError(jinja2.TemplateError):
    """A template asks for more time or memory than a conversation needs."""


class _Bounds(jinja2.visitor.NodeTransformer):
    """Puts the counting filters around what jinja2 has no hook for."""

    def visit(self, node: jinja2.nodes.Node, *args: Any, **kwargs: Any) -> Any:
        """Return what stands in the place of a node."""
        node = self.generic_visit(node, *args, **kwargs)
        if isinstance(node, jinja2.nodes.Concat):
            return _filtered(jinja2.nodes.List(node.nodes, lineno=node.lineno), _CONCATENATE)
        if isinstance(node, jinja2.nodes.For):
            node.iter = _filtered(node.iter, _COUNTED)
        # `{% for a, b in pairs %}` and `{% set a, b = pair %}` have tuples that are no values.
        is_value = isinstance(node, jinja2.nodes.Tuple) and node.ctx == "load"
        if is_value or isinstance(node, jinja2.nodes.List | jinja2.nodes.Dict):
            return _filtered(node, _WEIGHED)
        return node


def _filtered(node: Any, name: str) -> jinja2.nodes.Filter:
    return jinja2.nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}`, which marks answers in templates for training: its body counts."""

    tags: set[str] = {"generation"}  # noqa: RUF012  # as the base class has it

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Return the body."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _BoundedEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["+", "-", "*", "**", "%", "/", "//"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, jinja2.ext.loopcontrols],
            optimized=False,  # nothing runs before the counting starts
            finalize=self._emitted,
        )
        del self.globals["lipsum"]
        self.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
        self.filters["tojson"] = _to_json
        self.filters = {
            name: self._bounded_filter(name, function)
            for name, function in self.filters.items()
            if name not in _LEFT_OUT
        }
        self.filters |= {
            _CONCATENATE: lambda values: self.concat([str(value) for value in values]),
            _COUNTED: self._turns,
            _WEIGHED: self._weighed,
        }
        self.start()

    def start(self) -> None:
        """Begin to count."""
        self._steps = self._num_emitted = 0
        self._deadline = time.monotonic() + MAX_SECONDS

    def _parse(self, source: str, name: str | None, filename: str | None) -> Any:
        return _Bounds().visit(super()._parse(source, name, filename))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """See `SandboxedEnvironment`."""
        self._step()
        numbers = isinstance(left, int) and isinstance(right, int)
        if numbers and operator in ("*", "**"):
            bits = left.bit_length() * right if operator == "**" else left.bit_length()
            self._check(bits, _MAX_BITS, "a number")
        elif operator == "*":
            count = left if isinstance(left, int) else right
            other = right if isinstance(left, int) else left
            if isinstance(count, int):
                self._check(max(count, 0) * self._weight(other), MAX_SIZE, "a value")
        elif operator == "+":
            self._check(self._weight(left) + self._weight(right), MAX_SIZE, "a value")
        elif operator == "%" and isinstance(left, str):
            self._check_widths(left)
            self._check(self._weight(left) + self._weight(right), MAX_SIZE, "a value")
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """See `SandboxedEnvironment`."""
        __self._step()
        name = getattr(__obj, "__name__", "")
        # The sandbox has a function of its own in place of `str.format`.
        method = getattr(__obj, "__wrapped__", __obj)
        __self._check_growth(name, getattr(method, "__self__", ""), (*args, *kwargs.values()))
        return __self._weighed(super().call(__context, __obj, *args, **kwargs))

    def _bounded_filter(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        num_passed = 0 if getattr(function, "jinja_pass_arg", None) is None else 1

        @functools.wraps(function)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            self._step()
            value, *given = (*args[num_passed:], *kwargs.values())
            self._check_growth(name, value, given)
            return self._weighed(function(*args, **kwargs))

        return bounded

    def _check_growth(self, name: str, value: Any, given: Iterable[Any]) -> None:
        """Refuse what could become too large: n characters, each replaced by m."""
        if name not in _GROWING:
            return
        if name in ("format", "format_map"):
            self._check_widths(value)
        sizes = (abs(x) if isinstance(x, int) else self._weight(x) for x in given)
        self._check(self._weight(value) * max(sizes, default=1), MAX_SIZE, "a value")

    def _check_widths(self, form: Any) -> None:
        if _LONG_NUMBER.search(str(form)):
            raise TemplateLimitError("it formats a value to a width of five digits")

    def _turns(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self._step()
            yield value

    def _weighed(self, value: Any) -> Any:
        if isinstance(value, Iterator):  # `map` and `select` would work later, uncounted
            items, total = [], 0
            for item in value:
                self._step()
                total += self._weight(item)
                self._check(total, MAX_SIZE, "a value")
                items.append(item)
            return items
        self._check(self._weight(value), MAX_SIZE, "a value")
        return value

    def _emitted(self, value: Any) -> Any:
        """Count what is written; jinja2 makes it text afterwards."""
        self._step()
        self._num_emitted += self._weight(value)
        self._check(self._num_emitted, MAX_SIZE, "a text")
        return value

    def concat(self, pieces: Iterable[str]) -> str:
        """Return what blocks and macros wrote, as one text."""
        pieces = list(pieces)
        self._check(sum(map(len, pieces)), MAX_SIZE, "a text")
        return "".join(pieces)

    def _weight(self, value: Any) -> int:
        """Return characters and items of a value, one that is held twice counted twice."""
        total, open_values = 0, [value]
        while open_values and total <= MAX_SIZE:
            item = open_values.pop()
            total += 1
            if isinstance(item, str | bytes):
                total += len(item)
            elif isinstance(item, int):
                total += item.bit_length() // 3
            elif isinstance(item, Mapping):
                open_values += [*item.keys(), *item.values()]
            elif isinstance(item, range):
                total += len(item)
            elif isinstance(item, list | tuple | set | frozenset | MappingView):
                open_values.extend(item)  # type: ignore[arg-type]  # a view too
            elif isinstance(item, jinja2.utils.Namespace):
                open_values += _attributes(item)
        return total

    def _step(self) -> None:
        self._steps += 1
        self._check(self._steps, MAX_STEPS, "a run of turns and calls")
        if time.monotonic() > self._deadline:
            raise TemplateLimitError(f"it takes longer than {MAX_SECONDS:g} s")

    def _check(self, size: int, limit: int, what: str) -> None:
        if size > limit:
            raise TemplateLimitError(f"it makes {what} larger than {limit}")


def _attributes(namespace: jinja2.utils.Namespace) -> list[Any]:
    # The class keeps its attributes from being reached in the usual way.
    return list(object.__getattribute__(namespace, "_Namespace__attrs").values())


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(str(message)[:500])


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def compile_template(source: str) -> Callable[[Mapping[str, Any]], str]:
    """Return a function from variables to text; not for several threads at once.

    Args:
        source: A jinja2 chat template.

    Raises:
        TemplateLimitError: If it is longer than any template; the function, if it loops or
            grows beyond what a conversation needs.
        jinja2.TemplateError: If it is no template; the function, where the template says so.
    """
    if len(source) > MAX_SOURCE:
        raise TemplateLimitError(f"it has {len(source)} characters, more than {MAX_SOURCE}")
    environment = _BoundedEnvironment()
    template = environment.from_string(source)

    def run(variables: Mapping[str, Any]) -> str:
        environment.start()
        pieces, size = [], 0
        for piece in template.generate(variables):
            size += len(piece)
            if size > MAX_SIZE:
                raise TemplateLimitError(f"it makes a text larger than {MAX_SIZE}")
            pieces.append(piece)
        return "".join(pieces)

    return run
