"""Numerics: the one door every projection goes through, and the precisions behind it."""

from jevons.numerics.linear import Fp8Weight, PackedWeight, Rows, Weight, dense, grouped_linear, linear

__all__ = ["Fp8Weight", "PackedWeight", "Rows", "Weight", "dense", "grouped_linear", "linear"]
