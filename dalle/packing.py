"""The transformer for drawing: the same model, its matrices stored as the processor reads them fastest.

A step of drawing multiplies a few rows with every weight there is, so what it takes is what reading the weights takes.
oneDNN reads a matrix in blocks of its own order about twice as fast as torch's plain rows; bfloat16 halves the bytes,
int8, by FBGEMM, quarters them. Training changes its weights and multiplies many rows at once: it gains nothing here.
"""

import copy
import warnings
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle.model import DALLE
from dalle.native import Native, attend
from dvae.errors import UserError, warn
from dvae.forecast import fast_bfloat16

PRECISIONS = ("float32", "bfloat16", "int8")  # each faster than those before it, and rougher


class Packed(nn.Module):
    """What a linear layer does, float32 (..., in) -> float32 (..., out), from weights in oneDNN's own order.

    With weights in bfloat16 what enters is rounded to it, too; the products are summed in float32, as under autocast,
    and the sum is rounded once. With `gelu`, its tanh form is taken of what leaves, without another pass over it.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype, gelu: bool = False):
        super().__init__()
        then = ("gelu", [], "tanh") if gelu else ("none", [], "")
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().to(dtype))
        bias = None if linear.bias is None else linear.bias.detach().to(dtype)
        self.multiply, self.others = torch.ops.mkldnn._linear_pointwise.default, (self.weight, bias, *then)

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dtype == x.dtype:  # a step is short, and even conversions that do nothing would tell in it
            return self.multiply(x, *self.others)
        return self.multiply(x.to(self.weight.dtype), *self.others).to(x.dtype)


class Narrow(nn.Module):
    """A linear layer whose weights are in another dtype, (..., in) -> (..., out) in that dtype, as under autocast."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype):
        super().__init__()
        self.register_buffer("weight", linear.weight.detach().to(dtype), persistent=False)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().to(dtype), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


class Int8(nn.Module):
    """A linear layer of whole numbers, float32 (B, ..., in) -> float32 (B, ..., out).

    The weights of each output are -127 to 127 times a number of its own, and so is each state that enters: what comes
    of a state does not depend on those beside it. The products and their sum are exact.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach()
        units = weight.abs().amax(1).clamp_min(1e-20).double() / 127  # (out,)
        zeros = torch.zeros(len(units), dtype=torch.int64)
        with warnings.catch_warnings():  # tensors that know their own units will leave torch one day
            warnings.simplefilter("ignore", UserWarning)
            whole = torch.quantize_per_channel(weight, units, zeros, 0, torch.qint8)
        self.weight = torch.ops.quantized.linear_prepack(whole, None)
        self.bias = torch.zeros(len(units)) if linear.bias is None else linear.bias.detach()
        self.multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default

    def forward(self, x: Tensor) -> Tensor:
        largest = x.abs().amax(-1, keepdim=True)
        # in units of 1 / 127 around 128, as FBGEMM wants them from 0 to 255; a state of zeros gives 0 times something
        product = self.multiply(x / largest, 1 / 127, 128, self.weight)
        return torch.addcmul(self.bias, product, largest)


def packed(model: DALLE, precision: str = "float32") -> DALLE:
    """The model with copies of its matrices, everything else shared: for inference, while its weights stay as they are.

    Args:
        precision: of the matrices inside the blocks: float32, bfloat16, which halves what has to be read, or int8,
            which quarters it and holds the image head, too. On a CPU norms, keys, values and all that leaves a matrix
            stay in float32. See `supported`.
    Raises:
        UserError: it is none of these.
    """
    precision, one_dnn = supported(precision, model), _one_dnn(model)
    if precision == "float32" and not one_dnn:
        return model
    layer = Int8 if precision == "int8" else partial(Packed if one_dnn else Narrow, dtype=getattr(torch, precision))
    copied = shared(model)
    for block in copied.blocks:
        attention, mlp = block.attention, block.mlp
        attention.qkv, attention.out = layer(attention.qkv), layer(attention.out)
        mlp.out = layer(mlp.out)
        if one_dnn and precision != "int8":
            mlp.hidden, mlp.gelu = layer(mlp.hidden, gelu=True), nn.Identity()
        else:
            mlp.hidden = layer(mlp.hidden)
        if one_dnn and (function := attend()) is not None:
            block.attention = Native(attention, function)
    if one_dnn:
        head = layer if precision == "int8" else partial(Packed, dtype=torch.float32)  # a sum in bfloat16 is too rough
        copied.image_head = head(copied.image_head)
    return copied


def shared(model: DALLE) -> DALLE:
    """Another model of the same tensors."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def check_precision(precision: str) -> str:
    """The precision, if it is one of `PRECISIONS`; UserError otherwise."""
    if precision not in PRECISIONS:
        raise UserError(f"precision is {precision!r}", f"give one of {', '.join(PRECISIONS)}")
    return precision


def supported(precision: str, model: DALLE) -> str:
    """The precision, or if the model's device gains nothing by it the next before it, and a warning."""
    check_precision(precision)
    found = [name for name in PRECISIONS[: PRECISIONS.index(precision) + 1] if _has(name, model)][-1]
    if found != precision:
        device = "GPU" if model.start.device.type == "cuda" else model.start.device.type.upper()
        warn(f"this {device} is no faster in {precision}: drawing in {found}", f"--precision {found} is the same")
    return found


def _one_dnn(model: DALLE) -> bool:
    plain = model.start.device.type == "cpu" and model.start.dtype == torch.float32
    return plain and torch.backends.mkldnn.is_available()


def _has(precision: str, model: DALLE) -> bool:
    """Whether the model's device multiplies numbers of this precision, and faster than those of the one before it."""
    device = model.start.device.type
    if precision == "int8":  # FBGEMM's sums overflow without VNNI; other engines of torch have no such product
        fbgemm = torch.backends.quantized.engine in ("x86", "fbgemm")
        return _one_dnn(model) and fbgemm and torch.cpu._is_vnni_supported()
    if precision == "bfloat16" and device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return precision == "float32" or device != "cpu" or fast_bfloat16()
