"""y = W @ x for one row of x (decoding), from four- and three-bit weights, without shared memory (Triton).

A matrix instruction wants its operands in its own layout, which costs a trip through shared memory and a barrier
for every step of K; at one row, waiting for those and not the memory set the pace. Here nothing changes hands until
the end: a thread takes a *unit* of 32 neighbouring codes of a row (16 bytes of four-bit codes) with one load,
decodes them in registers and multiplies them by its own 32 inputs.

    warp, one load      8 units along K  x  4 rows        128 consecutive bytes of each row
    program             tensors [KS, BN, 8]: KS spreads the warps over K, and R rows per thread share their inputs:
                        rows program_id * BN * R + r * BN + (0 .. BN - 1), r < R

    one step, K advances by KS * 256:
        next     = codes and scales of the next step, asked for before this one's are used
        x        = 32 inputs of the unit, from the L1 cache, as float32
        part[r]  = sum_i value(code[r, i]) * x[i]                       float32
        acc[r]  += part[r] * scale[r]                                   codebook
        acc[r]  += (part[r] - (OFFSET + zero[r]) * sum_i x[i]) * scale[r] * UNIT    affine

at the end acc is summed over KS and the 8 units, always in the same order.

Values:
    CODEBOOK  table of byte pairs in shared memory (`codebook_lookup`): two values a load
    4 bits    q in the top bits of a float32 mantissa: 1 + q / 16            shift and lop3 for each code
    3 bits    128 + q as bfloat16, two to a register, from both planes       6 instructions for two codes

Loads are inline PTX, which Triton lays out as its operands lie (a `tl.load` would get a layout of its own, and its
result be sent through shared memory). Without PTX the same program runs on plain loads: for tests, not for speed.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from quantkit.kernels.codebook_lookup import eight_values, fill_table

#: What `KIND` stands for.
CODEBOOK, AFFINE4, AFFINE3 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


def _loads(count: int, kept: bool) -> str:
    """PTX for `count` 32-bit words at the address in the last operand. Weights are read once: not kept in L1."""
    hint = "" if kept else ".L1::no_allocate"
    if count == 1:
        return f"ld.global.nc{hint}.b32 $0, [$1];"
    outs = ",".join(f"${i}" for i in range(count))
    return f"ld.global.nc{hint}.v{count}.b32 {{{outs}}}, [${count}];"


_LOAD_X = tl.constexpr(_loads(4, True))
_LOAD4 = tl.constexpr(_loads(4, False))
_LOAD2 = tl.constexpr(_loads(2, False))
_LOAD1 = tl.constexpr(_loads(1, False))
_LOAD_F32 = tl.constexpr("ld.global.nc.b32 $0, [$1];")
_LOAD_16 = tl.constexpr("ld.global.nc.u16 $0, [$1];")
_LOAD_8 = tl.constexpr("ld.global.nc.u8 $0, [$1];")
_EIGHT_OUT = tl.constexpr("=r,=r,=r,=r,=r,=r,=r,=r,r")


def _pairs_asm(dtype: str) -> str:
    """Eight float32 values of the word in $8, by `codebook_lookup`'s table: the high nibble of a byte first."""
    lines = [".reg .b32 at, b, p; .reg .b16 l, h; mov.u32 at, %laneid; mov.u32 b, quantkit_pairs;"]
    lines.append("mad.lo.u32 at, at, 4, b;")
    for i in range(4):
        lines.append(f"prmt.b32 b, $8, 0, 0x{0x4440 | i:x}; mad.lo.u32 b, b, 128, at; ld.shared.b32 p, [b];")
        if dtype == "bf16":
            lines.append(f"shl.b32 ${2 * i}, p, 16; and.b32 ${2 * i + 1}, p, 0xffff0000;")
        else:
            lines.append(f"mov.b32 {{l, h}}, p; cvt.f32.f16 ${2 * i}, l; cvt.f32.f16 ${2 * i + 1}, h;")
    return "{ " + " ".join(lines) + " }"


