"""Choices that commands share."""

DTYPES = ("auto", "float32", "bfloat16", "float16")
KERNELS = ("auto", "torch", "reference", "triton")
TOKENIZERS = ("char", "byte", "gpt2", "bpe")
