"""Training with quantization in the loop: the same roles and rewrites as after training, with gradients."""

from __future__ import annotations

from mq_ao.training.trainable import TrainableModel

__all__ = ["TrainableModel"]
