"""The arithmetic of one call of an operation and the least bytes that it moves, counted from its shape.

    count("causal_attention", "forward", {"B": 4, "T": 1024, "H": 12, "D": 64}, itemsize=2) -> Count(flops, bytes)

Bytes: every input once and every output once, as if each lay in the device's memory and nothing were read twice; what
passes from forward to backward counts in both. Operations: a multiply-add is two; of a causal square only what is seen.
The dozen operations an element that a normalization takes are counted too, although the memory limits it.

Beside the table's operations there is what else a training step computes: linear layers, activation, dropout,
embedding, the gradients' norm and the optimizer.
"""

from collections.abc import Mapping
from dataclasses import dataclass

FLOAT32 = INT32 = 4  # bytes
INT64 = 8
BOOL = 1


@dataclass(frozen=True)
class Count:
    """One call's operations and bytes."""

    flops: float
    bytes: float

    def __add__(self, other: "Count") -> "Count":
        return Count(self.flops + other.flops, self.bytes + other.bytes)


def count(op: str, direction: str, shape: Mapping[str, int], itemsize: int) -> Count:
    """The counts of a call of `op`.

    Args:
        direction: "forward", "backward" (given what forward left), or "both".
        shape: the sizes by the names of the parameters of its function here: {"N": 8, "C": 128} for layer_norm.
        itemsize: bytes of an element of the inputs.

    Raises:
        KeyError: an operation without a count, or without a backward pass.
    """
    if direction == "both":
        return count(op, "forward", shape, itemsize) + count(op, "backward", shape, itemsize)
    return COUNTS[op, direction](itemsize, **shape)


def layer_norm(itemsize: int, N: int, C: int) -> Count:
    # mean 1, centre 1, square and sum 2, scale 1, weight and bias 2
    return Count(7 * N * C, (2 * N + 2) * C * itemsize)


def layer_norm_backward(itemsize: int, N: int, C: int) -> Count:
    # x again to its normal form 2, dy * weight 1, two row sums 3, dx 4, dweight 2, dbias 1; mean and deviation are read
    return Count(13 * N * C, (3 * N + 3) * C * itemsize + 2 * N * FLOAT32)


def add_layer_norm(itemsize: int, N: int, C: int) -> Count:
    return layer_norm(itemsize, N, C) + Count(N * C, 2 * N * C * itemsize)  # the residual is read, the sum written


def add_layer_norm_backward(itemsize: int, N: int, C: int) -> Count:
    # the sum's own gradient is read and added
    return layer_norm_backward(itemsize, N, C) + Count(N * C, N * C * itemsize)


def rms_norm(itemsize: int, N: int, C: int) -> Count:
    # square and sum 2, scale 1, weight 1
    return Count(4 * N * C, (2 * N + 1) * C * itemsize)


def rms_norm_backward(itemsize: int, N: int, C: int) -> Count:
    # x again to its normal form 1, dy * weight 1, a row sum 2, dx 3, dweight 2; the deviation is read
    return Count(9 * N * C, (3 * N + 2) * C * itemsize + N * FLOAT32)


def add_rms_norm(itemsize: int, N: int, C: int) -> Count:
    return rms_norm(itemsize, N, C) + Count(N * C, 2 * N * C * itemsize)  # as in add_layer_norm


def add_rms_norm_backward(itemsize: int, N: int, C: int) -> Count:
    return rms_norm_backward(itemsize, N, C) + Count(N * C, N * C * itemsize)


def swiglu(itemsize: int, N: int, C: int) -> Count:
    """N rows of 2 C numbers to N of C."""
    # the sigmoid 3, and two products
    return Count(5 * N * C, 3 * N * C * itemsize)


def swiglu_backward(itemsize: int, N: int, C: int) -> Count:
    # the sigmoid again 3, silu 1, its derivative 3, and three products
    return Count(10 * N * C, 5 * N * C * itemsize)


def relu2(itemsize: int, N: int, C: int) -> Count:
    return Count(2 * N * C, 2 * N * C * itemsize)


def relu2_backward(itemsize: int, N: int, C: int) -> Count:
    return Count(3 * N * C, 3 * N * C * itemsize)


def causal_attention(itemsize: int, B: int, T: int, H: int, D: int, Hkv: int | None = None, cached: int = 0) -> Count:
    """Hkv key and value heads (default H); `cached` keys lie before the T queries, and each query sees all of them."""
    # two products of 2 D operations for each pair that is seen; the softmax is not counted, as is the custom
    pairs = T * (T + 1) / 2 + T * cached
    return Count(4 * D * B * H * pairs, 2 * B * (T * H + (T + cached) * (Hkv or H)) * D * itemsize)


def causal_attention_backward(itemsize: int, B: int, T: int, H: int, D: int, Hkv: int | None = None) -> Count:
    # five products where forward has two; q, k, v, out, dout are read, dq, dk, dv written, and each row's log-sum-exp
    forward = causal_attention(itemsize, B, T, H, D, Hkv)
    return Count(2.5 * forward.flops, 4 * B * T * (H + (Hkv or H)) * D * itemsize + B * T * H * FLOAT32)


def linear_cross_entropy(itemsize: int, N: int, C: int, V: int) -> Count:
    return Count(2 * N * C * V, (N + V) * C * itemsize + N * INT64)


