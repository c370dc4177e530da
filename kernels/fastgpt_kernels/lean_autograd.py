"""RMS normalization, SwiGLU and squared ReLU for eager training, with few passes over memory and few tensors kept.

PyTorch composes them of small operations. Autograd then keeps what each of them reads, and goes over memory once for
each. Here each is one autograd function, computed in the dtype of its input, RMS normalization in float32 for 16 bits:

    RMSNorm   y = x rstd weight              keeps x and rstd = 1 / sqrt(sum(x^2) / C + eps), one number a row
    SwiGLU    y = silu(a) b, with x = [a b]  keeps x, and computes silu(a) again
    ReLU2     y = r^2, with r = max(x, 0)    keeps r, and x is not needed any more

On one core of an Intel Xeon, forward and backward of RMSNorm take a third to a half of the time of F.rms_norm, and of
ReLU2 about half of its composition's. SwiGLU takes about as long as its composition, which keeps silu(a) too: half as
much again. Without gradients a composition is as fast and keeps nothing, and in compiled code it becomes one loop.

There are no second derivatives. Offered here: `RMSNorm`, `SwiGLU`, `ReLU2`.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


class RMSNorm(torch.autograd.Function):
    """(x (..., C), weight (C,) or None, eps) -> (..., C)."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rstd)
        y = wide * rstd
        return (y if weight is None else y.mul_(weight)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        """That of LayerNorm with a mean of zero, which subtracts the mean of g = dy * weight; so it is added again."""
        x, weight, rstd = ctx.saved_tensors
        wide, dy = x.to(rstd.dtype), grads[0].to(rstd.dtype)
        gain = None if weight is None else weight.to(rstd.dtype)
        mean_g = dy.mean(-1, keepdim=True) if gain is None else (dy @ gain)[..., None].div_(x.shape[-1])
        dx, dweight, _ = torch.ops.aten.native_layer_norm_backward(
            dy, wide, x.shape[-1:], torch.zeros_like(rstd), rstd, gain, None, [True, gain is not None, False]
        )
        dx = dx.add_(mean_g.mul_(rstd)).to(x.dtype)
        return dx, None if weight is None else dweight.to(weight.dtype), None


class SwiGLU(torch.autograd.Function):
    """(..., 2 I) -> (..., I)."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        a, b = x.chunk(2, -1)
        return F.silu(a).mul_(b)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        (x,), dy = ctx.saved_tensors, grads[0]
        a, b = x.chunk(2, -1)
        dx = torch.empty_like(x)
        da, db = dx.chunk(2, -1)
        torch.mul(dy, F.silu(a), out=db)
        torch.mul(dy, b, out=da)
        torch.ops.aten.silu_backward.grad_input(da, a, grad_input=da)
        return dx


class ReLU2(torch.autograd.Function):
    """Elementwise."""

    @staticmethod
    def forward(ctx, x):
        r = F.relu(x)
        ctx.save_for_backward(r)
        return r.square()

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        (r,) = ctx.saved_tensors
        return torch.addcmul(r.new_zeros(()), grads[0], r, value=2)  # 2 dy r in one pass
