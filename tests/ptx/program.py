"""PTX text → a Program: its parameters, its shared memory and its instructions, with operands taken apart."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np

BYTES = {"b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "b32": 4, "u32": 4, "s32": 4, "f32": 4}
BYTES |= {"bf16": 2, "bf16x2": 4, "f16x2": 4, "b64": 8, "u64": 8, "s64": 8, "pred": 1}
BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_NUMBER = re.compile(r"-?(0x[0-9a-fA-F]+|\d+)U?$")


class Fault(Exception):
    """What a GPU would not, or might not, do as meant."""


@dataclass(frozen=True)
class Register:
    name: str
    bytes: int


@dataclass(frozen=True)
class Special:
    """%tid.x and the like."""

    name: str


@dataclass(frozen=True)
class Immediate:
    value: int  # 0f3F800000 as 0x3F800000


@dataclass(frozen=True)
class Symbol:
    """A parameter or the one array in shared memory; offset in bytes."""

    name: str
    shared: bool
    offset: int


@dataclass(frozen=True)
class Address:
    """[base + offset], or [base, {coordinates}] of a tensor map."""

    base: Operand
    offset: int = 0
    coordinates: tuple[Operand, ...] = ()


@dataclass(frozen=True)
class Pack:
    """{a, b, …}"""

    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Pair:
    """p|q: two results."""

    first: Operand
    second: Operand


@dataclass(frozen=True)
class Not:
    """!p"""

    predicate: Register


Operand = Register | Special | Immediate | Symbol | Address | Pack | Pair | Not | None  # None: _


@dataclass
class Instruction:
    opcode: str
    operands: tuple[Operand, ...]
    text: str
    guard: Register | None = None
    negated: bool = False  # executes where the guard is false
    target: int | None = None  # of a branch
    label: str | None = None

    def __post_init__(self):
        self.parts = self.opcode.split(".")
        self.type = self.parts[-1]


@dataclass
class Parameter:
    name: str
    offset: int
    size: int


@dataclass
class Program:
    """One .entry."""

    name: str
    parameters: list[Parameter]
    code: list[Instruction] = field(default_factory=list)

    @property
    def parameter_bytes(self) -> int:
        return self.parameters[-1].offset + self.parameters[-1].size if self.parameters else 0


def entries(ptx: str) -> list[str]:
    """The names of the kernels."""
    return re.findall(r"\.entry\s+([\w$]+)", ptx)


def parse(ptx: str, name: str | None = None) -> Program:
    """The kernel of that name, or the first."""
    ptx = re.sub(r"//[^\n]*", "", re.sub(r"/\*.*?\*/", "", ptx, flags=re.S))
    name = name or entries(ptx)[0]
    head = re.search(rf"\.entry\s+{re.escape(name)}\s*(?:\(([^)]*)\))?[^{{]*\{{", ptx)
    if head is None:
        raise Fault(f"no .entry {name}")
    program = Program(name, list(_parameters(head[1] or "")))
    shared = dict.fromkeys(re.findall(r"\.extern \.shared \.align \d+ \.b8 ([\w$]+)\[\]", ptx), 0)
    end, depth = head.end(), 1
    while depth:
        depth += {"{": 1, "}": -1}.get(ptx[end], 0)
        end += 1
    _Body(program, shared).read(ptx[head.end() : end - 1])
    return program


def _parameters(text: str):
    at = 0
    for line in filter(None, map(str.strip, text.split(","))):
        found = re.match(
            r"\.param (?:\.align (\d+) )?\.(\w+)(?: \.ptr(?: \.\w+)? \.align \d+)? ([\w$]+)(?:\[(\d+)\])?$",
            " ".join(line.split()),
        )
        if found is None:
            raise Fault(f"a parameter that is not understood: {line}")
        size = BYTES[found[2]] * int(found[4] or 1)
        alignment = int(found[1] or size)
        at = -(-at // alignment) * alignment
        yield Parameter(found[3], at, size)
        at += size


class _Body:
    """Statements, one after the other. A name of a register or a label holds in the braces that it is declared in."""

    def __init__(self, program: Program, shared: dict[str, int]):
        self.program, self.code, self.shared = program, program.code, shared
        self.offsets = {p.name: p.offset for p in program.parameters}
        self.scopes = [({}, {}, 0)]  # names → bytes, labels → index, which braces
        self.count = 0

    def read(self, text: str) -> None:
        at, open_branches = 0, []
        token = re.compile(r"\s*(?:([{}])|([\w$]+):(?!:)|(\.loc\s[^\n]*|\.pragma[^;]*;)|([^;]*);)")
        while found := token.match(text, at):
            at = found.end()
            brace, label, _, statement = found.groups()
            if brace == "{":
                self.count += 1
                self.scopes.append(({}, {}, self.count))
                open_branches.append(len(self.code))
            elif brace == "}":
                self._close(open_branches.pop())
            elif label:
                self.scopes[-1][1][label] = len(self.code)
            elif statement and statement.strip():
                self._statement(" ".join(statement.split()))
        if text[at:].strip():
            raise Fault(f"not understood: {text[at : at + 80]!r}")
        self._close(0)
        if lost := [i.text for i in self.code if i.label is not None]:
            raise Fault(f"no such label: {lost[0]}")

    def _close(self, first: int) -> None:
        """Branches find the labels of the braces that close, from the inside out."""
        _, labels, _ = self.scopes.pop()
        for i in self.code[first:]:
            if i.label in labels:
                i.target, i.label = labels[i.label], None

    def _statement(self, text: str) -> None:
        if found := re.match(r"\.reg \.(\w+) (.*)", text):
            for name in map(str.strip, found[2].split(",")):
                self.scopes[-1][0][re.sub(r"<\d+>$", "<", name)] = BYTES[found[1]]
            return
        if text.startswith("."):
            raise Fault(f"memory that is neither a parameter nor the dynamic shared array: {text}")
        guard = re.match(r"@(!?)(\S+) (.*)", text)
        opcode, _, rest = (guard[3] if guard else text).partition(" ")
        branch = opcode.split(".")[0] == "bra"
        instruction = Instruction(opcode, () if branch else tuple(map(self.operand, _split(rest))), text)
        if guard:
            instruction.guard, instruction.negated = self.operand(guard[2]), guard[1] == "!"
        if branch:
            instruction.label = rest
        self.code.append(instruction)

    def operand(self, text: str) -> Operand:
        text = text.strip()
        if text == "_":
            return None
        if text[0] == "{":
            return Pack(tuple(map(self.operand, _split(text[1:-1]))))
        if text[0] == "[":
            return self._address(text[1:-1].strip())
        if text[0] == "!":
            return Not(self.operand(text[1:]))
        if "|" in text:
            return Pair(*map(self.operand, text.split("|")))
        if text[:2] in ("0f", "0F", "0d", "0D"):
            return Immediate(int(text[2:], 16))
        if _NUMBER.match(text):
            return Immediate(int(text.rstrip("U"), 0))
        if text in self.shared:
            return Symbol(text, True, self.shared[text])
        if text in self.offsets:
            return Symbol(text, False, self.offsets[text])
        return self._register(text)

    def _register(self, text: str) -> Register | Special:
        for names, _, braces in reversed(self.scopes):
            size = names.get(text, names.get(re.sub(r"\d+$", "<", text)))
            if size is not None:
                return Register(f"{text} of {braces}" if braces else text, size)
        if text[0] != "%":
            raise Fault(f"no such name: {text}")
        return Special(text)

    def _address(self, text: str) -> Address:
        base, *more = _split(text)
        if more:
            return Address(self.operand(base), 0, self.operand(more[0]).items)
        base, _, offset = map(str.strip, base.partition("+"))
        return Address(self.operand(base), int(offset or "0", 0))


def _split(text: str) -> list[str]:
    """At the commas outside of brackets."""
    parts, depth, last = [], 0, 0
    for at, letter in enumerate(text):
        depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            parts.append(text[last:at])
            last = at + 1
    return [part.strip() for part in [*parts, text[last:]] if part.strip()]
