"""The conformance kit: does a stage keep the contract?

    from llmtk.testing import check_stage

    def test_it_conforms():
        check_stage("kto")

`llmtk check kto` does the same and prints a table. `CHECKS` names the checks; each tells what it found and what to do.
"""

from __future__ import annotations

from llmtk.testing import checks, training  # they register what they check
from llmtk.testing.conformance import CHECKS, ConformanceError, Outcome, Verdict, check_stage, outcomes

__all__ = ["CHECKS", "ConformanceError", "Outcome", "Verdict", "check_stage", "checks", "outcomes", "training"]
