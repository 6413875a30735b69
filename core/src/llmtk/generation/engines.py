"""Engines: the one that the core brings, which writes with the policy itself, and those of other distributions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from llmtk.errors import PluginError
from llmtk.generation import generate
from llmtk.generation.proof import why_not_packed
from llmtk.host import discovery

if TYPE_CHECKING:
    from llmtk.config.sections import GenerationConfig
    from llmtk.generation import Engine
    from llmtk.generation.completions import Completion
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
    """Writes packed where that is proven on the model, else the plain way, which it says."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._packed: bool | None = None

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int] | None = None
    ) -> list[list[Completion]]:
        """Return completions of each prompt, (prompts, n). All ranks must call it together."""
        run = self.run
        together = self._anyone if run.backend.forward_is_collective else None
        # One context around it all: autocast keeps what it has cast until its end, so each weight is cast once.
        with run.backend.autocast():
            return generate(
                run.model,
                prompts,
                sampling,
                seeds,
                packed=self._is_packed(together),
                decode=lambda tokens: str(run.tokenizer.decode(tokens)),
                version=run.step,
                together=together,
            )

    def _is_packed(self, together: Together | None) -> bool:
        if self._packed is None:
            run = self.run
            why = None
            if run.forward.scorers[None].packed:
                why = run.first_of_ranks(why_not_packed(run.model, together))
                if why:
                    run.notify(f"Generation takes the plain way: {why}")
            self._packed = run.forward.scorers[None].packed and why is None
        return self._packed

    def _anyone(self, goes_on: bool) -> bool:
        return any(self.run.gather(goes_on))
