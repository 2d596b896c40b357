"""What loading a Vim and loading a Mamba-ND have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mq_ao.errors import MqAoError
from mq_ao.models.checkpoint import read_file, read_weights
from mq_ao.models.config_json import read_json
from mq_ao.models.layouts import own_config
from mq_ao.models.weights import fitted

_Model = TypeVar("_Model", bound=nn.Module)


def load_vision(
    kind: type[_Model],
    model_type: str,
    config_type: type[Any],
    path: Path,
    described: Callable[[dict[str, Tensor]], tuple[Any, Mapping[str, Tensor]]],
    given: Mapping[str, object],
) -> _Model:
    """Loads a model in float32, in evaluation mode.

    Args:
        kind: the model's class.
        model_type: its `model_type` in the config.json of our own layout.
        config_type: class of its configuration.
        path: a folder that `save_pretrained` wrote, or a file with the weights of a public checkpoint.
        described: the configuration of a public checkpoint, and its weights by the model's names.
        given: what a public checkpoint does not tell, None where it was not given.

    Raises:
        MqAoError: there is no such path, it is another kind of model, or its weights are missing, extra, of another
            shape, not finite, or cannot be read.
    """
    if not path.exists():
        raise MqAoError(f"there is no file or folder {path}: check the path.")
    try:
        if path.is_file():
            return _build(kind, *described(read_file(path)))
        if any(value is not None for value in given.values()):
            raise MqAoError(f"its config.json has {' and '.join(given)}: do not give them.")
        values = read_json(path / "config.json")
        if (family := values.get("model_type")) != model_type:
            raise MqAoError(f'model_type is {family!r}, and a {kind.__name__}\'s is "{model_type}".')
        return _build(kind, own_config(values, config_type), read_weights(path))
    except MqAoError as error:
        raise MqAoError(f"{path} cannot be loaded: {error}") from error


def telling(weights: Mapping[str, Tensor], names: list[str], model: str) -> list[Tensor]:
    """The weights whose shapes tell a public checkpoint's configuration.

    Raises:
        MqAoError: some are missing.
    """
    if missing := [name for name in names if name not in weights]:
        raise MqAoError(f"{', '.join(missing)} missing: is it a {model} of the public layout?")
    return [weights[name] for name in names]


def mixer_shape(weights: Mapping[str, Tensor], d_model: int, model: str) -> dict[str, Any]:
    """n_layer and the fields of a Mamba-1 mixer, from weights under `layers.N.mixer` with the names of mamba_ssm.

    Raises:
        MqAoError: the first block has no such mixer.
    """
    first = "layers.0.mixer."
    a_log, taps, dt_proj = telling(
        weights, [first + name for name in ("A_log", "conv1d.weight", "dt_proj.weight")], model
    )
    return {
        "n_layer": 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("layers.")),
        "d_state": a_log.shape[1],
        "d_conv": taps.shape[-1],
        "expand": a_log.shape[0] // d_model,
        "dt_rank": dt_proj.shape[1],
        "bias": first + "in_proj.bias" in weights,
        "conv_bias": first + "conv1d.bias" in weights,
    }


def _build(kind: type[_Model], config: Any, weights: Mapping[str, Tensor]) -> _Model:
    with torch.device("meta"):
        model = kind(config)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    model.load_state_dict(fitted(weights, expected), assign=True)
    return model.eval()
