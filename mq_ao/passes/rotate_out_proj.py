"""R2: rotates out_proj's input at run time."""

from __future__ import annotations

from dataclasses import dataclass

from mq_ao.passes.base import Pass, Rewrite


@dataclass(frozen=True)
class RotateOutProj(Pass):
    """x_o <- x_o H, W_o <- W_o H, with a fast transform at run time (docs/method.md, R2)."""

    name = "rotate_out_proj"
    step = "R2"

    def apply(self, rewrite: Rewrite) -> None:
        """Rotates every block's out_proj input; a width without a Hadamard matrix is left as it is."""
        for block in rewrite.blocks:
            with self.where_suitable(rewrite, block.name):
                matrix = rewrite.rotate_input(block.out_proj, block.out_input)
                rewrite.rotate_columns(block.out_proj, matrix)
                self.note(rewrite, block.name, f"fast transform of {len(matrix)} channels")
