"""Hypothesis strategies of random kernels, and comparisons whose tolerance follows from the arithmetic."""

from .agree import assert_agree, assert_expected, assert_meaning, tolerance
from .amount import FUZZ, examples
from .generate import built, kernels
from .kernel_case import KernelCase, TensorSpec

__all__ = ["FUZZ", "KernelCase", "TensorSpec", "assert_agree", "assert_expected", "assert_meaning", "built", "examples",
           "kernels", "tolerance"]
