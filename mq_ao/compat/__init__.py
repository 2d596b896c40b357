"""Every private name of PyTorch, Triton and ExecuTorch that this package uses: one file a purpose, with the reason.

Nothing else imports such names; `tests/test_compat.py` checks that, and that what is here does what is counted on. The
versions in `constraints.txt` are those that it was checked with; `pyproject.toml` admits no later minor version of
these packages, since such names come and go with them.
"""
