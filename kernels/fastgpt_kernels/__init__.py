"""The operations of a GPT, each in columns that compute the same: readable math, stock PyTorch, our kernels.

`fastgpt_kernels.reference` and `fastgpt_kernels.stock` import no triton.
"""
