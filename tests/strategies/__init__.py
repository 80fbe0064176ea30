"""Hypothesis strategies of random kernels, and comparisons whose tolerance follows from the arithmetic."""

from .agree import assert_agree, assert_expected, tolerance
from .generate import kernels, reject_unbuildable
from .kernel_case import KernelCase, TensorSpec

__all__ = ["KernelCase", "TensorSpec", "assert_agree", "assert_expected", "kernels", "reject_unbuildable", "tolerance"]
