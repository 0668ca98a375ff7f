"""A pickle read as inert data: names, arguments and states of its objects, none of them made. Protocols 0 to 5.

There is no unpickler here. Lists, dicts, tuples, numbers and texts are themselves; whatever a program would build by
calling something is a ``Made`` record that says what would have been called. So nothing in a file can run.
"""

from __future__ import annotations

import pickletools
from typing import NamedTuple

from sgm_engine.checkpoints.torch_file import CheckpointError

MAX_OPCODES = 5_000_000
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
PLAIN = {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "BININT", "BININT1", "BININT2", "INT", "LONG",
         "LONG1", "LONG4", "FLOAT", "BINFLOAT", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "STRING",
         "BINSTRING",
         "SHORT_BINSTRING"}  # fmt: skip
EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": list}
GET = {"GET", "BINGET", "LONG_BINGET"}
PUT = {"PUT", "BINPUT", "LONG_BINPUT"}


class Name(NamedTuple):
    """A class or function that the program refers to."""

    module: str
    name: str


class Made:
    """What ``callable(*args)`` would have made: ``state`` what would have been set on it, items put in it."""

    def __init__(self, callable: object, args: object):
        self.callable, self.args, self.state, self.items = callable, args, None, {}

    @property
    def name(self) -> str:
        return self.callable.name if isinstance(self.callable, Name) else ""


class Key(NamedTuple):
    """A storage or other object that the program refers to by a persistent id."""

    of: object


def interpret(stream) -> object:
    """The value of the pickle program at ``stream`` (bytes or a file), left behind it. Raises CheckpointError."""
    try:
        return _interpret(stream)
    except (IndexError, KeyError, TypeError, ValueError, EOFError, AttributeError, OverflowError, MemoryError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"is no sound pickle ({' '.join(str(error).split())[:100] or type(error).__name__})"
        ) from None


def _interpret(stream) -> object:
    stack: list = []
    marks: list[list] = []
    memo: dict[int, object] = {}
    for count, (opcode, arg, _) in enumerate(pickletools.genops(stream)):
        if count >= MAX_OPCODES:
            raise CheckpointError(f"describes its content in more than {MAX_OPCODES} opcodes, where thousands would do")
        name = opcode.name
        if name in PLAIN:
            stack.append(arg)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in EMPTY:
            stack.append(EMPTY[name]())
        elif name in GET:
            stack.append(memo[int(arg)])
        elif name in PUT:
            memo[int(arg)] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("PROTO", "FRAME"):
            pass
        elif name == "STOP":
            (value,) = stack
            return value
        elif name == "MARK":
            marks.append(stack)
            stack = []
        elif name in ("TUPLE", "LIST", "FROZENSET", "DICT"):
            items, stack = stack, marks.pop()
            made = {"TUPLE": tuple, "LIST": list, "FROZENSET": list}.get(name)
            stack.append(made(items) if made else _dict(items))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            n = int(name[-1])
            if len(stack) < n:
                raise IndexError("an empty stack")
            stack[-n:] = [tuple(stack[-n:])]
        elif name in ("APPEND", "APPENDS", "ADDITEMS"):
            items = [stack.pop()] if name == "APPEND" else stack
            stack = stack if name == "APPEND" else marks.pop()
            if isinstance(stack[-1], list):
                stack[-1].extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            if name == "SETITEM":
                value, key = stack.pop(), stack.pop()
                items = [key, value]
            else:
                items, stack = stack, marks.pop()
            target = stack[-1].items if isinstance(stack[-1], Made) else stack[-1]
            target.update(_dict(items))
        elif name == "GLOBAL":
            stack.append(Name(*arg.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            last, module = stack.pop(), stack.pop()
            stack.append(Name(str(module), str(last)))
        elif name in ("REDUCE", "NEWOBJ"):
            args, made = stack.pop(), stack.pop()
            if not isinstance(args, tuple):
                raise CheckpointError("calls something with arguments that are no tuple")
            stack.append(Made(made, args))
        elif name == "NEWOBJ_EX":
            kwargs, args, made = stack.pop(), stack.pop(), stack.pop()
            stack.append(Made(made, (args, kwargs)))
        elif name == "BUILD":
            state = stack.pop()
            if isinstance(stack[-1], Made):
                stack[-1].state = state
        elif name == "BINPERSID":
            stack.append(Key(stack.pop()))
        elif name in ("POP", "POP_MARK"):
            stack = marks.pop() if name == "POP_MARK" or not stack else stack[:-1]
        elif name == "DUP":
            stack.append(stack[-1])
        else:
            raise CheckpointError(f"uses the pickle opcode {name}, which is not understood; nothing was run")
    raise EOFError("the pickle has no end")


def _dict(items: list) -> dict:
    """Keys that Python could not hash, and keys deep enough to take long to hash, are no keys of a network."""
    return {k if isinstance(k, (str, int, float, bool, type(None))) else repr(type(k)): v
            for k, v in zip(items[::2], items[1::2], strict=True)}  # fmt: skip
