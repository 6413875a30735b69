"""Random generators: one for each purpose, all of them kept in checkpoints, none touched by evaluating or saving.

Dropout draws from torch's global generators; everything else asks for a generator of its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Randomness:
    """The generators of one rank."""

    def __init__(self, seed: int, rank: int) -> None:
        self._seed = seed
        self._generators: dict[str, torch.Generator] = {}
        seed_globals(seed + rank)

    def generator(self, purpose: str) -> torch.Generator:
        """Return the purpose's own generator, on the CPU, equal on all ranks."""
        if purpose not in self._generators:
            self._generators[purpose] = torch.Generator().manual_seed(derive(self._seed, purpose))
        return self._generators[purpose]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return (tensors, JSON) of all generators."""
        tensors = {f"generator/{name}": g.get_state() for name, g in self._generators.items()}
        tensors["torch"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["cuda"] = torch.cuda.get_rng_state()
        legacy: Any = np.random.get_state(legacy=True)
        name, keys, position, has_gauss, gauss = legacy
        version, words, normal = random.getstate()
        return tensors, {
            "python": [version, list(words), normal],
            "numpy": [name, keys.tolist(), position, has_gauss, gauss],
        }

    def restore(self, tensors: Mapping[str, Tensor], json: Mapping[str, Any]) -> None:
        """Put all generators back to what `state` gave; one that was not in use then starts anew."""
        kept = {
            name.removeprefix("generator/"): state for name, state in tensors.items() if name.startswith("generator/")
        }
        self._generators = {name: generator for name, generator in self._generators.items() if name in kept}
        for name, state in kept.items():
            self.generator(name).set_state(state)
        torch.set_rng_state(tensors["torch"])
        if "cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["cuda"])
        version, words, normal = json["python"]
        random.setstate((version, tuple(words), normal))
        name, keys, position, has_gauss, gauss = json["numpy"]
        np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))

    @contextlib.contextmanager
    def aside(self, purpose: str) -> Iterator[None]:
        """Do something with fresh generators of its own, and leave all of the run's as they were."""
        tensors, json = self.state()
        generators, self._generators = self._generators, {}
        seed, self._seed = self._seed, derive(self._seed, purpose)
        seed_globals(self._seed)
        try:
            yield
        finally:
            self._seed, self._generators = seed, generators
            self.restore(tensors, json)


def derive(seed: int, purpose: str) -> int:
    """Return a seed for a purpose, well apart from that of any other."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def seed_globals(seed: int) -> None:
    """Seed the global generators of Python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
