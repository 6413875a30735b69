"""Peak memory of scoring, forward and backward: packed with the fused head, beside transformers' logits and their loss.

    python tests/benchmarks/memory.py [--tokens 512 1024 2048 4096]

A small trunk, so that the head is what counts, in sequences of 512 tokens, none of them padding, under bfloat16
autocast; each case in a fresh process. Printed is what the tokens cost: a case's peak less that of 16 tokens, which has
the weights, their gradients and the libraries too. transformers holds several copies of tokens x vocabulary logits;
packed scoring a tile of logits of one size, whatever the vocabulary, and the targets' hidden states. The rest of its
growth is the trunk's, which is about the same in both.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

Loss = Callable[[Any], Any]
"""The loss (a scalar) of token ids (rows, length)."""

VOCABULARIES = (49_152, 151_936)
LENGTH = 512
FEW = 16
"""Tokens of the case that the others are compared with."""


def main() -> None:
    """Measure all cases, and print a table for each vocabulary."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048, 4096], help="multiples of 512")
    parser.add_argument("--case", nargs=3, metavar=("WAY", "VOCABULARY", "TOKENS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        way, vocabulary, tokens = options.case
        print(peak(way, int(vocabulary), int(tokens)))
        return
    for vocabulary in VOCABULARIES:
        print_table(vocabulary, options.tokens)


def print_table(vocabulary: int, sizes: list[int]) -> None:
    """Print what so many tokens cost in each way, in MiB."""
    least = {way: measure(way, vocabulary, FEW) for way in WAYS}
    print(f"\nvocabulary {vocabulary:,}: MiB over the peak of {FEW} tokens")
    print(f"  {'tokens':>8}" + "".join(f"{way:>28}" for way in WAYS) + f"{'one copy of all logits':>28}", flush=True)
    for tokens in sizes:
        cost = {way: measure(way, vocabulary, tokens) - least[way] for way in WAYS}
        copy = tokens * vocabulary * 4 / 2**20
        print(f"  {tokens:8,}" + "".join(f"{mib:28,.0f}" for mib in (*cost.values(), copy)), flush=True)


def measure(way: str, vocabulary: int, tokens: int) -> float:
    """Return the peak of a case in MiB, from a fresh process."""
    command = [sys.executable, __file__, "--case", way, str(vocabulary), str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{way}, vocabulary {vocabulary}, {tokens} tokens failed:\n{done.stderr[-4000:]}")
    return float(done.stdout.splitlines()[-1])


def peak(way: str, vocabulary: int, tokens: int) -> float:
    """Score random tokens forward and backward in this process; return its peak in MiB."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    ids = torch.randint(vocabulary, (max(1, tokens // LENGTH), min(tokens, LENGTH)))
    loss = WAYS[way](model)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(ids)
    value.backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def by_transformers(model: Any) -> Loss:
    """Compute the loss from all logits, as transformers does."""
    return lambda ids: model(input_ids=ids, labels=ids, use_cache=False).loss


def packed(model: Any, every: int = 1) -> Loss:
    """Compute the loss of one target in `every` tokens, by packed scoring."""
    from llmtk import Batch, Group, Sequence
    from llmtk.scoring import choose

    scorer = choose(model, lambda value: [value])
    assert scorer.packed, scorer.why_padded

    def loss(ids: Any) -> Any:
        targets = [place > 0 and place % every == every - 1 for place in range(ids.shape[1])]
        batch = Batch.collate([Group([Sequence(row, targets)], {"tokens": sum(targets)}) for row in ids])
        return -scorer.score(model, batch).logps.mean()

    return loss


WAYS: dict[str, Callable[[Any], Loss]] = {
    "packed, a quarter targets": partial(packed, every=4),
    "packed, all targets": packed,
    "transformers": by_transformers,
}


if __name__ == "__main__":
    main()
