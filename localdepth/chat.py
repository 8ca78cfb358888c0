"""Chat templates: messages to one prompt text, by a Jinja template that comes with the model and is not trusted.

The dialect is the one of Hugging Face templates. The sandbox lets a template reach only the messages and a list of
harmless filters and methods. Every loop turn, call, operator and piece of output is paid for out of one allowance, and
what an operation would produce is bounded before it runs, so any template ends in a text or in ``TemplateError`` within
a second and bounded memory.
"""

import functools
import json
import sys
import time
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import Template, TemplateSyntaxError, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.filters import FILTERS
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.utils import Joiner, Namespace
from jinja2.visitor import NodeTransformer

from localdepth.errors import ModelFileError, PromptError, TemplateError

__all__ = ["ChatTemplate"]

_MAX_SOURCE = 1 << 16  # characters; the longest published templates have about 20 thousand
_MAX_TEXT = 1 << 20  # characters or items of one value, plus four times the messages
_ALLOWANCE = 1 << 24  # characters and steps of one rendering, plus 64 times the messages
_STEP = 16  # what any operation costs, and every item of a list
_MAX_INT_BITS = 4096
_CPU_SECONDS = 0.5  # of this thread alone, plus a microsecond for each character of the messages
_MAX_SEARCH = 1 << 26  # characters of a text times those of what is looked for
_ADVICE = "pass a plain text prompt instead"

# Methods and filters that cannot make a value much larger than what they are given, nor take long.
_METHODS = frozenset(
    """capitalize changed copy count cycle endswith find get index isalnum isalpha isdecimal isdigit islower isnumeric
    isspace istitle isupper items keys lower partition removeprefix removesuffix split splitlines startswith swapcase
    title upper values""".split()  # noqa: SIM905
)
_FILTERS = frozenset(
    """abs capitalize count d default dictsort first float int items last length list lower map max min reject
    rejectattr reverse select selectattr sort string title unique upper""".split()  # noqa: SIM905
)

# Text methods that compare every character with every one of their argument.
_SEARCHES = frozenset(["lstrip", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "strip"])


class ChatTemplate:
    """One compiled template. Safe to share between threads."""

    def __init__(self, source: str, *, bos: str = "", eos: str = "") -> None:
        """Compile ``source``.

        Args:
            source: the Jinja text.
            bos, eos: spellings of the control tokens, the template's ``bos_token`` and ``eos_token``.
        Raises:
            ModelFileError: when ``source`` is too long or no template.
        """
        if len(source) > _MAX_SOURCE:
            raise ModelFileError(f"chat template of {len(source)} characters is over {_MAX_SOURCE}; {_ADVICE}")
        self._tokens = {"bos_token": bos, "eos_token": eos}
        compiler = _Sandbox(0)
        try:
            tree = _Metered().visit(compiler.parse(source))
            self._code = compiler.compile(tree.set_environment(compiler))
        except TemplateSyntaxError as error:
            raise ModelFileError(f"chat template, line {error.lineno}: {error.message}; {_ADVICE}") from error
        except Exception as error:  # nesting or numbers beyond what Python compiles
            raise ModelFileError(f"the chat template cannot be compiled ({error}); {_ADVICE}") from error

    def render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> str:
        """The prompt text of a conversation; encode it with ``special=True``.

        Args:
            messages: each with strings ``role`` and ``content``; further keys hold strings too.
            add_generation_prompt: end with the opening of the assistant's turn.
        Raises:
            PromptError: when ``messages`` are not of this form.
            TemplateError: when the template refuses them, fails, or exceeds its bounds.
        """
        checked = _check_messages(messages)
        sandbox = _Sandbox(sum(len(text) for message in checked for pair in message.items() for text in pair))
        template = Template.from_code(sandbox, self._code, sandbox.globals)
        try:
            return template.render(
                messages=checked,
                add_generation_prompt=add_generation_prompt,
                tools=None,  # templates ask for these two by name
                documents=None,
                **self._tokens,
            )
        except TemplateError:
            raise
        except Exception as error:
            raise TemplateError(
                f"the file's chat template failed: {type(error).__name__}: {str(error)[:300]}; {_ADVICE}"
            ) from error


