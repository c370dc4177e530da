"""The reader of compiled kernels, on canned listings, so that the gate of test_aot.py can be seen to fail."""

import pytest

pytest.importorskip("triton")

from fastgpt_kernels import machine_code

KIB = 1024

USAGE = """
Resource usage:
 Common:
  GLOBAL:0
 Function _forward:
  REG:254 STACK:8 SHARED:1024 LOCAL:0 CONSTANT[0]:576 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
SASS = """
        .headerflags    @"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                /* 0x00000a00ff017b82 */
                                                                         /* 0x000fe20000000800 */
        /*0010*/               @P2 LDG.E.128 R12, desc[UR4][R36.64] ;    /* 0x0000000424029981 */
        /*0020*/              @!P0 LDG.E R3, desc[UR4][R2.64] ;
        /*0030*/                   LDG.E.U16.CONSTANT R3, [R2.64] ;
        /*0040*/              @!PT LDS RZ, [RZ] ;
        /*0050*/                   LDGSTS.E.BYPASS.LTC128B.128 [R5], desc[UR4][R4.64], P1 ;
        /*0060*/                   LDGDEPBAR ;
        /*0070*/                   HFMA2.MMA.BF16_V2 R3, -RZ, RZ, 0, 0 ;
        /*0080*/                   LDSM.16.M88.4 R4, [R5] ;
        /*0090*/              @UP1 UIADD3 UR4, UR5, 0x1, URZ ;
        /*fff0*/                   STG.E.128 desc[UR4][R2.64], R4 ;
       /*10000*/                   BRA 0x0 ;
"""


def with_instruction(instruction: str) -> machine_code.Code:
    return machine_code.read_sass(f"{SASS}       /*10010*/                   {instruction} ;\n")


def test_usage_is_read():
    assert machine_code.read_usage(USAGE) == (254, 8)
    with pytest.raises(ValueError, match="no registers"):
        machine_code.read_usage("cuobjdump fatal: unknown file")


def test_sass_is_read():
    assert machine_code.read_sass(SASS) == machine_code.Code(spills=0, tensor_core=0, wide_loads=0.5)
    assert machine_code.read_sass("") == machine_code.Code(spills=0, tensor_core=0, wide_loads=None)
    assert len(machine_code.SASS_INSTRUCTION.findall(SASS)) == 12


@pytest.mark.parametrize(
    "spill", ["STL [R1], R4", "STL.64 [R1+0x8], R4", "@P0 LDL.LU R3, [R1]", "@!P1 LDL.128 R8, [R1]"]
)
def test_sass_spills_are_counted(spill):
    assert with_instruction(spill) == machine_code.Code(spills=1, tensor_core=0, wide_loads=0.5)


@pytest.mark.parametrize(
    "product",
    [
        "HMMA.16816.F32.BF16 R4, R8, R12, R4",
        "HMMA.1688.F32.TF32 R4, R8, R12, R4",
        "IMMA.16832.S8.S8 R4, R8, R12, R4",
        "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24",
        "@P0 QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR8], R24",
        "UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR10], idesc[UR11], UP0",
        "@UP0 UTCQMMA.2CTA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR10], idesc[UR11], UP0",
    ],
)
def test_sass_tensor_core_instructions_are_counted(product):
    assert with_instruction(product) == machine_code.Code(spills=0, tensor_core=1, wide_loads=0.5)


LOOPS = """
        /*0000*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24, !UPT, gsb0 ;
        /*0010*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0020*/              @!P0 BRA 0x70 ;
        /*0030*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24, gsb0 ;
        /*0050*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0060*/              @!P1 BRA 0x30 ;
        /*0070*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0080*/               @P2 BRA.U UP0, 0x70 ;
        /*0090*/                   BRA 0x0 ;
        /*00a0*/                   BRA 0xa0;
