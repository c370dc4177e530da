"""Reads compiled kernels: registers, stack, spills, tensor-core instructions, the width of loads, occupancy.

NVIDIA's machine code is read with the disassembler that comes with Triton, AMD's from its assembly text.
Offered here: `CHIPS`, `inspect`, `blocks_per_sm`, `ptxas_warnings`.
"""

import math
import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from triton import knobs
from triton.backends.compiler import GPUTarget

SASS_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z]\w*(?:\.\w+)*)([^;\n]*)")
SASS_BYTES = 16  # of an instruction


class Chip(NamedTuple):
    """A target, and what its multiprocessor (compute unit) shares out among the blocks it holds.

    A multiprocessor has four quarters (SIMDs), each with 512 registers for every lane of a warp.
    """

    compiler: GPUTarget
    warps: int  # that a quarter holds
    shared: int  # bytes
    reserved: int  # bytes of shared memory that every block takes beside its own
    granule: int  # shared memory is given out in multiples of this
    sass: str  # the disassembler's name

    @property
    def largest_block(self) -> int:
        """The most bytes of shared memory that one block can have."""
        return self.shared - self.reserved


CHIPS = {
    "sm_80": Chip(GPUTarget("cuda", 80, 32), 16, 164 * 1024, 1024, 128, "SM80"),
    "sm_90": Chip(GPUTarget("cuda", 90, 32), 16, 228 * 1024, 1024, 128, "SM90a"),
    "sm_100": Chip(GPUTarget("cuda", 100, 32), 16, 228 * 1024, 1024, 128, "SM100a"),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 8, 64 * 1024, 0, 512, ""),
}


