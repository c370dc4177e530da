"""Choices that training and generation share."""

DTYPES = ("auto", "float32", "bfloat16", "float16")
KERNELS = ("auto", "torch", "reference", "triton")
