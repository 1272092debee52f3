"""Read a pickle without running it.

The pickle machine is small: a stack, a memo, and some sixty instructions. Here every instruction builds an
inert :class:`Node` instead of importing or calling anything, so the result says what the pickle *would* make.
The standard library's ``pickletools.genops`` decodes the instructions.
"""

from __future__ import annotations

import pickletools
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import IO, Any, Literal

from convmerge.errors import LoadError

MAX_BYTES = 256 * 2**20
MAX_STEPS = 10_000_000
# Nested tuples are hashed by recursion: a file can use that to exhaust the interpreter's stack, or to hash
# exponentially many elements. torch.save nests tuples three deep.
MAX_TUPLE_DEPTH = 100
MAX_TUPLE_WEIGHT = 1_000_000

Value = Any  # None, bool, int, float, str, bytes, Global or Node


@dataclass(frozen=True)
class Global:
    """A class or function the pickle names. Equal by name."""

    module: str
    name: str

    @property
    def path(self) -> str:
        """Dotted path, as it stands in the file; ``str()`` of it is safe to print."""
        return f"{self.module}.{self.name}"

    def __str__(self) -> str:
        return printable(self.path)


def printable(text: str, limit: int = 120) -> str:
    """One line that is safe to print: text from a file may hold terminal escapes or be megabytes long."""
    text = text if len(text) <= limit else text[: limit - 1] + "…"
    return "".join(char if char.isprintable() else "�" for char in text)


@dataclass(eq=False)
class Node:
    """One composite value, inert.

    Attributes:
        kind: ``object`` was instantiated without its constructor, ``call`` is the result of calling
            ``maker``, ``storage`` is a reference to bytes outside the pickle.
        items: elements of a list, tuple or set, and what was appended to an object or call result.
        pairs: keys and values of a dict, and what was set by key in an object or call result.
        maker: class or function an object or call comes from.
        args: constructor or call arguments; for a storage its id.
        states: what was passed to ``__setstate__`` or put into ``__dict__``, in order.
        depth, weight: of a tuple, how deeply it nests and how many elements hashing it visits.
    """

    kind: Literal["list", "tuple", "set", "dict", "object", "call", "storage"]
    items: list[Value] = field(default_factory=list)
    pairs: list[tuple[Value, Value]] = field(default_factory=list)
    maker: Value = None
    args: tuple[Value, ...] = ()
    states: list[Value] = field(default_factory=list)
    depth: int = 0
    weight: int = 1

    def mapping(self) -> dict[str, Value]:
        """The entries under string keys; of a repeated key the last, as in a dict."""
        return {key: value for key, value in self.pairs if isinstance(key, str)}

    def attributes(self) -> dict[str, Value]:
        """What the object's states put into its ``__dict__`` and slots, as far as they are plain dicts."""
        found: dict[str, Value] = {}
        for state in self.states:
            parts = state.items if isinstance(state, Node) and state.kind == "tuple" else [state]
            for part in parts[:2]:  # a dict, or (dict, slots)
                if isinstance(part, Node):
                    found.update(part.mapping())
        return found


@dataclass
class Pickle:
    """What one pickle holds.

    Attributes:
        root: the value it evaluates to.
        globals: every class or function it names, in order of first use.
        calls: every call it makes, in order.
        objects: every object it instantiates without calling, in order.
        storages: every reference to bytes outside the pickle.
        protocol: version of the pickle format; torch.save writes 2.
    """

    root: Value = None
    globals: dict[Global, None] = field(default_factory=dict)
    calls: list[Node] = field(default_factory=list)
    objects: list[Node] = field(default_factory=list)
    storages: list[Node] = field(default_factory=list)
    protocol: int = 0


def read_pickle(stream: IO[bytes]) -> Pickle:
    """Evaluate one pickle inertly; the stream is left just behind it.

    Raises:
        LoadError: not a pickle, cut short, larger than the limits, or with an instruction torch.save never
        uses.
    """
    machine = _Machine()
    try:
        return machine.run(stream)
    except Exception as error:  # ValueError, IndexError, KeyError, TypeError, ... where malformed
        reason = printable(str(error) or type(error).__name__)
        raise LoadError(f"the pickle in the file is damaged: {reason}", "download or save it again") from None


