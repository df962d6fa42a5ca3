"""What this machine multiplies at most."""

from jevons.numerics.peak import gemm_rate

__all__ = ["gemm_rate"]