def _check_messages(messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence) or not messages:
        raise PromptError(f"messages={messages!r:.60} must be a list of at least one message")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise PromptError(f"message {i} is {type(message).__name__}; pass {{'role': ..., 'content': ...}}")
        for key, value in message.items():
            if not isinstance(key, str) or not isinstance(value, str):
                raise PromptError(f"message {i} has {key!r:.60} of type {type(value).__name__}; pass strings only")
        if missing := {"role", "content"} - set(message):
            raise PromptError(f"message {i} has no {' and no '.join(sorted(missing))}; every message needs both")
    return [dict(message) for message in messages]


class _Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one rendering; it owns what that rendering may still spend."""

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

    def __init__(self, n_chars: int) -> None:
        """``n_chars`` are the characters of the messages."""
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # no constant is computed while compiling
            extensions=[LoopControlExtension, _Generation],
            finalize=self._emit,
        )
        self._max_text = _MAX_TEXT + 4 * n_chars
        self._allowance = _ALLOWANCE + 64 * n_chars
        self._deadline = time.thread_time() + _CPU_SECONDS + 1e-6 * n_chars
        self.globals = {
            "dict": dict,
            "joiner": Joiner,
            "namespace": _Namespace,
            "raise_exception": _refuse,
            "range": safe_range,
            "strftime_now": _strftime_now,
        }
        filters: dict[str, Callable[..., Any]] = {name: FILTERS[name] for name in _FILTERS}
        filters |= {"indent": self._indent, "join": self._join_items, "replace": self._replace, "safe": str}
        filters |= {"tojson": self._tojson, "trim": self._trim}
        self.filters = {name: self._charged(function) for name, function in filters.items()}
        tests: dict[str, Any] = dict(self.tests)
        self.tests = {name: self._charged(function) for name, function in tests.items()}

    def charge(self, value: Any) -> Any:
        """Pay for ``value`` with all it contains and return it; an iterator pays as it is used."""
        self._allowance -= _STEP + (len(value) if isinstance(value, str) else 0)
        if self._allowance < 0 or time.thread_time() > self._deadline:
            raise TemplateError(f"the file's chat template works too long or writes too much; {_ADVICE}")
        if isinstance(value, str):
            self._admit(len(value))
        elif isinstance(value, int):
            _admit_int(value.bit_length())
        elif isinstance(value, list | tuple):
            for item in value:
                self.charge(item)
        elif isinstance(value, dict):
            for pair in value.items():
                self.charge(pair)
        elif isinstance(value, Iterator):
            return self.each(value)
        return value

    def each(self, values: Iterable[Any]) -> Iterator[Any]:
        """``values``, each paid for when its turn comes."""
        for value in values:
            self.charge(None)
            yield value

    def joined(self, *values: Any) -> str:
        """The operator ``~``."""
        return self._join("", values)

    def same(self, value: Any) -> Any:
        """``value``: being called, it is paid for."""
        return value

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Every call of the template comes here."""
        if isinstance(function, Macro):
            self.charge((args, kwargs))  # it may keep them as one value
        return self.charge(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Every operator but ``~`` comes here."""
        if operator == "%" and isinstance(left, str):
            raise SecurityError("text is formatted with %")
        if operator in {"*", "**"}:
            self._admit_product(operator, left, right)
        return self.charge(super().call_binop(context, operator, left, right))

    def getattr(self, obj: Any, attribute: str) -> Any:
        """Text gets our own of the methods that can make it much longer or take much time."""
        if isinstance(obj, str) and attribute in {"join", "replace"}:
            return functools.partial(self._join if attribute == "join" else self._replace, obj)
        if isinstance(obj, str) and attribute in _SEARCHES:
            return functools.partial(self._search, obj, attribute)
        return super().getattr(obj, attribute)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Methods are refused unless listed."""
        is_method = isinstance(value, types.BuiltinMethodType | types.MethodType)
        return super().is_safe_attribute(obj, attr, value) and (not is_method or attr in _METHODS)

    def wrap_str_format(self, value: Any) -> None:
        """``str.format`` is a method like others: not listed, refused."""
        return

    def _charged(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def charged(*args: Any, **kwargs: Any) -> Any:
            return self.charge(function(*args, **kwargs))

        return charged

    @pass_context
    def _emit(self, context: Context, value: Any) -> Any:
        return self.charge(value if isinstance(value, str) else str(value))

    def _admit(self, size: int) -> None:
        if size > self._max_text:
            raise TemplateError(f"the file's chat template makes a value of {size} parts; {_ADVICE}")

    def _admit_product(self, operator: str, left: Any, right: Any) -> None:
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            _admit_int(bits)
        for values, times in ((left, right), (right, left)):
            if isinstance(values, str | list | tuple) and isinstance(times, int):
                self._admit(len(values) * times)

    def _join(self, separator: str, parts: Iterable[Any]) -> str:
        pieces: list[str] = []
        size = 0
        for part in parts:
            pieces.append(str(part))
            size += len(pieces[-1]) + len(separator)
            self._admit(size)
        return separator.join(pieces)

    def _join_items(self, values: Iterable[Any], separator: Any = "", attribute: str | int | None = None) -> str:
        return self._join(str(separator), (v if attribute is None else self.getitem(v, attribute) for v in values))

    def _replace(self, text: Any, old: str, new: str, count: int | None = None) -> str:
        whole, limit = str(text), -1 if count is None else count
        found = whole.count(old)
        self._admit(len(whole) + (found if limit < 0 else min(found, limit)) * len(new))
        return whole.replace(old, new, limit)

    def _search(self, text: str, method: str, *args: Any, **kwargs: Any) -> Any:
        wanted = next((value for value in (*args, *kwargs.values()) if isinstance(value, str)), "")
        if len(text) * len(wanted) > _MAX_SEARCH:
            raise TemplateError(
                f"the file's chat template looks for {len(wanted)} in {len(text)} characters; {_ADVICE}"
            )
        return getattr(text, method)(*args, **kwargs)

    def _trim(self, text: Any, chars: str | None = None) -> str:
        stripped: str = self._search(str(text), "strip", chars)
        return stripped

    def _indent(self, text: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> Any:
        margin = width if isinstance(width, int) else len(width)
        self._admit(len(str(text)) + margin * (1 + len(str(text).splitlines())))
        return FILTERS["indent"](str(text), width, first, blank)

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        margin = len(indent) if isinstance(indent, str) else indent or 0
        self._admit(margin * sys.getrecursionlimit())  # the widest there can be
        encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        return self._join("", encoder.iterencode(value))


class _Metered(NodeTransformer):
    """Rewrites a template so that everything that costs time or memory goes through the sandbox's methods."""

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        """The node after its children, which have been rewritten before."""
        super().generic_visit(node, *args, **kwargs)
        match node:
            case nodes.TemplateData():  # plain text becomes an output like others
                return nodes.Const(node.data, lineno=node.lineno)
            case nodes.For():
                node.iter = _method("each", node.iter)
            case nodes.Concat():
                return _method("joined", *node.nodes)
            case nodes.Getitem(arg=nodes.Slice()) | nodes.Tuple(ctx="load") | nodes.List() | nodes.Dict():
                return _method("same", node)
            case nodes.Compare() | nodes.Test():
                return _method("same", node)
        return node


def _admit_int(bits: int) -> None:
    if bits > _MAX_INT_BITS:
        raise TemplateError(f"the file's chat template makes a number of {bits} bits; {_ADVICE}")


def _method(name: str, *args: nodes.Node) -> nodes.Expr:
    """A call of the sandbox's method ``name``."""
    return nodes.Call(nodes.EnvironmentAttribute(name), list(args), [], None, None, lineno=args[0].lineno)


class _Generation(Extension):
    """``{% generation %}`` marks the assistant's words for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        """The block's body in a scope of its own."""
        lineno = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=lineno)


class _Namespace(Namespace):
    """A namespace that does not print what it holds: namespaces can hold each other in endless ways."""

    def __repr__(self) -> str:
        return "<namespace>"


def _refuse(message: object = "") -> None:
    raise TemplateError(f"the file's chat template refuses these messages: {str(message)[:300]}")


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout[:100])