def _codes4_asm() -> str:
    """1 + q / 16 for the eight codes of the word in $8. (As one lop3: two constants make two of `and` and `or`.)"""
    lines = [".reg .b32 t;"]
    for i in range(8):
        up = 19 - 4 * i
        lines.append(f"{'shl' if up >= 0 else 'shr'}.b32 t, $8, {abs(up)};")
        lines.append(f"lop3.b32 ${i}, t, 0x00780000, 0x3f800000, 0xea;")
    return "{ " + " ".join(lines) + " }"


def _codes3_asm(half: int) -> str:
    """128 + q for 16 codes: low bits in the word $16, top bits in half `half` of the word $17."""
    lines = [".reg .b32 t, v, h;", f"prmt.b32 h, $17, 0, 0x4{2 * half + 1}4{2 * half};"]
    for i in range(8):  # codes i and i + 8 are 16 bits apart in both
        lines.append(f"shr.b32 t, $16, {2 * i}; lop3.b32 v, t, 0x00030003, 0x43004300, 0xea;")
        lines.append(
            f"{'shl' if i <= 2 else 'shr'}.b32 t, h, {abs(2 - i)}; lop3.b32 v, t, 0x00040004, v, 0xea;"
        )
        lines.append(f"shl.b32 ${i}, v, 16; and.b32 ${i + 8}, v, 0xffff0000;")
    return "{ " + " ".join(lines) + " }"


_PAIRS_BF16 = tl.constexpr(_pairs_asm("bf16"))
_PAIRS_F16 = tl.constexpr(_pairs_asm("f16"))
_CODES4 = tl.constexpr(_codes4_asm())
_CODES3 = tl.constexpr((_codes3_asm(0), _codes3_asm(1)))
_CODES3_CON = tl.constexpr(",".join(["=r"] * 16 + ["r", "r"]))


@triton.jit
def words(p, COUNT: tl.constexpr, KEPT: tl.constexpr, ASM: tl.constexpr):
    """COUNT (1, 2 or 4) words at the byte addresses `p`, as a tuple."""
    if ASM:
        at = p.to(tl.int64)
        if COUNT == 1:
            return (tl.inline_asm_elementwise(_LOAD1, "=r,l", [at], tl.int32, is_pure=True, pack=1),)
        elif COUNT == 2:
            two: tl.constexpr = (tl.int32, tl.int32)
            return tl.inline_asm_elementwise(_LOAD2, "=r,=r,l", [at], two, is_pure=True, pack=1)
        else:
            four: tl.constexpr = (tl.int32, tl.int32, tl.int32, tl.int32)
            if KEPT:
                return tl.inline_asm_elementwise(_LOAD_X, "=r,=r,=r,=r,l", [at], four, is_pure=True, pack=1)
            else:
                return tl.inline_asm_elementwise(_LOAD4, "=r,=r,=r,=r,l", [at], four, is_pure=True, pack=1)
    else:
        pointers = p.to(tl.pointer_type(tl.int32), bitcast=True)
        out = ()
        for i in tl.static_range(COUNT):
            out = out + (tl.load(pointers + i),)
        return out


@triton.jit
def number(p, ASM: tl.constexpr):
    """One scale or zero point at each of `p`, as float32."""
    kind: tl.constexpr = p.dtype.element_ty
    if not ASM:
        return tl.load(p).to(tl.float32)
    elif kind == tl.float32:
        return tl.inline_asm_elementwise(
            _LOAD_F32, "=r,l", [p.to(tl.int64)], tl.float32, is_pure=True, pack=1
        )
    elif kind == tl.uint8:
        byte = tl.inline_asm_elementwise(_LOAD_8, "=h,l", [p.to(tl.int64)], tl.int16, is_pure=True, pack=1)
        return byte.to(tl.float32)
    elif kind == tl.float16:
        half = tl.inline_asm_elementwise(_LOAD_16, "=h,l", [p.to(tl.int64)], tl.float16, is_pure=True, pack=1)
        return half.to(tl.float32)
    else:
        half = tl.inline_asm_elementwise(
            _LOAD_16, "=h,l", [p.to(tl.int64)], tl.bfloat16, is_pure=True, pack=1
        )
        return half.to(tl.float32)


