"""A model's chat template, rendered in a sandbox: messages in, the prompt's text out."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from functools import wraps
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import TemplateError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from edge_moe.errors import FormatError, OptionError

# Templates come with files from anywhere, so what they may do is bounded. Work is counted in characters produced; a
# loop's turn counts as STEP_WORK of them and a call as CALL_WORK, so that all of it takes a few seconds at most.
WORK_LIMIT = 500_000_000
STEP_WORK = 500
CALL_WORK = 2000
TEXT_LIMIT = 50_000_000
PART_LIMIT = 100_000
PART_WORK = 30
SLOW_FILTERS = ("pprint", "striptags", "urlize", "wordwrap", "xmlattr")  # of no use in a prompt
TEMPLATE_LIMIT = 1_000_000
NUMBER_LIMIT = 1_000_000
WIDENING = ("center", "ljust", "rjust", "zfill", "expandtabs", "indent", "batch", "slice", "tojson", "truncate")


def render_chat(
    template: str,
    messages: list[dict[str, Any]],
    *,
    bos_token: str,
    eos_token: str,
    add_generation_prompt: bool = True,
    tools: list[Any] | None = None,
    **extra: Any,
) -> str:
    """The prompt for `messages` (dicts with `role` and `content`); `extra` are more variables for the template.

    The text has the model's special tokens spelled out: encode it with add_special=False, parse_special=True.
    Raises OptionError if the template refuses these messages, FormatError if it is broken or does too much.
    Source: Jinja as Hugging Face transformers sets it up for chat templates.
    """
    if len(template) > TEMPLATE_LIMIT:
        raise FormatError(f"the chat template has {len(template)} characters, expected at most {TEMPLATE_LIMIT}")
    variables = {"documents": None, "bos_token": bos_token, "eos_token": eos_token, **extra}
    variables.update(messages=messages, tools=tools, add_generation_prompt=add_generation_prompt)
    try:
        return _Environment().from_string(template).render(variables)
    except _RefusalError as error:
        raise OptionError(f"the model's chat template refuses these messages: {_one_line(error)}") from error
    except TemplateSyntaxError as error:
        raise FormatError(f"the chat template has an error in line {error.lineno}: {_one_line(error)}") from error
    except _TooMuchError as error:
        raise FormatError(f"the chat template does too much: {_one_line(error)}") from error
    except RecursionError as error:
        raise FormatError("the chat template calls itself too deeply") from error
    except Exception as error:  # a template can raise whatever Python's operators and methods raise
        raise FormatError(f"the chat template fails: {type(error).__name__}: {_one_line(error)}") from error


class _RefusalError(TemplateError):
    """Raised by the template itself, through raise_exception."""


class _TooMuchError(TemplateError):
    """The template goes beyond a limit."""


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


class _Generation(Extension):
    """The tag {% generation %}, which marks the assistant's part for training; the part itself stays as it is."""

    tags = {"generation"}  # noqa: RUF012 the library's own declaration

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _CountWork(NodeTransformer):
    """Send what loops iterate over, what ~ joins, and literal lists through the filters that count."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        literal = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        node.iter = nodes.Filter(node.iter, "counted", [nodes.Const(literal)], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return nodes.Filter(nodes.List(node.nodes), "joined", [], [], None, None, lineno=node.lineno)

    def visit_List(self, node: nodes.List) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return nodes.Filter(node, "weighed", [], [], None, None, lineno=node.lineno)

    visit_Dict = visit_List  # noqa: N815 the library's naming

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:  # noqa: N802
        return self.visit_List(node) if node.ctx == "load" else self.generic_visit(node)  # type: ignore[arg-type]


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja as chat templates expect it, counting the work of one rendering."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation], optimized=False)
        self._work = 0
        self.filters["tojson"] = _to_json
        kept = (name for name in self.filters if name not in SLOW_FILTERS)
        self.filters = {name: self._guarded(name, self.filters[name]) for name in kept}
        self.filters.update(counted=self._counted, joined=self._joined, weighed=self._charged)
        self.globals.update(raise_exception=_refuse, strftime_now=_now)
        del self.globals["lipsum"]

    def call(self, context: Context, function: Any, *args: Any, **kwargs: Any) -> Any:
        method = getattr(function, "__wrapped__", function)  # the sandbox wraps str.format
        if isinstance(owner := getattr(method, "__self__", None), str):
            _check_arguments(method.__name__, (owner, *args), kwargs)
        return self._charged(super().call(context, function, *args, **kwargs), CALL_WORK)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for sequence, count in ((left, right), (right, left)):
                if isinstance(count, int) and hasattr(sequence, "__len__") and len(sequence) * count > TEXT_LIMIT:
                    raise _TooMuchError(f"a product would have {len(sequence) * count} elements")
        if operator == "**" and any(abs(number) > NUMBER_LIMIT for number in (left, right)):
            raise _TooMuchError("a power is too large")
        if operator == "%" and isinstance(left, str):
            _check_arguments("format", (left,), {})
        if operator in ("*", "**") and isinstance(left, int) and left.bit_length() > NUMBER_LIMIT:
            raise _TooMuchError("a number is too large")
        return self._charged(super().call_binop(context, operator, left, right))

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        return super()._generate(_CountWork().visit(source), *args, **kwargs)

    def concat(self, parts: Iterable[str]) -> str:
        """Join the output; it is limited like everything else."""
        return str(self._joined(list(parts)))

    def _charged(self, result: Any, work: int = STEP_WORK) -> Any:
        characters, parts = _written_size(result)
        self._work += work + (characters if isinstance(result, str) else PART_WORK * parts)
        if characters > TEXT_LIMIT or parts > PART_LIMIT or self._work > WORK_LIMIT:
            raise _TooMuchError("it loops or grows without end")
        return result

    def _counted(self, values: Iterable[Any], literal: int) -> Iterator[Any]:
        for value in values:
            self._charged(None, STEP_WORK + literal)
            yield value

    def _joined(self, values: Sequence[Any]) -> str:
        texts = [str(value) for value in values]
        if sum(map(len, texts)) > TEXT_LIMIT:
            raise _TooMuchError("its text grows without end")
        return str(self._charged("".join(texts)))

    def _guarded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)  # keeps the mark that says whether the first argument is the context
        def guarded(*args: Any, **kwargs: Any) -> Any:
            _check_arguments(name, args, kwargs)
            return self._charged(function(*args, **kwargs))

        return guarded


def _written_size(value: Any) -> tuple[int, int]:
    """Characters and parts of a value written out, in which shared parts count each time; stops beyond the limits."""
    characters, parts, pending = 0, 0, [value]
    while pending and characters <= TEXT_LIMIT and parts <= PART_LIMIT:
        part = pending.pop()
        parts += 1
        if isinstance(part, str):
            characters += len(part)
        elif isinstance(part, list | tuple | set | frozenset):
            pending += part
        elif isinstance(part, dict | Namespace):
            entries = part if isinstance(part, dict) else part._Namespace__attrs
            pending += entries.keys()
            pending += entries.values()
    return characters, parts


def _check_arguments(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Refuse calls of string functions whose result could be out of all proportion."""
    values = [*args, *kwargs.values()]
    if name in WIDENING and any(isinstance(value, int) and value > NUMBER_LIMIT for value in values[1:]):
        raise _TooMuchError(f"{name} is called with a number beyond {NUMBER_LIMIT}")
    texts = [value for value in values if isinstance(value, str)]
    if name in ("format", "format_map") and any(re.search(r"\d{6}|\*", text) for text in texts[:1]):
        raise _TooMuchError(f"{name} asks for too wide a field")
    if name in ("replace", "join", "translate", "indent"):
        size = max((len(value) for value in values if hasattr(value, "__len__")), default=0)
        if size * max(map(len, texts[1:] or texts), default=0) > TEXT_LIMIT * 100:
            raise _TooMuchError(f"{name} could make too long a text")


def _refuse(message: str) -> None:
    raise _RefusalError(message)


def _now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the escaping for HTML that Jinja's own filter does."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
