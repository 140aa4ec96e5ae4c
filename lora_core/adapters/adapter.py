"""What an adapter is: the weights of one, and what its products take of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_core.adapters.dropout import key_of


@dataclass
class Adapter:
    """The weights of one adapter: module name -> A `[r, in]` and B `[out, r]`, and the scale of their product. The
    modules stand in the model's order, and each has a rank and a scale of its own.

    `dropout` acts on the input of A, in training only (where a segment has keys). `cast` holds A and B of each module
    in the dtype that the base computes in, kept up to date by whoever changes `a` and `b`; without it they are cast at
    each use. With DoRA, `magnitude` holds m `[out]` of every module, and `norm` the row norms of the whole weight:
    whoever changes `a` and `b` clears it, and it is computed at the next use; its tensors are then written over.

    `residual` is a second adapter that stays as it is and joins in every product, without dropout: PiSSA trains
    `s B A` on the base `W - s B0 A0`, and where W is shared, `- s B0 A0` is the adapter's own.
    """

    scale: dict[str, float]
    a: dict[str, Tensor]
    b: dict[str, Tensor]
    dropout: float = 0.0
    cast: dict[str, tuple[Tensor, Tensor]] | None = None
    residual: Adapter | None = None
    magnitude: dict[str, Tensor] = field(default_factory=dict)
    norm: dict[str, Tensor] = field(init=False, default_factory=dict)
    module_keys: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        self.module_keys = {name: key_of(name) for name in self.a}

    def weights(self, module: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return A and B as the product takes them."""
        if self.cast is not None:
            return self.cast[module]
        return self.a[module].detach().to(dtype), self.b[module].detach().to(dtype)

    def folded(self, module: str) -> tuple[Tensor, Tensor]:
        """Return A and B of a module's whole update with scale 1, in fp32 or wider: the residual's ranks come last."""
        wide = torch.promote_types(self.a[module].dtype, torch.float32)
        a, b = self.a[module].detach().to(wide), self.b[module].detach().to(wide) * self.scale[module]
        if self.residual is None:
            return a, b
        more_a, more_b = self.residual.folded(module)
        return torch.cat([a, more_a]), torch.cat([b, more_b], dim=1)

    def to(self, dtype: torch.dtype) -> Adapter:
        """Return it to be served: A and B in this dtype, without a residual."""
        assert self.residual is None
        a, b = ({name: weight.to(dtype) for name, weight in of.items()} for of in (self.a, self.b))
        cast = Adapter(self.scale, a, b, self.dropout, magnitude=self.magnitude)
        cast.norm.update(self.norm)
        return cast

    @property
    def trained(self) -> list[Tensor]:
        """All A, then all B, then all m."""
        return [*self.a.values(), *self.b.values(), *self.magnitude.values()]

    def dora_scale(self, module: str) -> Tensor:
        """Return DoRA's scale m / norm `[out]` in m's precision: in bf16 it could only be 1, or 0.4 % or more off."""
        return self.magnitude[module].detach() / self.norm[module]
