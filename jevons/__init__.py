"""Jevons: the DeepSeek-V3/R1 system as one small Python package. Bring a verifier, get a reasoner."""

__version__ = "0.1.0"
