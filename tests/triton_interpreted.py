"""The Triton kernels in Triton's interpreter, on fresh inputs; run by test_fp8_training in a process of its own, for
TRITON_INTERPRET must be set before triton is imported. Codes are rounded outside: the interpreter's own cast to E4M3 is wrong."""

import sys

import torch
import triton.runtime.interpreter as interpreter

from jevons.numerics import fp8_gemm, triton_fp8
from jevons.numerics.fp8 import Quantised, dequantise, quantise_tiles, quantise_weight

_patch = interpreter._patch_lang_tensor


def patched(tensor, scope):
    """Loop bounds that were loaded: the interpreter asks numpy for an int of an array of one, which numpy 2.4 refuses."""
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = patched


def same(q: Quantised, want: Quantised) -> None:
    codes = q.codes.to(torch.float8_e4m3fn)
    assert torch.equal(q.scale.nan_to_num(-1), want.scale.nan_to_num(-1)) and q.rows == want.rows
    fine = want.scale.isfinite().repeat_interleave(want.rows, -2)[..., : codes.shape[-2], :]
    fine = fine.repeat_interleave(128, -1)[..., : codes.shape[-1]]
    assert torch.equal(codes.view(torch.uint8)[fine], want.codes.contiguous().view(torch.uint8)[fine])


def near(got: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    want, size = a.double() @ b.double().t(), a.double().abs() @ b.double().abs().t()
    assert ((got.double() - want).abs() <= 1e-5 * size).all(), "against float64"


def main() -> None:
    torch.manual_seed(int(sys.argv[1]) % 2**31)
    plain = {"codes_dtype": torch.float32}
    offs = torch.tensor([30, 30, 170, 171], dtype=torch.int32)
    x, w, grad = torch.randn(180, 150), torch.randn(4, 140, 150), torch.randn(180, 140)
    x[5, 140] *= 1e5
    x[:4, :128] = 0
    bad = x.clone()
    bad[7, 3], bad[100, 149] = float("nan"), float("inf")
    rows, ends = fp8_gemm.whole_tiles(offs, len(x))
    for power in (False, True):
        for y in (x, bad):
            same(triton_fp8.tiles(y, power, **plain), quantise_tiles(y, power))
            same(triton_fp8.columns(y, power, rows, **plain), fp8_gemm.columns(y, power, rows))
            same(triton_fp8.weight(y, power, **plain), quantise_weight(y, power))
    same(triton_fp8.weight(w, **plain), quantise_weight(w))
    a, b = quantise_tiles(x), quantise_weight(w)
    same(triton_fp8.columns(a, True, **plain), fp8_gemm.columns(a, True))
    print("quantise")
    for other in (quantise_weight(w[0]), quantise_tiles(w[0])):
        near(triton_fp8.matmul(a, other, torch.float32), dequantise(a), dequantise(other))
    other = quantise_weight(w[0]).t()
    g = quantise_tiles(grad)
    near(triton_fp8.matmul(g, other, torch.float32), dequantise(g), dequantise(other))
    print("matmul")
    out, first = triton_fp8.grouped(a, b, offs, torch.float32), 0
    for e, end in enumerate(offs.tolist()):
        near(out[first:end], dequantise(a)[first:end], dequantise(b)[e])
        first = end
    print("grouped")
    g, cols = fp8_gemm.columns(grad, False, rows), fp8_gemm.columns(a, False, rows)
    out, first = triton_fp8.grouped_wgrad(g, cols, ends, torch.float32), 0
    for e, end in enumerate(ends.tolist()):
        near(out[e], dequantise(g)[:, first:end], dequantise(cols)[:, first:end])
        first = end
    print("wgrad")


main()
