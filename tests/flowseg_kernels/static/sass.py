"""Reads the machine code of NVIDIA kernels: disassembly, loops, instruction counts and resources. It needs no GPU.

    functions = sass.disassemble("kernel.cubin")            # {kernel name: [Instruction]}
    for loop in sass.innermost_loops(functions[name]):
        print(len(loop), loop.opcodes())

`python -m tests.flowseg_kernels.static.sass FILE` prints the innermost loops of every kernel of a cubin, an object or a library.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable

__all__ = ["Instruction", "Loop", "disassemble", "find_tool", "innermost_loops", "loops", "parse", "resources"]


@dataclasses.dataclass(frozen=True)
class Instruction:
    address: int
    text: str  # with the predicate, for example "@!P0 BRA 0x1a0"

    @property
    def opcode(self) -> str:
        """The mnemonic without predicate and modifiers: FFMA, LDS, BRA."""
        return self.text.removeprefix(self.predicate).split()[0].split(".")[0]

    @property
    def predicate(self) -> str:
        return self.text.split()[0] if self.text.startswith("@") else ""

    @property
    def target(self) -> int | None:
        """The address that a branch jumps to."""
        found = re.search(r"\bBRA(?:\.\S+)?\s.*?(?:`\(\S+\)|0x([0-9a-f]+))", self.text)
        return int(found[1], 16) if found and found[1] else None


@dataclasses.dataclass(frozen=True)
class Loop:
    """Instructions from the target of a backward branch up to the branch."""

    body: tuple[Instruction, ...]

    def __len__(self) -> int:
        return len(self.body)

    def opcodes(self) -> collections.Counter[str]:
        return collections.Counter(i.opcode for i in self.body)

    @property
    def first(self) -> int:
        return self.body[0].address

    @property
    def last(self) -> int:
        return self.body[-1].address


def find_tool(name: str) -> str | None:
    """The path of nvcc, cuobjdump or nvdisasm in the CUDA toolkit, else of the copy in the Triton wheel, else None."""
    folders = [os.environ.get(v, "") + "/bin" for v in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(v)]
    found = shutil.which(name) or shutil.which(name, path=os.pathsep.join([*folders, "/usr/local/cuda/bin"]))
    if found:
        return found
    triton = importlib.util.find_spec("triton")
    for folder in (triton and triton.submodule_search_locations) or ():
        tool = pathlib.Path(folder) / "backends" / "nvidia" / "bin" / name
        if tool.exists():
            return str(tool)
    return None


def _run(tool: str, *arguments: str) -> str:
    path = find_tool(tool)
    if path is None:
        raise FileNotFoundError(f"{tool} was not found: neither a CUDA toolkit nor a Triton wheel is installed")
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def parse(listing: str) -> dict[str, list[Instruction]]:
    """Instructions by kernel name, from the text of `cuobjdump -sass`."""
    functions: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in listing.splitlines():
        if name := re.match(r"\s*Function : (\S+)", line):
            current = functions.setdefault(name[1], [])
        elif code := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+([^;]+?)\s*;", line):
            current.append(Instruction(int(code[1], 16), code[2].strip(" {}")))
    return functions


def disassemble(binary: str | os.PathLike | bytes, names: Iterable[str] = ()) -> dict[str, list[Instruction]]:
    """Instructions by kernel name of a cubin, an object or a library: a path, or the bytes of a cubin (Triton's `asm["cubin"]`).

    names: disassemble only these kernels.
    """
    if isinstance(binary, bytes):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary)
            file.flush()
            return disassemble(file.name, names)
    chosen = ["-fun", ",".join(names)] if names else []
    return parse(_run("cuobjdump", "-sass", *chosen, os.fspath(binary)))


def loops(instructions: list[Instruction]) -> list[Loop]:
    """Every loop, one per backward branch. The branch to itself that ends a kernel's code does not count."""
    found = []
    for last, branch in enumerate(instructions):
        if branch.target is not None and branch.target < branch.address:
            body = [i for i in instructions[: last + 1] if i.address >= branch.target]
            found.append(Loop(tuple(body)))
    return found


def innermost_loops(instructions: list[Instruction]) -> list[Loop]:
    """The loops that contain no other loop."""
    every = loops(instructions)
    return [a for a in every if not any(b is not a and a.first <= b.first and b.last <= a.last for b in every)]


def resources(binary: str | os.PathLike | bytes) -> dict[str, dict[str, int]]:
    """By kernel name: registers ("REG"), and bytes of local ("STACK", "LOCAL") and static shared memory ("SHARED")."""
    if isinstance(binary, bytes):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary)
            file.flush()
            return resources(file.name)
    text = _run("cuobjdump", "-res-usage", os.fspath(binary))
    used = re.findall(r"Function (\S+):\n\s*(REG:.*)", text)
    return {name: {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", line)} for name, line in used}


def main(path: str) -> None:
    for name, instructions in disassemble(path).items():
        print(f"{name}: {len(instructions)} instructions")
        for loop in innermost_loops(instructions):
            counts = ", ".join(f"{n} {op}" for op, n in loop.opcodes().most_common())
            print(f"  loop {loop.first:#06x}-{loop.last:#06x}: {len(loop)} instructions: {counts}")


if __name__ == "__main__":
    main(sys.argv[1])
