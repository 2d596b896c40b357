"""Mixed precision: the bits of every linear, chosen for a limit of size or loss."""

from __future__ import annotations

from mq_ao.budget.parsing import Budget, Quantity, parse_budget
from mq_ao.budget.search import Candidate, Found, search_budget

__all__ = ["Budget", "Candidate", "Found", "Quantity", "parse_budget", "search_budget"]
