"""Engines: the one that the core brings, which writes with the policy itself, and those of other distributions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from llmtk.errors import PluginError
from llmtk.generation import generate
from llmtk.generation.graphs import on_cuda
from llmtk.generation.proof import why_not_packed
from llmtk.host import discovery

if TYPE_CHECKING:
    from llmtk.config.sections import GenerationConfig
    from llmtk.generation import Engine
    from llmtk.generation.completions import Completion
    from llmtk.generation.graphs import Record
    from llmtk.generation.jobs import Together
    from llmtk.generation.sampling import Sampling
    from llmtk.run import Run


BUILTIN = "builtin"


def check_engine(config: GenerationConfig) -> None:
    """Check that the engine is there, without importing it. PluginError where it is not, or is for another core."""
    if config.engine == BUILTIN:
        return
    try:
        discovery.find(discovery.GENERATORS, config.engine)
    except PluginError as error:
        raise PluginError(f"generation.engine: {error}") from error


def engine_of(run: Run) -> Engine:
    """Return the engine that the configuration names. PluginError for one that is not installed, or is none."""
    config = run.config.generation
    if config.engine == BUILTIN:
        return BuiltinEngine(run)
    offer = discovery.find(discovery.GENERATORS, config.engine)
    make: Any = discovery.load(offer)
    engine = make(run, config.options)
    if not callable(getattr(engine, "generate", None)):
        raise PluginError(
            f"The {offer} gave {type(engine).__name__}, which has no `generate`. See llmtk.generation.Engine"
        )
    return cast("Engine", engine)


class BuiltinEngine:
    """Writes packed where that is proven on the model, else the plain way, which it says.

    On CUDA, packed steps are replayed as graphs where that is proven too.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._way: tuple[bool, Record | None] | None = None

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int] | None = None
    ) -> list[list[Completion]]:
        """Return completions of each prompt, (prompts, n). All ranks must call it together."""
        run = self.run
        together = self._anyone if run.backend.forward_is_collective else None
        # One context around it all: autocast keeps what it has cast until its end, so each weight is cast once.
        with run.backend.autocast():
            if self._way is None:
                self._way = self._find_way(together)
            packed, record = self._way
            return generate(
                run.model,
                prompts,
                sampling,
                seeds,
                packed=packed,
                record=record,
                decode=lambda tokens: str(run.tokenizer.decode(tokens)),
                version=run.step,
                together=together,
            )

    def _find_way(self, together: Together | None) -> tuple[bool, Record | None]:
        """Return whether to write packed, and what records steps, if they are to be replayed."""
        if not self.run.forward.scorers[None].packed:
            return False, None
        record = self._recorder() if together is None else None
        if record is not None and self._is_proven("Generation takes no CUDA graphs", record=record):
            return True, record
        return self._is_proven("Generation takes the plain way", together), None

    def _recorder(self) -> Record | None:
        wanted = self.run.device.type == "cuda" and self.run.config.generation.cuda_graphs
        return on_cuda if wanted else None

    def _is_proven(self, otherwise: str, together: Together | None = None, record: Record | None = None) -> bool:
        why = self.run.first_of_ranks(why_not_packed(self.run.model, together, record))
        if why:
            self.run.notify(f"{otherwise}: {why}")
        return why is None

    def _anyone(self, goes_on: bool) -> bool:
        return any(self.run.gather(goes_on))