class _Machine:
    """Stack, marks and memo of one run."""

    def __init__(self) -> None:
        self.stack: list[Value] = []
        self.marks: list[list[Value]] = []
        self.memo: dict[int, Value] = {}
        self.found = Pickle()

    def run(self, stream: IO[bytes]) -> Pickle:
        start = stream.tell()
        for step, (opcode, arg, position) in enumerate(pickletools.genops(stream)):
            if step > MAX_STEPS or (position or 0) - start > MAX_BYTES:
                raise ValueError("it is larger than any model needs")
            if opcode.name == "STOP":
                self.found.root = self.stack.pop()
                return self.found
            _STEPS[opcode.name](self, arg)
        raise ValueError("no end")

    def push(self, value: Value) -> None:
        self.stack.append(value)

    def pop_mark(self) -> list[Value]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def push_tuple(self, items: list[Value]) -> None:
        inner = [item for item in items if isinstance(item, Node) and item.kind == "tuple"]
        depth = 1 + max((node.depth for node in inner), default=0)
        weight = 1 + len(items) + sum(node.weight for node in inner)
        if depth > MAX_TUPLE_DEPTH or weight > MAX_TUPLE_WEIGHT:
            raise ValueError("tuples nest too deeply")
        self.push(Node("tuple", items, depth=depth, weight=weight))

    def push_global(self, module: str, name: str) -> None:
        # Names from Python 2 are translated as torch.load does it, whatever the protocol.
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        found = Global(module, name)
        self.found.globals[found] = None
        self.push(found)

    def push_object(self, maker: Value, args: list[Value]) -> None:
        node = Node("object", maker=maker, args=tuple(args))
        self.found.objects.append(node)
        self.push(node)

    def push_call(self, maker: Value, args: list[Value]) -> None:
        node = Node("call", maker=maker, args=tuple(args))
        self.found.calls.append(node)
        self.push(node)

    def push_storage(self, key: Value) -> None:
        node = Node("storage", args=tuple(key.items) if isinstance(key, Node) else (key,))
        self.found.storages.append(node)
        self.push(node)

    def top(self) -> Node:
        node = self.stack[-1]
        if not isinstance(node, Node) or node.kind in ("tuple", "storage"):
            raise ValueError(f"cannot change a {getattr(node, 'kind', type(node).__name__)}")
        return node


_Step = Callable[[_Machine, Any], None]
_STEPS: dict[str, _Step] = {}


def _step(*names: str) -> Callable[[_Step], _Step]:
    def register(function: _Step) -> _Step:
        _STEPS.update(dict.fromkeys(names, function))
        return function

    return register


@_step(
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
)
def _literal(m: _Machine, arg: Any) -> None:
    m.push(arg)


@_step("PROTO")
def _protocol(m: _Machine, arg: int) -> None:
    m.found.protocol = max(m.found.protocol, arg)


@_step("FRAME")
def _frame(m: _Machine, arg: Any) -> None:
    pass


_STEPS.update(
    NONE=lambda m, _: m.push(None),
    NEWTRUE=lambda m, _: m.push(True),
    NEWFALSE=lambda m, _: m.push(False),
    EMPTY_LIST=lambda m, _: m.push(Node("list")),
    EMPTY_DICT=lambda m, _: m.push(Node("dict")),
    EMPTY_SET=lambda m, _: m.push(Node("set")),
    EMPTY_TUPLE=lambda m, _: m.push_tuple([]),
    LIST=lambda m, _: m.push(Node("list", m.pop_mark())),
    FROZENSET=lambda m, _: m.push(Node("set", m.pop_mark())),
    DICT=lambda m, _: m.push(Node("dict", pairs=list(_pairs(m.pop_mark())))),
    TUPLE=lambda m, _: m.push_tuple(m.pop_mark()),
    TUPLE1=lambda m, _: m.push_tuple(_pop(m, 1)),
    TUPLE2=lambda m, _: m.push_tuple(_pop(m, 2)),
    TUPLE3=lambda m, _: m.push_tuple(_pop(m, 3)),
    POP_MARK=lambda m, _: (m.pop_mark(), None)[1],
    DUP=lambda m, _: m.push(m.stack[-1]),
    PERSID=lambda m, arg: m.push_storage(arg),
    BINPERSID=lambda m, _: m.push_storage(m.stack.pop()),
)


