"""Per-resblock gradient scaling: float16 gradients that do not vanish in a deep transformer (section 2.4 of the paper).

The gradients of activations shrink from the first branch to the last one by more than the exponents of float16 span, so
no single loss scale fits them all. Here each branch, an attention or an MLP with the norm before it, has a scale of its
own: inside it gradients are that many times as large, outside they are what they are, in float32.

Knows tensors and the rules of the scales; neither the model nor what trains it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def scaled(branch: Callable[[Tensor], Tensor], x: Tensor, scale: float | None) -> Tensor:
    """`branch(x)` in the dtype of x; on the way back the branch sees gradients times `scale`.

    So do its parameters: `BlockScales.unscale` divides theirs before they are used. The gradient that reaches x is
    without the scale, and 0 where it is not finite, so that an overflow in one branch stays in it. Products and
    quotients are taken in the dtype of x, not in the autocast's 16 bits. Without a scale this is `branch(x)`.
    """
    if scale is None:
        return branch(x)
    inside = x.view_as(x)  # the identity path keeps a gradient of its own
    inside.register_hook(lambda gradient: gradient.nan_to_num(0.0, 0.0, 0.0) / scale)
    y = branch(inside).to(x.dtype)
    y.register_hook(lambda gradient: gradient * scale)
    return y


class BlockScales:
    """The scale of every branch, and how it follows what overflows. The rules are the paper's:

    | rule                                                              | value            |
    |-------------------------------------------------------------------|------------------|
    | start                                                             | M 2^13           |
    | after an update in which the gradient of the branch is finite     | times 2^(1/1000) |
    | after one in which it is not, and which therefore moves no weight | divided by 2^0.5 |
    | updates from one division of a scale to the next, at the least    | 125              |
    | range                                                             | M 2^7 to M 2^24  |

    The paper divides the loss of each of its M processes by the global batch. Here a process divides by its own batch
    and the average over processes is taken after the backward pass, but the loss is also divided by the number of
    batches that are accumulated: M is that number, and what float16 sees is as in the paper.

    Args:
        count: branches.
        parts: M, by what the mean loss of a batch is divided before it goes backward.

    Attributes:
        values: the scales, in the order of the branches.
        updates, skipped: updates so far, and those among them that moved no weight.
    """

    def __init__(self, count: int, parts: int = 1):
        self.low, self.high = parts * 2.0**7, parts * 2.0**24
        self.values = [parts * 2.0**13] * count
        self.rested = [125] * count  # updates since the last division, as if it were long ago
        self.updates = self.skipped = 0

    @torch.no_grad()
    def unscale(self, branches: Sequence[Sequence[nn.Parameter]], reduce: Callable[[Tensor], Tensor]) -> bool:
        """Divide the gradients of each branch's parameters by its scale, move the scales, and say whether to skip.

        A gradient that is not finite is taken away, unless the scale is the smallest one: then the scale is not to
        blame, and the gradient stays for the caller to see.

        Args:
            branches: the parameters of each branch.
            reduce: the largest values over all processes, which must decide alike.
        """
        for scale, parameters in zip(self.values, branches, strict=True):
            for parameter in parameters:
                parameter.grad /= scale
        norms = [nn.utils.get_total_norm([parameter.grad for parameter in parameters]) for parameters in branches]
        overflows = reduce((~torch.stack(norms).isfinite()).float()).tolist()
        for overflow, scale, parameters in zip(overflows, self.values, branches, strict=True):
            if overflow and scale > self.low:
                for parameter in parameters:
                    parameter.grad = None
        self.move(overflows)
        return any(overflows)

    def move(self, overflows: Sequence[float]) -> None:
        """Let an update pass in which the branches that `overflows` marks had a gradient that is not finite."""
        self.updates, self.skipped = self.updates + 1, self.skipped + any(overflows)
        for branch, overflow in enumerate(overflows):
            self.rested[branch] += 1
            factor = 1.0 if overflow else 2 ** (1 / 1000)
            if overflow and self.rested[branch] >= 125:
                factor, self.rested[branch] = 2**-0.5, 0
            self.values[branch] = min(max(self.values[branch] * factor, self.low), self.high)

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("values", "rested", "updates", "skipped")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
