"""Numerics: the one door every projection goes through, and the precisions behind it."""

from jevons.numerics.linear import PackedWeight, Weight, grouped_linear, linear

__all__ = ["PackedWeight", "Weight", "grouped_linear", "linear"]
