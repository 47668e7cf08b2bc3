"""The transformer for drawing: the same model, its matrices stored as the processor reads them fastest.

A step of drawing multiplies a few rows with every weight there is, so what it takes is what reading the weights takes.
oneDNN reads a matrix in blocks of its own order about twice as fast as torch's plain rows, and bfloat16 halves the
bytes. Training changes its weights and multiplies many rows at once: it gains nothing here.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle.model import DALLE
from dvae.errors import UserError, warn
from dvae.forecast import fast_bfloat16

PRECISIONS = ("float32", "bfloat16")


class Packed(nn.Module):
    """What a linear layer does, float32 (..., in) -> float32 (..., out), from weights in oneDNN's own order.

    With weights in bfloat16 what enters is rounded to it, too; the products are summed in float32, as under autocast,
    and the sum is rounded once. With `gelu`, its tanh form is taken of what leaves, without another pass over it.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype, gelu: bool = False):
        super().__init__()
        self.then = ("gelu", [], "tanh") if gelu else ("none", [], "")
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().to(dtype))
        self.bias = None if linear.bias is None else linear.bias.detach().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        product = torch.ops.mkldnn._linear_pointwise(x.to(self.weight.dtype), self.weight, self.bias, *self.then)
        return product.to(x.dtype)


class Narrow(nn.Module):
    """A linear layer whose weights are in another dtype, (..., in) -> (..., out) in that dtype, as under autocast."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype):
        super().__init__()
        self.register_buffer("weight", linear.weight.detach().to(dtype), persistent=False)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().to(dtype), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


def packed(model: DALLE, precision: str = "float32") -> DALLE:
    """The model with copies of its matrices, everything else shared: for inference, while its weights stay as they are.

    Args:
        precision: of the matrices inside the blocks: float32, or bfloat16, which halves what has to be read; the states
            between the blocks, norms and logits stay in float32. Where the machine has no such products it is float32
            again, and a warning.
    Raises:
        UserError: it is neither.
    """
    check_precision(precision)
    kind = model.start.device.type
    if precision == "bfloat16" and not _has_bfloat16(kind):
        warn(f"this {kind} multiplies no bfloat16: drawing in float32", "leave --precision out")
        precision = "float32"
    one_dnn = kind == "cpu" and model.start.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    if precision == "float32" and not one_dnn:
        return model
    layer, dtype = Packed if one_dnn else Narrow, getattr(torch, precision)
    copied = shared(model)
    for block in copied.blocks:
        attention, mlp = block.attention, block.mlp
        attention.qkv, attention.out = layer(attention.qkv, dtype), layer(attention.out, dtype)
        mlp.out = layer(mlp.out, dtype)
        if one_dnn:
            mlp.hidden, mlp.gelu = Packed(mlp.hidden, dtype, gelu=True), nn.Identity()
        else:
            mlp.hidden = Narrow(mlp.hidden, dtype)
    if one_dnn:
        copied.image_head = Packed(copied.image_head, torch.float32)
    return copied


def shared(model: DALLE) -> DALLE:
    """Another model of the same tensors."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def check_precision(precision: str) -> str:
    """The precision, if it is one of `PRECISIONS`; UserError otherwise."""
    if precision not in PRECISIONS:
        raise UserError(f"precision is {precision!r}", f"give one of {', '.join(PRECISIONS)}")
    return precision


def _has_bfloat16(kind: str) -> bool:
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return kind != "cpu" or fast_bfloat16()
