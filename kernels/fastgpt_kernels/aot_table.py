"""Prints the lines that `fastgpt_kernels.aot` reports as a table, bad values in red. The columns:

    target         the chip: sm_80 (A100; also serves sm_86, sm_89, sm_120), sm_90 (H100, H200), sm_100 (B200),
                   gfx942 (MI300)
    kernel         its name in the launch table
    config         dtype, widest width served (or any), rows x columns of the tile, warps (w), stages (s), variant
    registers      of one thread. At most 255 on NVIDIA, 512 on AMD (accumulation registers included); every step up
                   can cost blocks_per_sm. Bad: more than before, for the same work.
    stack          bytes of a thread's variables that lie in memory for want of registers. Bad: anything but 0.
    spills         instructions that move them (NVIDIA: STL and LDL; AMD: the number of vector registers spilled).
                   Bad: anything but 0; in 16 bits it is an error.
    shared         bytes of shared memory a block asks for. Bad: above the chip's limit (sm_80 163 KiB, 99 KiB on its
                   smaller relatives; sm_90 and sm_100 227 KiB; gfx942 64 KiB), where the launch fails.
    blocks_per_sm  blocks that one multiprocessor holds at once, by registers, shared memory and warps. Bad: 0, which
                   cannot be launched. With 1, nothing hides a block's start and end.
    tensor_core    tensor-core instructions (HMMA, HGMMA, UTC*MMA and the like; v_mfma on AMD). Bad: 0 in a kernel
                   that multiplies matrices, but for float32 with IEEE products, which NVIDIA's do not offer.
    waits          instructions that wait for a warpgroup's matrix products (sm_90's WARPGROUP.DEPBAR), the most in one
                   loop. Bad: one for each product, so that none overlaps with anything else.
    wide_loads     share of the instructions that read global memory which read 16 bytes a thread, or a tile at once.
                   An instruction counts once, also in a loop; reads of one number a row (mean, rstd) count as narrow.
                   `null`, or a dash, without such reads. Bad: near 0, in a kernel that reads matrices.
    warnings       codes of ptxas's own warnings about speed, or a dash. Bad: C7515, products one after the other on
                   sm_90; in 16 bits it is an error.
    seconds        to compile, never from a cache; the first of a worker's includes the compiler's own start.

Offered here: `show`.
"""

from typing import Any

import triton
from rich.console import Console
from rich.table import Table

from fastgpt_kernels.machine_code import CHIPS


def show(lines: list[dict[str, Any]], seconds: float) -> None:
    """Print the lines as a table, bad values in red, and what they come to."""
    console = Console()
    if not console.is_terminal:
        console.width = 200
    table = Table(box=None, padding=(0, 1), title=f"Triton {triton.__version__}")
    for name in lines[0]:
        text = name in ("target", "kernel", "config", "warnings")
        table.add_column(name.replace("_", " "), justify="left" if text else "right", overflow="fold")
    for before, line in zip([None, *lines], lines, strict=False):
        if before is not None and (before["target"], before["kernel"]) != (line["target"], line["kernel"]):
            table.add_section()
        bad = {"stack": line["stack"] > 0, "spills": line["spills"] > 0, "blocks_per_sm": line["blocks_per_sm"] == 0}
        bad["warnings"] = line["warnings"] is not None
        bad["shared"] = line["shared"] > CHIPS[line["target"]].largest_block
        cells = {name: "-" if value is None else str(value) for name, value in line.items()}
        table.add_row(*(f"[red]{cell}[/red]" if bad.get(name) else cell for name, cell in cells.items()))
    console.print(table)
    spilling = sum(line["stack"] > 0 or line["spills"] > 0 for line in lines)
    warned = sum(line["warnings"] is not None for line in lines)
    console.print(f"{len(lines)} compiled in {seconds:.0f} s; {spilling} with stack or spills, {warned} with warnings")
