# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Device functions of the codecs: loads with a fast path, rounding, code of a number and number of a code.

Nothing here is launched; the kernels are in `codec_triton` and `outer_triton`. Bit for bit these follow
`reference_blocks`, under three rules: divisions are `tl.div_rn`, small floats are made by integer arithmetic, and every
launch passes ``enable_fp_fusion=False``, because a fused multiply-add rounds once where the definition rounds twice.
"""

from __future__ import annotations

import triton
import triton.language as tl

from diloco.kernels.reference_blocks import NF4_LEVELS, nf4_edges

_NF4_EDGES = tl.constexpr(tuple(nf4_edges()))
_NF4_LEVELS = tl.constexpr(tuple(NF4_LEVELS))


@triton.jit
def load_span(ptr, at, n, full):
    """fp32 values at `at` (int64), 0 from `n` on. Unmasked if `full`: a mask by `n` would forbid 16-byte loads."""
    if full:
        v = tl.load(ptr + at)
    else:
        v = tl.load(ptr + at, mask=at < n, other=0.0)
    return v.to(tl.float32)


@triton.jit
def store_span(ptr, at, v, n, full):
    """Inverse of `load_span`, rounding to the pointer's type."""
    v = v.to(ptr.dtype.element_ty)
    if full:
        tl.store(ptr + at, v)
    else:
        tl.store(ptr + at, v, mask=at < n)


@triton.jit
def all_read():
    """Place before a store into what the same program loaded: no thread writes what another has yet to read."""
    tl.debug_barrier()


