"""One row times a matrix, as torch.compile turns it into a loop that waits for memory and nothing else.

Decoding one sequence on a CPU reads every weight once for each token, so this product is where its time goes. Written
as a multiplication and a sum, the compiler makes one pass over the weights of it, in any dtype, converting on the way.
Two things are said to it by the way this is written:

- Several rows of the weight are read side by side, from places far apart: a core then has several streams of memory
  under way, and several sums, where one stream leaves it waiting for half of the time.
- The vector is computed before the product begins. Otherwise what made it, a GELU say, is computed anew in the
  innermost loop, once for each row of the weight.
"""

import torch

STREAMS = 8  # measured on two cores of a Xeon with 1, 4 and 8: see bench/results/NOTES.md


def row_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x @ weight.T in float32, of one row: x with I elements, weight (O, I) of any dtype -> (O,).

    For code that is being compiled; eager, it would hold the products of all weights.
    """
    outputs, inputs = weight.shape
    x = in_memory(x.float(), (inputs,))
    streams = next(n for n in (STREAMS, 4, 2, 1) if outputs % n == 0)
    parts = weight.view(streams, outputs // streams, inputs).unbind()
    return torch.cat([(part.float() * x).sum(-1) for part in parts])


def in_memory(x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """x, viewed in a shape, as what the compiler computes before it goes on: it has to for a view by strides."""
    strides = torch.empty(shape, device="meta").stride()
    return x.contiguous().as_strided(shape, strides)
