"""ExecuTorch's own export session with recipes of ours."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from mq_ao import MqAoError, api
from tests.test_capture_transformers import VOCAB, build

pytest.importorskip("executorch", reason='needs pip install "mq-ao[executorch]"')

from executorch.export import ExportRecipe
from executorch.export import export as export_session
from executorch.runtime import Runtime

from mq_ao.integrations.executorch_recipes import MambaRecipe, captured
from mq_ao.ops.native import executorch_build

BATCHES = [(torch.randint(1, VOCAB, (2, 16), generator=torch.Generator().manual_seed(seed)),) for seed in (1, 2)]


def logits_alone(model: nn.Module) -> nn.Module:
    """ExecuTorch takes no output objects apart."""

    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.model(ids, use_cache=False).logits

    return Alone().eval()


def test_a_model_goes_through_executorchs_own_session(tmp_path: Path) -> None:
    model = logits_alone(build("Mamba"))
    recipe = ExportRecipe.get_recipe(MambaRecipe["MAMBAQUANT_W8A8"], calibration=BATCHES)
    session = export_session(captured(model, BATCHES[0]), [BATCHES[0]], recipe)
    session.save_to_pte(str(tmp_path / "small"))
    (path,) = tmp_path.glob("*.pte")
    executorch_build.load()
    method = Runtime.get().load_program(path).load_method("forward")
    (logits,) = method.execute([BATCHES[0][0]])
    simulated = api.quantize(model, BATCHES, "mambaquant-w8a8", backend="executorch").converted(*BATCHES[0])
    # Integers against their simulation in float: values on the border between two integers.
    assert (logits - simulated).norm() < 0.02 * simulated.norm()
    calls = {str(node.target) for node in session.get_edge_program_manager().exported_program().graph.nodes}
    assert any("qselective_scan" in name for name in calls) and any(
        "executorch_call_delegate" in name for name in calls
    )


def test_what_is_refused() -> None:
    with pytest.raises(MqAoError, match="mambaquant-w8a8 needs data"):
        ExportRecipe.get_recipe(MambaRecipe["MAMBAQUANT_W8A8"])
    with pytest.raises(MqAoError, match="group_size: a recipe of mq-ao takes calibration alone"):
        ExportRecipe.get_recipe(MambaRecipe["MAMBAQUANT_W8A8"], calibration=BATCHES, group_size=32)
    with pytest.raises(KeyError):
        MambaRecipe["RTN_W2A2"]