def linear_cross_entropy_backward(itemsize: int, N: int, C: int, V: int) -> Count:
    # dx and dweight, each a product as large as forward's; both are written
    return Count(4 * N * C * V, (N + V) * C * itemsize)


def paged_attention(itemsize: int, B: int, context: int, H: int, D: int, shuffled: int) -> Count:
    # one query a sequence; keys and values dominate, and where the pages lie makes no difference to their bytes
    moved = 2 * B * context * H * D + 2 * B * H * D
    return Count(4 * B * context * H * D, moved * itemsize)


def kv_write(itemsize: int, N: int, H: int, D: int) -> Count:
    return Count(0, 4 * N * H * D * itemsize + N * INT64)


def linear_int8(itemsize: int, N: int, C: int, out: int) -> Count:
    return Count(2 * N * C * out, out * C + out * FLOAT32 + N * (C + out) * itemsize)


def linear(itemsize: int, N: int, C: int, out: int, bias: int = 0) -> Count:
    """N rows of C numbers by a matrix (out, C); `bias`: 1 if one is added."""
    return Count(2 * N * C * out + N * out * bias, (N * C + out * C + out * bias + N * out) * itemsize)


def linear_backward(itemsize: int, N: int, C: int, out: int, bias: int = 0) -> Count:
    # dx and dweight, each a product as large as forward's; x, weight and dy are read, dx, dweight and dbias written
    return Count(4 * N * C * out + N * out * bias, (2 * N * C + 2 * out * C + out * bias + N * out) * itemsize)


def activation(itemsize: int, N: int, C: int) -> Count:
    # of GELU in its tanh form: the cubic 5, tanh 1, and the product with x 3
    return Count(9 * N * C, 2 * N * C * itemsize)


def activation_backward(itemsize: int, N: int, C: int) -> Count:
    # tanh again 6, its derivative 2, that of the cubic 4, both terms 4
    return Count(16 * N * C, 3 * N * C * itemsize)


def dropout(itemsize: int, N: int, C: int) -> Count:
    # the mask is written, and kept for backward
    return Count(2 * N * C, (2 * itemsize + BOOL) * N * C)


def dropout_backward(itemsize: int, N: int, C: int) -> Count:
    return Count(N * C, (2 * itemsize + BOOL) * N * C)


def embedding(itemsize: int, N: int, C: int, V: int, positions: int = 0) -> Count:
    """N tokens of a vocabulary of V; `positions`: rows of a table that are added to them."""
    rows = min(N, V) + positions + N
    return Count(N * C if positions else 0, rows * C * itemsize + N * INT64)


def embedding_backward(itemsize: int, N: int, C: int, V: int, positions: int = 0) -> Count:
    # dy is added to the rows of its tokens, which the output layer's gradient fills already, and to those of positions
    rows = N + 2 * min(N, V) + positions
    return Count(N * C * (2 if positions else 1), rows * C * itemsize + N * INT64)


def gradient_norm(itemsize: int, P: int) -> Count:
    """The norm of P gradients, before clipping, which most steps do not need."""
    return Count(2 * P, P * itemsize)


def adamw(itemsize: int, P: int) -> Count:
    """One update of P weights: weight, gradient and two moments are read, all but the gradient written."""
    # decay 1, the moments 3 and 4, bias corrections 2, root, epsilon and quotient 3, the update 2
    return Count(15 * P, 7 * P * itemsize)


def muon(itemsize: int, P: int, products: int) -> Count:
    """One update of P weights in matrices: weight, gradient and momentum are read, weight and momentum written.

    Args:
        products: operations of the products that orthogonalize.
    """
    # momentum 3, Nesterov's step 3, norms 2, scaling 1, decay 1, the update 2
    return Count(12 * P + products, 5 * P * itemsize)


COUNTS = {
    ("layer_norm", "forward"): layer_norm,
    ("layer_norm", "backward"): layer_norm_backward,
    ("add_layer_norm", "forward"): add_layer_norm,
    ("add_layer_norm", "backward"): add_layer_norm_backward,
    ("rms_norm", "forward"): rms_norm,
    ("rms_norm", "backward"): rms_norm_backward,
    ("add_rms_norm", "forward"): add_rms_norm,
    ("add_rms_norm", "backward"): add_rms_norm_backward,
    ("swiglu", "forward"): swiglu,
    ("swiglu", "backward"): swiglu_backward,
    ("relu2", "forward"): relu2,
    ("relu2", "backward"): relu2_backward,
    ("causal_attention", "forward"): causal_attention,
    ("causal_attention", "backward"): causal_attention_backward,
    ("linear_cross_entropy", "forward"): linear_cross_entropy,
    ("linear_cross_entropy", "backward"): linear_cross_entropy_backward,
    ("paged_attention", "forward"): paged_attention,
    ("kv_write", "forward"): kv_write,
    ("linear_int8", "forward"): linear_int8,
    ("linear", "forward"): linear,
    ("linear", "backward"): linear_backward,
    ("activation", "forward"): activation,
    ("activation", "backward"): activation_backward,
    ("dropout", "forward"): dropout,
    ("dropout", "backward"): dropout_backward,
    ("embedding", "forward"): embedding,
    ("embedding", "backward"): embedding_backward,
    ("gradient_norm", "forward"): gradient_norm,
    ("adamw", "forward"): adamw,
    ("muon", "forward"): muon,
}