"""


def test_sass_waits_are_counted_in_the_loop_that_has_most():
    """The outer loop, from the end to the start, is none of them, nor is what the kernel ends with."""
    assert machine_code.read_sass(LOOPS).waits == 2
    assert machine_code.read_sass(LOOPS.replace("@!P1 BRA 0x30", "@!P1 BRA 0x90")).waits == 1
    assert machine_code.read_sass(LOOPS.replace("BRA", "RET")).waits == 0


PTXAS = """
ptxas info    : 11 bytes gmem
ptxas info    : Compiling entry function '_forward' for 'sm_90a'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 249 registers, used 1 barriers
"""
SERIALIZED = (
    "ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized due to non wgmma "
    "instructions defining accumulator registers of a wgmma in the function '_forward'\n"
)


def test_what_ptxas_warns_of_is_read():
    assert machine_code.ptxas_warnings(PTXAS) is None
    assert machine_code.ptxas_warnings(SERIALIZED + PTXAS) == "C7515"
    other = SERIALIZED.replace("C7515", "C7508")
    assert machine_code.ptxas_warnings(SERIALIZED + other + SERIALIZED + PTXAS) == "C7508 C7515"
    with pytest.raises(ValueError, match="no report"):
        machine_code.ptxas_warnings("")


def test_sass_loads_by_tile_are_wide():
    assert with_instruction("UTMALDG.2D [UR8], [UR4]").wide_loads == 0.6
    assert with_instruction("LDG.E.64 R4, [R2.64]").wide_loads == 0.4


AMDGCN = """
_forward:
	s_load_dwordx4 s[4:7], s[0:1], 0x0
	buffer_load_dwordx4 v[0:3], v4, s[4:7], 0 offen
	global_load_dword v5, v6, s[2:3]
	ds_read_b128 v[8:11], v12
	global_store_dwordx4 v6, v[0:3], s[2:3]
    .agpr_count:     64
    .group_segment_fixed_size: 0
    .private_segment_fixed_size: 24
    .sgpr_spill_count: 7
    .vgpr_count:     252
    .vgpr_spill_count: 5
"""


def test_amdgcn_is_read():
    assert machine_code.read_amdgcn(AMDGCN) == (252, 24, machine_code.Code(spills=5, tensor_core=0, wide_loads=0.5))
    product = AMDGCN + "\tv_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]\n"
    assert machine_code.read_amdgcn(product)[2].tensor_core == 1
    with pytest.raises(ValueError, match="vgpr_spill_count"):
        machine_code.read_amdgcn(AMDGCN.replace(".vgpr_spill_count", ".other"))


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "tensor_columns", "blocks"),
    [
        ("sm_90", 32, 0, 1, 0, 32),  # no more than 32 blocks
        ("sm_90", 32, 0, 4, 0, 16),  # 64 warps
        ("sm_90", 65, 0, 4, 0, 7),  # 72 registers by allocation: 7 warps a quarter
        ("sm_90", 255, 0, 8, 0, 1),
        ("sm_90", 255, 0, 16, 0, 0),  # 131,072 registers
        ("sm_90", 118, 72 * KIB, 8, 0, 2),
        ("sm_90", 118, 113 * KIB, 4, 0, 2),  # with 1 KiB for each block: 228 KiB
        ("sm_90", 118, 113 * KIB + 1, 4, 0, 1),
        ("sm_90", 32, 227 * KIB, 4, 0, 1),
        ("sm_90", 32, 227 * KIB + 1, 4, 0, 0),
        ("sm_80", 32, 163 * KIB, 4, 0, 1),
        ("sm_80", 32, 164 * KIB, 4, 0, 0),
        ("sm_100", 32, 0, 4, 256, 2),  # 512 columns of tensor memory
        ("gfx942", 32, 0, 1, 0, 32),  # 8 waves on each of 4 SIMDs
        ("gfx942", 252, 0, 4, 0, 2),
        ("gfx942", 512, 0, 4, 0, 1),
        ("gfx942", 512, 0, 8, 0, 0),
        ("gfx942", 32, 64 * KIB, 4, 0, 1),
        ("gfx942", 32, 64 * KIB + 1, 4, 0, 0),
    ],
)
def test_blocks_per_sm(target, registers, shared, warps, tensor_columns, blocks):
    assert machine_code.blocks_per_sm(machine_code.CHIPS[target], registers, shared, warps, tensor_columns) == blocks


def test_machine_code_is_found_in_a_cubin():
    names = b"\0.shstrtab\0.text.k\0"
    header = bytearray(64)
    header[40:48] = (64).to_bytes(8, "little")  # where the section headers start
    header[60:62], header[62:64] = (2).to_bytes(2, "little"), (0).to_bytes(2, "little")

    def section(at: int, offset: int, size: int) -> bytes:
        parts = [at.to_bytes(4, "little"), bytes(20), offset.to_bytes(8, "little"), size.to_bytes(8, "little")]
        return b"".join(parts).ljust(64, b"\0")

    start_of_names = 64 + 2 * 64
    sections = section(1, start_of_names, len(names)) + section(11, start_of_names + len(names), 16)
    cubin = bytes(header) + sections + names + b"0123456789abcdef" + b"rest"
    assert machine_code._machine_code(cubin, ".text.k") == b"0123456789abcdef"
    with pytest.raises(LookupError, match=r"no section \.text\.other"):
        machine_code._machine_code(cubin, ".text.other")
