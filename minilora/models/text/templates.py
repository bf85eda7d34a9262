"""The sandbox of chat templates: jinja2's, with an allowance for the work that a template may do.

jinja2 keeps a template from Python's inside; it does not keep it from ``"x" * 10 ** 9`` or from loops in loops. So a template
is rewritten before it is compiled: what makes or walks through something goes through a filter that counts it. Where a result
can be much larger than what it is made of, its size is reckoned before it is made.
"""

from __future__ import annotations

import contextvars
import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

__all__ = ["Allowance", "TooMuch", "environment", "spending"]

LEAST = 2_000_000  # units: a character, an item, a turn of a loop
CALL = 20  # units that a call costs, or a filter
PLACES = 20_000  # items of lists in lists
BITS = 4096  # of a whole number
FILTERS = """abs capitalize count d default dictsort e escape first float groupby indent int items join last length list lower
map max min reject rejectattr replace reverse round safe select selectattr sort string sum title trim unique upper""".split()
METHODS = frozenset("""capitalize count endswith find index isalnum isalpha isdigit isnumeric isspace islower isupper join lower
lstrip partition removeprefix removesuffix replace rfind rindex rpartition rsplit rstrip split splitlines startswith strip
swapcase title upper""".split())


class TooMuch(Exception):
    """The allowance is spent."""


class Allowance:
    """How much one rendering may still do: LEAST, and 50 times what it is given."""

    def __init__(self, given: Any) -> None:
        self.left = self.all = self.most = 1 << 40
        weight = self.weigh(given)
        self.most = PLACES + (1 << 40) - self.left  # as many places as all that is given has, and some
        self.left = self.all = LEAST + 50 * weight

    def spend(self, n: int) -> None:
        self.left -= n
        if self.left < 0:
            raise TooMuch(f"more than {self.all:,} characters, items, turns and calls")

    def weigh(self, value: Any) -> int:
        """Characters and items in a value, those that come several times counted as often. A place that is visited costs 1."""
        weight, visited, waiting = 0, 0, [value]
        while waiting:
            one = waiting.pop()
            visited += 1
            if isinstance(one, (str, bytes)):
                weight += len(one)
            elif isinstance(one, Mapping):
                waiting += [*one.keys(), *one.values()]
            elif isinstance(one, (list, tuple, set, frozenset)):
                waiting += one
            elif type(one).__name__ == "Namespace":
                raise TooMuch("it writes out a namespace")
            if weight > self.left or visited + len(waiting) > self.most:
                raise TooMuch("it makes something too large")
        self.spend(visited)
        return weight + visited


_now: contextvars.ContextVar[Allowance] = contextvars.ContextVar("minilora.models.text.templates.allowance")


def spending(allowance: Allowance) -> contextvars.Token[Allowance]:
    """Let what is rendered in this context spend from this allowance."""
    return _now.set(allowance)


def size(value: Any) -> int:
    """Characters or items, what is inside them left out."""
    return len(value) if hasattr(value, "__len__") else 1


# -- what a rewritten template calls ------------------------------------------------------------------------------------------


def turns(values: Any) -> Iterator[Any]:
    """The items of a loop, counted."""
    allowance = _now.get()
    for value in values:
        allowance.spend(1)
        yield value


def shown(value: Any) -> Any:
    """What is written out, or made part of a text."""
    allowance = _now.get()
    if not isinstance(value, str):
        allowance.weigh(value)
        value = str(value)
    allowance.spend(len(value))
    return value


def joined(values: list[Any]) -> str:
    """The operator ~."""
    return "".join([shown(value) for value in values])


def made(value: Any) -> Any:
    """A list, tuple or dict, or a part of one."""
    _now.get().spend(1 + size(value))
    _now.get().weigh(value)
    return value


