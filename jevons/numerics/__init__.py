"""Numerics: the one door every projection goes through, and the precisions behind it."""

from jevons.numerics import kernels
from jevons.numerics.linear import PackedWeight, Rows, Weight, dense, grouped_linear, linear, upcast
from jevons.numerics.packed import Fp8Weight, IntWeight

__all__ = ["Fp8Weight", "IntWeight", "PackedWeight", "Rows", "Weight", "dense", "grouped_linear", "kernels", "linear",
           "upcast"]