def blocks_per_sm(chip: Chip, registers: int, shared: int, warps: int, tensor_columns: int = 0) -> int:
    """The number of blocks that a multiprocessor holds at once; 0 if it cannot hold one.

    Source: the CUDA C++ Programming Guide's table of technical specifications per compute capability (64 Ki registers,
    64 warps and 32 blocks a multiprocessor; shared memory) and its rules of allocation (registers by warp, in units of
    256, so of 8 a thread); AMD's CDNA 3 ISA guide (512 vector registers a lane, in units of 8, for at most 8 waves a
    SIMD; 64 KiB of LDS, in units of 512 bytes).

    Args:
        registers: of one thread.
        shared: bytes of a block.
        warps: of a block.
        tensor_columns: columns of tensor memory that a block takes (sm_100 has 512), 0 for none.
    """
    quarter = min(chip.warps, 512 // max(_round_up(registers, 8), 8))
    limits = [4 * quarter // warps, 32]
    if shared:
        limits.append(chip.shared // (_round_up(shared, chip.granule) + chip.reserved))
    if tensor_columns:
        limits.append(512 // tensor_columns)
    return min(limits)


def _round_up(n: int, multiple: int) -> int:
    return math.ceil(n / multiple) * multiple


class Code(NamedTuple):
    """The facts that a kernel's instructions show; `spills` is None where they do not show it."""

    spills: int | None
    tensor_core: int
    wide_loads: float | None
    waits: int = 0


class Instruction(NamedTuple):
    """One of NVIDIA's instructions."""

    address: int
    name: str  # with its suffixes, such as LDG.E.128
    operands: str


def read_instructions(listing: str) -> list[Instruction]:
    """From a disassembly of NVIDIA machine code."""
    return [Instruction(int(at, 16), name, operands) for at, name, operands in SASS_INSTRUCTION.findall(listing)]


def read_sass(listing: str) -> Code:
    """From a disassembly of NVIDIA machine code."""
    return count_sass(read_instructions(listing))


def count_sass(instructions: Sequence[Instruction]) -> Code:
    """From a kernel's instructions."""
    count = Counter(one.name for one in instructions)

    def matching(pattern: str) -> int:
        return sum(n for name, n in count.items() if re.match(pattern, name))

    tiles = matching(r"UTMALDG\b")
    wide = matching(r"(LDG|LDGSTS)\b.*\.128\b") + tiles
    return Code(
        spills=matching(r"(STL|LDL)\b"),
        tensor_core=matching(r"([HIQDBO]G?MMA|UTC\w*MMA)\b"),  # and not HFMA2.MMA, which only takes the name
        wide_loads=_share(wide, matching(r"(LDG|LDGSTS)\b") + tiles),
        waits=most_in_a_loop("WARPGROUP.DEPBAR", instructions),
    )


def most_in_a_loop(name: str, instructions: Sequence[Instruction]) -> int:
    """The most instructions of this name that lie in one loop without another loop in it."""
    branches = [
        (one.address, re.search(r"\b0x([0-9a-f]+)", one.operands))
        for one in instructions
        if re.match(r"BRA\b", one.name)
    ]
    loops = [(int(to[1], 16), at) for at, to in branches if to and int(to[1], 16) < at]
    inner = [(a, b) for a, b in loops if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in loops)]
    found = [one.address for one in instructions if one.name.startswith(name)]
    return max((sum(start <= at <= end for at in found) for start, end in inner), default=0)


def ptxas_warnings(log: str) -> str | None:
    """The codes of what ptxas warns of, such as C7515; None for nothing. Raises ValueError for a log of nothing."""
    if "Compiling entry function" not in log:
        raise ValueError(f"no report of a compiled kernel in the output of ptxas: {log!r}")
    return " ".join(sorted(set(re.findall(r"\((C\d+)\)", log)))) or None


def read_usage(listing: str) -> tuple[int, int]:
    """(registers, bytes of stack) from `cuobjdump --dump-resource-usage` of one kernel."""
    found = re.search(r"\bREG:(\d+) STACK:(\d+)", listing)
    if found is None:
        raise ValueError(f"no registers in the output of cuobjdump: {listing!r}")
    return int(found[1]), int(found[2])


def read_amdgcn(assembly: str) -> tuple[int, int, Code]:
    """(registers, bytes of stack, what the instructions show) from AMD assembly of one kernel."""

    def value(name: str) -> int:
        found = re.search(rf"^\s*(?:- )?\.{name}:\s*(\d+)\s*$", assembly, re.MULTILINE)
        if found is None:
            raise ValueError(f"no .{name} in the assembly")
        return int(found[1])

    loads = re.findall(r"^\s*(?:global|buffer|flat)_load_(\w+)", assembly, re.MULTILINE)
    wide = sum(suffix.endswith("dwordx4") for suffix in loads)
    products = len(re.findall(r"^\s*v_s?mfma\w+", assembly, re.MULTILINE))
    code = Code(value("vgpr_spill_count"), products, _share(wide, len(loads)))
    return value("vgpr_count"), value("private_segment_fixed_size"), code


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 3) if whole else None


def inspect(chip: Chip, compiled: list[Any]) -> list[tuple[int, int, Code]]:
    """(registers, bytes of stack, what the instructions show) of each compiled kernel."""
    return (_inspect_amd if chip.compiler.backend == "hip" else _inspect_nvidia)(chip, compiled)


def _inspect_amd(chip: Chip, compiled: list[Any]) -> list[tuple[int, int, Code]]:
    return [read_amdgcn(binary.asm["amdgcn"]) for binary in compiled]


def _inspect_nvidia(chip: Chip, compiled: list[Any]) -> list[tuple[int, int, Code]]:
    """Disassembles all kernels in one go, because the disassembler takes a third of a second to start."""
    codes = [_machine_code(binary.asm["cubin"], f".text.{binary.metadata.name}") for binary in compiled]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "code"
        file.write_bytes(b"".join(codes))
        listing = _run(knobs.nvidia.nvdisasm.path, "--no-dataflow", "--binary", chip.sass, file)
        all_of_them = read_instructions(listing)
        if len(all_of_them) * SASS_BYTES != sum(map(len, codes)):
            size = sum(map(len, codes))
            raise ValueError(f"{len(all_of_them)} instructions read from {size} bytes of {chip.sass} code")
        found, start = [], 0
        for binary, code in zip(compiled, codes, strict=True):
            file.write_bytes(binary.asm["cubin"])
            usage = read_usage(_run(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file))
            end = start + len(code) // SASS_BYTES
            found.append((*usage, count_sass(all_of_them[start:end])))
            start = end
    return found


def _machine_code(cubin: bytes, section: str) -> bytes:
    """The bytes of a section of a 64-bit ELF file."""
    table = struct.unpack_from("<Q", cubin, 40)[0]
    count, names = struct.unpack_from("<HH", cubin, 60)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + 64 * i) for i in range(count)]
    for name, _, _, _, offset, size in headers:
        start = headers[names][4] + name
        if cubin[start : cubin.index(0, start)] == section.encode():
            return cubin[offset : offset + size]
    raise LookupError(f"no section {section} in the compiled kernel")


def _run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed: {done.stderr.strip()}")
    return done.stdout
