"""What libraries say to their developers is kept from the users of our commands."""

from __future__ import annotations

import logging
import os
import warnings


def quiet_libraries() -> None:
    """Silences import messages and deprecation warnings; to be called before torch is imported."""
    # They tell of CUDA binaries that are not loaded, and of deprecations inside torchao.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it names kernels that its models would be faster with
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # ours say what takes long
    for category in (FutureWarning, DeprecationWarning):
        warnings.simplefilter("ignore", category)
