"""One of the processes in which a stage is trained on two ranks: python -m llmtk.testing.worker SPEC.json"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

from llmtk.errors import LlmtkError, located
from llmtk.testing.trial import Trial, find


def main(spec: dict[str, Any]) -> None:
    """Train as the specification says."""
    stage = spec["stage"] if isinstance(spec["stage"], str) else find(*spec["stage"])
    folder = Path(spec["folder"])
    trial = Trial(stage, folder.parent, options=spec["options"], rows=spec["rows"])
    with contextlib.redirect_stdout(io.StringIO()):
        trial.run(folder=folder, **spec["train"]).train()


if __name__ == "__main__":
    try:
        main(json.loads(Path(sys.argv[1]).read_text()))
    except Exception as error:
        sys.exit(f"llmtk-check: {error if isinstance(error, LlmtkError) else located(error)}")
