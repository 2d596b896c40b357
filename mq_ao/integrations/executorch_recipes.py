"""ExecuTorch's export recipes: those of mq-ao, once this module is imported.

```python
from executorch.export import ExportRecipe, export
from mq_ao.integrations.executorch_recipes import MambaRecipe, captured

batches = [(ids,), ...]  # not what the model is evaluated on
recipe = ExportRecipe.get_recipe(MambaRecipe["MAMBAQUANT_W8A8"], calibration=batches)
export(captured(model, (ids,)), [(ids,)], recipe).save_to_pte("small.pte")
```

Such a program has one method, `forward`, of the sizes that are exported, and no states. Those that decode token by
token are made by `mq_ao.quantize(model, batches, backend="executorch").lower()`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from mq_ao.errors import MqAoError
from mq_ao.extras import needs

with needs("the recipes for ExecuTorch", "executorch"):
    from executorch.export import (
        BackendRecipeProvider,
        ExportRecipe,
        LoweringRecipe,
        QuantizationRecipe,
        RecipeType,
        recipe_registry,
    )

from torch import nn
from torch.fx import GraphModule

from mq_ao import passes
from mq_ao.backends import EXECUTORCH
from mq_ao.capture import export
from mq_ao.lowering import executorch
from mq_ao.lowering.executorch.partitioner import StagedPartitioner
from mq_ao.recipes import RECIPES, get_recipe

BACKEND = "mq-ao"


class _Names(RecipeType):
    @classmethod
    def get_backend_name(cls) -> str:
        """As ExecuTorch's registry knows these recipes."""
        return BACKEND


def _fits(name: str) -> bool:
    """Whether ExecuTorch has kernels for a recipe."""
    try:
        get_recipe(name).quantizer(EXECUTORCH.name)
    except MqAoError:
        return False
    return True


MambaRecipe = _Names(
    "MambaRecipe", {name.upper().replace("-", "_"): name for name in RECIPES if _fits(name)}, module=__name__
)
"""Named recipes that ExecuTorch has kernels for: `MambaRecipe["MAMBAQUANT_W8A8"]`."""


class MambaRecipeProvider(BackendRecipeProvider):
    """Makes ExecuTorch's recipes of ours."""

    @property
    def backend_name(self) -> str:
        """See `BackendRecipeProvider`."""
        return BACKEND

    def get_supported_recipes(self) -> Sequence[RecipeType]:
        """See `BackendRecipeProvider`."""
        return list(MambaRecipe)

    def create_recipe(
        self, recipe_type: RecipeType, *, calibration: Iterable[tuple[Any, ...]] = (), **unknown: Any
    ) -> ExportRecipe | None:
        """Rewrites, annotation and kernels of a recipe; None: it is none of these.

        Args:
            recipe_type: one of `MambaRecipe`.
            calibration: the model's positional inputs, batch by batch, for statistics and ranges.
            unknown: nothing else is taken.

        Raises:
            MqAoError: there is no calibration data, or something else is given.
        """
        if recipe_type not in self.get_supported_recipes():
            return None
        if unknown:
            raise MqAoError(f"{', '.join(unknown)}: a recipe of mq-ao takes calibration alone.")
        batches = list(calibration)
        if not batches:
            raise MqAoError(f"{recipe_type.value} needs data: get_recipe(..., calibration=[(input_ids,), ...]).")
        recipe = get_recipe(recipe_type.value)
        quantizer = recipe.quantizer(EXECUTORCH.name)

        def rewritten(graph: GraphModule) -> GraphModule:
            passes.apply(graph, recipe.passes, batches)
            if requests := quantizer.requests(graph):
                quantizer.set_statistics(passes.collect(graph, requests, batches))
            return graph

        return ExportRecipe(
            recipe.name,
            QuantizationRecipe(
                [quantizer],
                calibration_inputs_fn=lambda: batches,
                pre_prepare_passes=[rewritten],
                post_convert_passes=[executorch.rewrite],
            ),
            lowering_recipe=LoweringRecipe([StagedPartitioner()]),
            strict=False,
        )


def captured(model: nn.Module, inputs: tuple[Any, ...]) -> nn.Module:
    """A model as ExecuTorch's `export` is to be given it: with each scan one operator; see `mq_ao.export`."""
    return _Captured(export(model, inputs).module(check_guards=False))


class _Captured(nn.Module):
    """A graph that is no `GraphModule`: those count as quantized."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__()
        self.captured = graph

    def forward(self, *inputs: Any) -> Any:
        return self.captured(*inputs)


recipe_registry.register_backend_recipe_provider(MambaRecipeProvider())