def _pop(m: _Machine, n: int) -> list[Value]:
    if len(m.stack) < n:
        raise ValueError("stack underflow")
    items = m.stack[-n:]
    del m.stack[-n:]
    return items


def _pairs(items: list[Value]) -> Iterator[tuple[Value, Value]]:
    return zip(items[::2], items[1::2], strict=True)


@_step("MARK")
def _mark(m: _Machine, arg: Any) -> None:
    m.marks.append(m.stack)
    m.stack = []


@_step("POP")
def _pop_one(m: _Machine, arg: Any) -> None:
    if m.stack:
        m.stack.pop()
    else:
        m.pop_mark()


@_step("PUT", "BINPUT", "LONG_BINPUT")
def _put(m: _Machine, arg: int) -> None:
    m.memo[arg] = m.stack[-1]


@_step("MEMOIZE")
def _memoize(m: _Machine, arg: Any) -> None:
    m.memo[len(m.memo)] = m.stack[-1]


@_step("GET", "BINGET", "LONG_BINGET")
def _get(m: _Machine, arg: int) -> None:
    m.push(m.memo[arg])


@_step("APPEND")
def _append(m: _Machine, arg: Any) -> None:
    item = m.stack.pop()
    m.top().items.append(item)


@_step("APPENDS", "ADDITEMS")
def _appends(m: _Machine, arg: Any) -> None:
    items = m.pop_mark()
    m.top().items.extend(items)


@_step("SETITEM")
def _set_item(m: _Machine, arg: Any) -> None:
    key, value = _pop(m, 2)
    m.top().pairs.append((key, value))


@_step("SETITEMS")
def _set_items(m: _Machine, arg: Any) -> None:
    items = m.pop_mark()
    m.top().pairs.extend(_pairs(items))


@_step("GLOBAL")
def _global(m: _Machine, arg: str) -> None:
    module, name = arg.split(" ")
    m.push_global(module, name)


@_step("STACK_GLOBAL")
def _stack_global(m: _Machine, arg: Any) -> None:
    module, name = _pop(m, 2)
    if not isinstance(module, str) or not isinstance(name, str):
        raise ValueError("a class name that is no string")
    m.push_global(module, name)


@_step("NEWOBJ")
def _new_object(m: _Machine, arg: Any) -> None:
    maker, args = _pop(m, 2)
    m.push_object(maker, _tuple_items(args))


@_step("NEWOBJ_EX")
def _new_object_ex(m: _Machine, arg: Any) -> None:
    maker, args, kwargs = _pop(m, 3)
    m.push_object(maker, [*_tuple_items(args), kwargs])


@_step("REDUCE")
def _reduce(m: _Machine, arg: Any) -> None:
    maker, args = _pop(m, 2)
    m.push_call(maker, _tuple_items(args))


@_step("INST")
def _inst(m: _Machine, arg: str) -> None:
    module, name = arg.split(" ")
    args = m.pop_mark()
    m.push_global(module, name)
    m.push_call(m.stack.pop(), args)


@_step("OBJ")
def _obj(m: _Machine, arg: Any) -> None:
    maker, *args = m.pop_mark()
    m.push_call(maker, args)


@_step("BUILD")
def _build(m: _Machine, arg: Any) -> None:
    state = m.stack.pop()
    m.top().states.append(state)


@_step("EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER")
def _never(m: _Machine, arg: Any) -> None:
    raise ValueError("an instruction that torch.save never writes")


def _tuple_items(args: Value) -> list[Value]:
    if not isinstance(args, Node) or args.kind != "tuple":
        raise ValueError("arguments that are no tuple")
    return args.items
