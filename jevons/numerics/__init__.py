"""Numerics: the one door every projection goes through, and the precisions behind it."""

from jevons.numerics import fused, kernels
from jevons.numerics.fp8_linear import Fp8, training
from jevons.numerics.fused import upcast
from jevons.numerics.linear import PackedWeight, Rows, Weight, dense, grouped_linear, linear, swiglu_linear
from jevons.numerics.packed import Fp8Weight, IntWeight

__all__ = ["Fp8", "Fp8Weight", "IntWeight", "PackedWeight", "Rows", "Weight", "dense", "fused", "grouped_linear", "kernels",
           "linear", "swiglu_linear", "training", "upcast"]