@triton.jit
def load_words(codes, at, size, full):
    """32-bit words `at` of a byte string of `size` bytes, whose last word may be short (zero filled)."""
    if full:
        v = tl.load(codes + at)
    else:
        whole = at < size // 4
        v = tl.load(codes + at, mask=whole, other=0)
        octets = codes.to(tl.pointer_type(tl.uint8))
        for j in tl.static_range(3):
            here = at * 4 + j
            octet = tl.load(octets + here, mask=(at == size // 4) & (here < size), other=0)
            v = v | (octet.to(tl.int32) << (8 * j))
    return v


@triton.jit
def store_words(codes, at, words, size, full):
    """Inverse of `load_words`; bytes from `size` on are not touched."""
    if full:
        tl.store(codes + at, words)
    else:
        tl.store(codes + at, words, mask=at < size // 4)
        octets = codes.to(tl.pointer_type(tl.uint8))
        for j in tl.static_range(3):
            here = at * 4 + j
            octet = ((words >> (8 * j)) & 0xFF).to(tl.uint8)
            tl.store(octets + here, octet, mask=(at == size // 4) & (here < size))


@triton.jit
def round_half_even(v):
    """Nearest integer, ties to even, for |v| < 2^22: the addition itself rounds."""
    return (v + 12582912.0) - 12582912.0


@triton.jit
def absmax(x2):
    """fp32 [rows]: the largest |x| of each row of [rows, block]; NaN wins, as its bits are above those of infinity."""
    bits = x2.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(bits, axis=1).to(tl.float32, bitcast=True)


@triton.jit
def quotients(x2, CODEC: tl.constexpr):
    """Scales [rows] and x/scale [rows, block]; a row whose scale is 0 has quotients 0."""
    scale = absmax(x2)
    if CODEC == "int8":
        scale = tl.div_rn(scale, 127.0)
    elif CODEC == "e4m3":
        scale = tl.div_rn(scale, 448.0)
    elif CODEC == "e5m2":
        scale = tl.div_rn(scale, 57344.0)
    elif CODEC == "e2m1":
        scale = tl.div_rn(scale, 6.0)
    elif CODEC == "int4":
        scale = tl.div_rn(scale, 7.0)
    divisor = tl.where(scale == 0.0, float("inf"), scale)
    return scale, tl.div_rn(x2, tl.broadcast_to(divisor[:, None], x2.shape))


@triton.jit
def quantise(y, CODEC: tl.constexpr):
    """Codes (int32, low bits) of quotients `y` fp32, rounded to nearest by each codec's own rule for ties."""
    a = tl.abs(y)
    if CODEC == "int8":
        code = tl.minimum(tl.maximum(round_half_even(y), -127.0), 127.0).to(tl.int32) & 0xFF
    elif CODEC == "int4":
        code = tl.minimum(tl.maximum(round_half_even(y), -7.0), 7.0).to(tl.int32) & 0xF
    elif CODEC == "e4m3":
        bits = tl.minimum(a, 448.0).to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
        # Below 2^-6 the step is 2^-9, the last place of 2^14: adding it leaves the rounded multiple in the low bits.
        small = (a + 16384.0).to(tl.int32, bitcast=True) & 0xF
        code = _signed(y, tl.where(a < 0.015625, small, normal), 7)
    elif CODEC == "e5m2":
        bits = tl.minimum(a, 57344.0).to(tl.int32, bitcast=True)
        normal = ((bits + 0xFFFFF + ((bits >> 21) & 1)) >> 21) - (112 << 2)
        small = (a + 128.0).to(tl.int32, bitcast=True) & 0x7
        code = _signed(y, tl.where(a < 6.103515625e-05, small, normal), 7)
    elif CODEC == "e3m0":
        level = ((a.to(tl.int32, bitcast=True) + 0x00400000) >> 23) - 120
        level = tl.minimum(tl.maximum(level, 1), 7)
        code = _signed(y, tl.where(a > 0.0078125, level, 0), 3)
    elif CODEC == "e2m1":
        # A tie goes to the even code, hence > below an odd code and >= below an even one.
        level = (a > 0.25).to(tl.int32) + (a >= 0.75).to(tl.int32) + (a > 1.25).to(tl.int32)
        level += (a >= 1.75).to(tl.int32) + (a > 2.5).to(tl.int32) + (a >= 3.5).to(tl.int32)
        level += (a > 5.0).to(tl.int32)
        code = _signed(y, level, 3)
    else:
        tl.static_assert(CODEC == "nf4")
        code = tl.zeros_like(a).to(tl.int32)
        for i in tl.static_range(15):
            code += (y > _NF4_EDGES[i]).to(tl.int32)
    return code


@triton.jit
def quantise_stochastic(y, r, CODEC: tl.constexpr):
    """As `quantise`, but from the level below to the one above if u < (y - below)/(above - below).

    u is the top 24 bits of `r` (uint32) times 2^-24. Where levels are powers of two apart the share is exact, and for
    the normal numbers of small floats it is what their mantissa cuts off.
    """
    a = tl.abs(y)
    top = (r >> 8).to(tl.int32)
    u = top.to(tl.float32) * 5.9604644775390625e-08
    if CODEC == "int8":
        code = tl.minimum(tl.maximum(_floor_or_next(y, u), -127.0), 127.0).to(tl.int32) & 0xFF
    elif CODEC == "int4":
        code = tl.minimum(tl.maximum(_floor_or_next(y, u), -7.0), 7.0).to(tl.int32) & 0xF
    elif CODEC == "e4m3":
        bits = tl.minimum(a, 448.0).to(tl.int32, bitcast=True)
        normal = (bits >> 20) - (120 << 3) + (top < ((bits & 0xFFFFF) << 4)).to(tl.int32)
        small = _floor_or_next(a * 512.0, u).to(tl.int32)
        code = _signed(y, tl.where(a < 0.015625, small, normal), 7)
    elif CODEC == "e5m2":
        bits = tl.minimum(a, 57344.0).to(tl.int32, bitcast=True)
        normal = (bits >> 21) - (112 << 2) + (top < ((bits & 0x1FFFFF) << 3)).to(tl.int32)
        small = _floor_or_next(tl.minimum(a, 1.0) * 65536.0, u).to(tl.int32)
        code = _signed(y, tl.where(a < 6.103515625e-05, small, normal), 7)
    elif CODEC == "e3m0":
        bits = tl.minimum(a, 1.0).to(tl.int32, bitcast=True)
        normal = (bits >> 23) - 120 + (top < ((bits & 0x7FFFFF) << 1)).to(tl.int32)
        code = _signed(y, tl.where(a < 0.015625, (u < a * 64.0).to(tl.int32), normal), 3)
    elif CODEC == "e2m1":
        low = _floor_or_next(a * 2.0, u)
        middle = _floor_or_next(a, u) + 2.0
        high = tl.minimum(_floor_or_next(a * 0.5, u) + 4.0, 7.0)
        code = _signed(y, tl.where(a < 2.0, low, tl.where(a < 4.0, middle, high)).to(tl.int32), 3)
    else:
        tl.static_assert(CODEC == "nf4")
        code = tl.zeros_like(a).to(tl.int32)
        below = tl.full(a.shape, -1.0, tl.float32)
        above = tl.full(a.shape, _NF4_LEVELS[1], tl.float32)
        for i in tl.static_range(1, 15):
            reached = y >= _NF4_LEVELS[i]
            code += reached.to(tl.int32)
            below = tl.where(reached, _NF4_LEVELS[i], below)
            above = tl.where(reached, _NF4_LEVELS[i + 1], above)
        code += (u < tl.div_rn(y - below, above - below)).to(tl.int32)
    return code


@triton.jit
def level_of(code, table, CODEC: tl.constexpr):
    """fp32 value, before the scale, of codes (int32, low bits); `table` points to 16 fp32 levels, for nf4 only."""
    if CODEC == "int8":
        v = ((code << 24) >> 24).to(tl.float32)
    elif CODEC == "int4":
        v = ((code << 28) >> 28).to(tl.float32)
    elif CODEC == "e4m3":
        # The bits in place of fp32's own, subnormals included, times the difference of the exponents' biases: exact.
        v = ((code & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36
        v = tl.where((code & 0x80) != 0, -v, v)
    elif CODEC == "e5m2":
        v = ((code & 0x7F) << 21).to(tl.float32, bitcast=True) * 5.192296858534828e33
        v = tl.where((code & 0x80) != 0, -v, v)
    elif CODEC == "e3m0":
        v = (((code & 7) + 120) << 23).to(tl.float32, bitcast=True)
        v = tl.where((code & 7) == 0, 0.0, tl.where((code & 8) != 0, -v, v))
    elif CODEC == "e2m1":
        v = ((code & 7) << 22).to(tl.float32, bitcast=True) * 8.507059173023462e37
        v = tl.where((code & 8) != 0, -v, v)
    else:
        tl.static_assert(CODEC == "nf4")
        v = tl.load(table + (code & 0xF))
    return v


@triton.jit
def _signed(y, magnitude, SIGN_BIT: tl.constexpr):
    """The sign of `y` as bit SIGN_BIT; zero has none."""
    return tl.where((y < 0.0) & (magnitude > 0), magnitude | (1 << SIGN_BIT), magnitude)


@triton.jit
def _floor_or_next(v, u):
    low = tl.floor(v)
    return low + (u < v - low).to(tl.float32)