@triton.jit
def two_inputs(word, DTYPE: tl.constexpr):
    """The two inputs in a 32-bit word as float32. (By their bits: the interpreter's bfloat16 is wrong.)"""
    if tl.bfloat16 == DTYPE:
        return ((word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True))
    else:
        low = word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        return (low, (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32))


@triton.jit
def _inputs(p, inside, COUNT: tl.constexpr, DTYPE: tl.constexpr, EVEN_K: tl.constexpr, ASM: tl.constexpr):
    """COUNT inputs at each byte address of `p`, as float32; zeros outside."""
    out = ()
    for i in tl.static_range(COUNT // 8):
        four = words(p + 16 * i, 4, True, ASM)
        for j in tl.static_range(4):
            a, b = two_inputs(four[j] if EVEN_K else tl.where(inside, four[j], 0), DTYPE)
            out = out + (a, b)
    return out


@triton.jit
def _values(w, j: tl.constexpr, lut_ptr, KIND: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Float32 values of the j-th 8 (3 bits: 16) codes of the unit `w`, in the inputs' order."""
    eight: tl.constexpr = (tl.float32,) * 8
    if KIND == CODEBOOK:
        if ASM and tl.bfloat16 == DTYPE:
            return tl.inline_asm_elementwise(_PAIRS_BF16, _EIGHT_OUT, [w[j]], eight, is_pure=True, pack=1)
        elif ASM:
            return tl.inline_asm_elementwise(_PAIRS_F16, _EIGHT_OUT, [w[j]], eight, is_pure=True, pack=1)
        else:
            return eight_values(w[j], lut_ptr, False)
    elif KIND == AFFINE4:
        if ASM:
            return tl.inline_asm_elementwise(_CODES4, _EIGHT_OUT, [w[j]], eight, is_pure=True, pack=1)
        else:
            out = ()
            for i in tl.static_range(8):
                out = out + (((w[j] >> (4 * i)) & 15).to(tl.float32) * 0.0625 + 1.0,)
            return out
    else:
        if ASM:
            asm: tl.constexpr = _CODES3[j]
            return tl.inline_asm_elementwise(
                asm, _CODES3_CON, [w[j], w[2]], (tl.float32,) * 16, is_pure=True, pack=1
            )
        else:
            out = ()
            for i in tl.static_range(16):
                q = ((w[j] >> (2 * i)) & 3) | (((w[2] >> (16 * j + i)) & 1) << 2)
                out = out + (q.to(tl.float32) + 128.0,)
            return out


@triton.jit
def _unit(row, at, high_offset, KIND: tl.constexpr, ASM: tl.constexpr):
    """The words of the units that begin at the inputs `at`: four, or two of low and one of top bits."""
    if KIND == AFFINE3:
        return words(row + at // 4, 2, False, ASM) + words(row + high_offset + at // 8, 1, False, ASM)
    else:
        return words(row + at // 2, 4, False, ASM)


@triton.jit
def _step(
    row,
    scales,
    zeros,
    at,
    row_bytes,
    high_offset,
    groups,
    KIND: tl.constexpr,
    BN: tl.constexpr,
    R: tl.constexpr,
    GROUP: tl.constexpr,
    ASM: tl.constexpr,
):
    """Units, scales and zero points (not for a codebook) of the R rows of a thread, at the inputs `at`."""
    g = at * 0 if GROUP == 0 else at // GROUP
    ws = ()
    ss = ()
    zs = ()
    for r in tl.static_range(R):
        far = tl.full((), r * BN, tl.int64)
        ws = ws + (_unit(row + far * row_bytes, at, high_offset, KIND, ASM),)
        ss = ss + (number(scales + far * groups + g, ASM),)
        if KIND != CODEBOOK:
            zs = zs + (number(zeros + far * groups + g, ASM),)
    return ws, ss, zs


@triton.jit
def gemv_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    lut_ptr,
    bias_ptr,
    out_ptr,
    K,
    row_bytes,
    high_offset,
    groups,
    KIND: tl.constexpr,
    BN: tl.constexpr,
    KS: tl.constexpr,
    R: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ASM: tl.constexpr,
    THREADS: tl.constexpr,
):
    """Grid: (N / (BN * R),). 32 divides K and GROUP (0: one group per row); addresses of x and of rows are
    multiples of 16 (rows of three bits: of 8). EVEN_K: KS * 256 divides K."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    TAKE: tl.constexpr = 16 if KIND == AFFINE3 else 8
    OFFSET: tl.constexpr = 128.0 if KIND == AFFINE3 else 16.0
    UNIT: tl.constexpr = 1.0 if KIND == AFFINE3 else 16.0
    STEP: tl.constexpr = KS * 256
    u = (tl.arange(0, KS)[:, None, None] * 8 + tl.arange(0, 8)[None, None, :]) * 32
    n = tl.program_id(0) * (BN * R) + tl.arange(0, BN)
    rows = n[None, :, None].to(tl.int64)
    row = codes_ptr + rows * row_bytes
    scales = scale_ptr + rows * groups
    zeros = zero_ptr + rows * groups
    x_bytes = x_ptr.to(tl.pointer_type(tl.uint8), bitcast=True)
    if KIND == CODEBOOK:
        fill_table(lut_ptr, THREADS, DTYPE, ASM)
    nothing = tl.zeros((KS, BN, 8), tl.float32)

    at = u if EVEN_K else tl.where(u < K, u, 0)
    ws, ss, zs = _step(row, scales, zeros, at, row_bytes, high_offset, groups, KIND, BN, R, GROUP, ASM)
    accs = ()
    for _ in tl.static_range(R):
        accs = accs + (nothing,)
    for k in tl.range(0, K, STEP, num_stages=1):
        inside = k + u < K
        x_at = x_bytes + 2 * (k + u if EVEN_K else tl.where(inside, k + u, 0))
        # The next step's codes; in the last step its own once more, which are not used.
        ahead = tl.where(k + STEP < K, k + STEP, k) + u
        at = ahead if EVEN_K else tl.where(ahead < K, ahead, 0)
        next_ws, next_ss, next_zs = _step(
            row, scales, zeros, at, row_bytes, high_offset, groups, KIND, BN, R, GROUP, ASM
        )
        parts = ()
        for _ in tl.static_range(R):
            parts = parts + (nothing,)
        sums = tl.zeros((KS, 1, 8), tl.float32)
        for j in tl.static_range(32 // TAKE):
            x = _inputs(x_at + 2 * TAKE * j, inside, TAKE, DTYPE, EVEN_K, ASM)
            if KIND != CODEBOOK:
                for i in tl.static_range(TAKE // 8):
                    first = (x[8 * i] + x[8 * i + 1]) + (x[8 * i + 2] + x[8 * i + 3])
                    sums += first + ((x[8 * i + 4] + x[8 * i + 5]) + (x[8 * i + 6] + x[8 * i + 7]))
            new_parts = ()
            for r in tl.static_range(R):
                v = _values(ws[r], j, lut_ptr, KIND, DTYPE, ASM)
                part = parts[r]
                for i in tl.static_range(TAKE):
                    part += v[i] * x[i]
                new_parts = new_parts + (part,)
            parts = new_parts
        new_accs = ()
        for r in tl.static_range(R):
            if KIND == CODEBOOK:
                new_accs = new_accs + (accs[r] + parts[r] * ss[r],)
            else:
                centred = parts[r] * UNIT - (OFFSET + zs[r]) * sums
                new_accs = new_accs + (accs[r] + centred * ss[r],)
        accs = new_accs
        ws = next_ws
        ss = next_ss
        zs = next_zs

    for r in tl.static_range(R):
        y = tl.sum(tl.sum(accs[r], 2), 0)
        if HAS_BIAS:
            y += tl.load(bias_ptr + n + r * BN).to(tl.float32)
        tl.store(out_ptr + n + r * BN, y.to(out_ptr.dtype.element_ty))