def looked(value: Any) -> Any:
    """A side of a comparison, which walks through it."""
    _now.get().spend(1 + size(value) // 16)
    return value


def as_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None,
            sort_keys: bool = False) -> str:
    """The filter tojson, as templates expect it: plain JSON, no HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


OWN = {"__turns": turns, "__shown": shown, "__joined": joined, "__made": made, "__looked": looked}


def before(name: str, args: tuple[Any, ...]) -> None:
    """Spend what a filter or method takes; where the result can be larger than its parts, what it will have."""
    allowance = _now.get()
    allowance.spend(CALL + sum(map(size, args)))
    if name == "replace" and len(args) > 2 and all(isinstance(arg, str) for arg in args[:3]):
        allowance.spend(args[0].count(args[1]) * len(args[2]))
    elif name in ("join", "string", "tojson", "e", "escape"):
        allowance.spend(sum(allowance.weigh(arg) for arg in args))
        if name == "join" and len(args) > 1:
            texts = [arg for arg in args if isinstance(arg, str)]
            allowance.spend(max(map(size, args)) * max(map(len, texts), default=0))
    elif name == "indent":
        width = args[1] if len(args) > 1 else 4
        allowance.spend(size(args[0]) * (width if isinstance(width, int) else size(width)))


def operate(operator: str, left: Any, right: Any, do: Callable[[Any, Any], Any]) -> Any:
    """+, *, ** and %, where they can make something large."""
    allowance = _now.get()
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() + right.bit_length() if operator != "**" else left.bit_length() * max(1, right)
        if bits > BITS:
            raise TooMuch("it makes a huge number")
        return do(left, right)
    if operator == "*":
        times = left if isinstance(left, int) else right if isinstance(right, int) else 1
        allowance.spend(max(size(left), size(right)) * max(1, times))
    elif operator == "%" and isinstance(left, str):
        if "*" in left or any(len(digits) > 4 for digits in re.findall(r"\d+", left)):
            raise TooMuch("it makes a very wide text")
        allowance.spend(10_000 * left.count("%") + allowance.weigh(right))
    allowance.spend(size(left) + size(right))
    result = do(left, right)
    if isinstance(result, (list, tuple)):
        allowance.weigh(result)
    return result


def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter of jinja2 that spends."""
    passed = 1 if getattr(function, "jinja_pass_arg", None) is not None else 0  # jinja2's own object comes first

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        given = list(args)
        if isinstance(given[passed], Iterator):
            given[passed] = list(turns(given[passed]))
        before(name, (*given[passed:], *kwargs.values()))
        result = function(*given, **kwargs)
        _now.get().spend(size(result))
        return result
    return wrapper


# -- the environment ----------------------------------------------------------------------------------------------------------


def rewriter(nodes: Any, visitor: Any) -> Any:
    """A visitor of jinja2's syntax tree that puts the functions of OWN around what is to be counted."""
    def through(name: str, node: Any) -> Any:
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)

    def plain(part: Any) -> Any:
        return nodes.Const(part.data, lineno=part.lineno) if isinstance(part, nodes.TemplateData) else part

    class Rewrite(visitor):  # type: ignore[misc]
        def generic_visit(self, node: Any, *args: Any, **kwargs: Any) -> Any:
            node = super().generic_visit(node, *args, **kwargs)
            if isinstance(node, nodes.For):
                node.iter = through("__turns", node.iter)
            elif isinstance(node, nodes.Output):
                node.nodes = [through("__shown", plain(part)) for part in node.nodes]
            elif isinstance(node, nodes.Concat):
                return through("__joined", nodes.List(node.nodes, lineno=node.lineno))
            elif isinstance(node, nodes.Compare):
                node.expr = through("__looked", node.expr)
                for operand in node.ops:
                    operand.expr = through("__looked", operand.expr)
            elif isinstance(node, (nodes.List, nodes.Tuple, nodes.Dict)) and getattr(node, "ctx", "load") == "load":
                return through("__made", node)
            elif isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
                return through("__made", node)
            return node
    return Rewrite()


def generation_tag(jinja2: Any) -> Any:
    """{% generation %} ... {% endgeneration %}, with which some templates mark what the model says: written as it stands."""
    class Generation(jinja2.ext.Extension):  # type: ignore[misc]
        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)
    return Generation


@functools.cache
def environment() -> Any:
    """The environment that templates are compiled in; needs jinja2."""
    import jinja2
    import jinja2.compiler
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox
    import jinja2.visitor

    rewrite = rewriter(jinja2.nodes, jinja2.visitor.NodeTransformer)

    class Generator(jinja2.compiler.CodeGenerator):  # type: ignore[misc]
        def visit_Template(self, node: Any, frame: Any = None) -> None:
            super().visit_Template(rewrite.visit(node), frame)

    class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):  # type: ignore[misc]
        code_generator_class = Generator
        intercepted_binops = frozenset({"+", "*", "**", "%"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            return operate(operator, left, right, self.binop_table[operator])

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            return super().is_safe_attribute(obj, attr, value) and not (isinstance(obj, str) and attr not in METHODS)

        def wrap_str_format(self, value: Any) -> Any:
            return None  # then is_safe_attribute refuses it: the width of a field is no matter of its length

        def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
            owner = getattr(function, "__self__", None)
            text = (owner,) if isinstance(owner, str) else ()
            before(getattr(function, "__name__", ""), (*text, *args, *kwargs.values()))
            result = super().call(context, function, *args, **kwargs)
            _now.get().spend(size(result))
            return result

    sandbox = Sandbox(trim_blocks=True, lstrip_blocks=True, optimized=False, cache_size=0,
                      extensions=[jinja2.ext.loopcontrols, generation_tag(jinja2)])
    sandbox.filters = {name: counted(name, sandbox.filters[name]) for name in FILTERS if name in sandbox.filters}
    sandbox.filters |= {**OWN, "tojson": counted("tojson", as_json)}
    sandbox.globals = {name: sandbox.globals[name] for name in ("range", "dict", "namespace")}
    return sandbox
