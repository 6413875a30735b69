"""kto beside TRL 1.16.0 on the same log-probs: its losses, gradients and metrics, to 1e-6.

    python tests/parity/kto.py

TRL's trainer computes its loss, with a model that answers given log-probs; so does the stage. Both get the same KL:
there the two differ by choice. TRL shifts completions by one among the rows of a device's micro-batch as they stand in
the data, and averages the ranks' means; we draw a derangement of the whole window's, on all ranks, which no cut and no
order of the window changes. TRL runs in the environment that the benchmarks use (.venv-trl, made on the first call;
without it the comparison is skipped).
"""

from __future__ import annotations

import sys
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

from peer import answered, ask, difference

NEAR = 1e-6
ROWS, TOKENS = 7, 5

Case = dict[str, Any]
Answer = dict[str, Any]


def main() -> None:
    """Compare all cases, and print the largest distances; exit code 1 where one is too large."""
    if answered(lambda cases: [trl(case) for case in cases]):
        return
    cases = make_cases()
    theirs = ask(__file__, cases)
    distances = [compare(llmtk(case), answer) for case, answer in zip(cases, theirs, strict=True)]
    for case, distance in zip(cases, distances, strict=True):
        said = f"beta {case['beta']}, weights {case['weights']}, KL {case['kl']:+.1f}, labels {case['labels']}"
        print(f"{case['loss']:18} {said}: {distance:.1e}")
    if max(distances) > NEAR:
        sys.exit(f"off by {max(distances):.1e}, more than {NEAR:.0e}")
    print(f"kto: {len(cases)} cases agree with TRL's to {max(distances):.1e}")


def make_cases() -> list[Case]:
    """Return log-probs and settings: both losses, a KL over and under zero, both labels and each alone."""
    import torch

    generator = torch.Generator().manual_seed(0)
    labels = {"mixed": [True, False, True, True, False, True, False], "good": [True] * ROWS, "bad": [False] * ROWS}
    return [
        {
            "loss": loss,
            "beta": beta,
            "weights": weights,
            "kl": kl,
            "labels": name,
            "label": labels[name],
            "logps": (-3 * torch.rand(ROWS, TOKENS, generator=generator)).tolist(),
            "reference": (-3 * torch.rand(ROWS, TOKENS, generator=generator)).sum(-1).tolist(),
        }
        for loss in ("kto", "apo_zero_unpaired")
        for beta, weights in ((0.1, (1.0, 1.0)), (2.0, (1.3, 0.7)))
        for kl in (1.5, -0.5)
        for name in labels
    ]


def llmtk(case: Case) -> Answer:
    """Compute the stage's loss, gradient by the tokens' log-probs, and metrics."""
    import torch
    from llmtk_stage_kto import KahnemanTverskyOptimization

    from llmtk import Batch, Group, Scores, Sequence

    good, bad = case["weights"]
    stage = KahnemanTverskyOptimization(
        KahnemanTverskyOptimization.Options(
            loss=case["loss"], beta=case["beta"], desirable_weight=good, undesirable_weight=bad
        )
    )
    logps = torch.tensor(case["logps"], dtype=torch.float64, requires_grad=True)
    label = torch.tensor(case["label"])
    count = {True: int(label.sum()), False: int((~label).sum())}
    # The reference's log-prob of an answer stands at its first token, so that the sum is the case's.
    reference = torch.zeros(ROWS, TOKENS, dtype=torch.float64)
    reference[:, 0] = torch.tensor(case["reference"], dtype=torch.float64)
    answer = Sequence([0] * (TOKENS + 1), [False] + [True] * TOKENS)
    batch = Batch.collate([Group([answer], {"rows": 1})] * ROWS).with_columns(
        per_group={
            "desirable": label,
            "kl": torch.full((ROWS,), max(case["kl"], 0.0) if case["loss"] == "kto" else 0.0),
            "margin_weight": torch.tensor(
                [(1 if row else -1) * ROWS / count[row] if all(count.values()) else 0.0 for row in case["label"]]
            ),
        },
        per_target={"reference_logps": reference.flatten()},
    )
    run: Any = SimpleNamespace(score=lambda batch: Scores(batch, logps.flatten()))
    output = stage.compute_loss(run, batch)
    loss = output.terms["loss"].sum / float(batch.weights["rows"].sum())
    loss.backward()
    means = {name: float(mean.sum) / float(mean.count) for name, mean in output.metrics.items() if float(mean.count)}
    assert logps.grad is not None
    return {"loss": float(loss.detach()), "gradient": logps.grad.tolist(), "metrics": means}


def trl(case: Case) -> Answer:
    """Compute TRL's, in its own environment: its trainer's method, with a model that answers what is given."""
    import torch
    from trl import KTOTrainer

    logps = torch.tensor(case["logps"], dtype=torch.float64, requires_grad=True)
    ids = torch.zeros(ROWS, TOKENS + 1, dtype=torch.int64)
    mask = torch.ones_like(ids)
    mask[:, 0] = 0

    def model(**_: Any) -> Any:
        return SimpleNamespace(log_probs=logps, entropy=torch.zeros_like(logps), mean_logits=torch.zeros_like(logps))

    model.training = True  # type: ignore[attr-defined]
    trainer = SimpleNamespace(
        model=model,
        accelerator=SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda value: value),
        _compute_kl_logps=lambda model, batch: torch.full((ROWS,), case["kl"]),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        calculate_KL=case["loss"] == "kto",
        loss_type=case["loss"],
        beta=case["beta"],
        desirable_weight=case["weights"][0],
        undesirable_weight=case["weights"][1],
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask}
    batch |= {"label": torch.tensor(case["label"]), "ref_logps": torch.tensor(case["reference"], dtype=torch.float64)}
    batch |= {"ref_KL_logps": torch.zeros(ROWS)}
    loss = KTOTrainer._compute_loss(trainer, model, batch, False)
    loss.backward()
    assert logps.grad is not None
    means = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return {"loss": float(loss.detach()), "gradient": logps.grad.tolist(), "metrics": means}


def compare(ours: Answer, theirs: Answer) -> float:
    """Return the largest distance, relative to the numbers where they are over 1. Both must have the same metrics."""
    names = {"rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"}
    assert names & ours["metrics"].keys() == names & theirs["metrics"].keys()
    compared = {name: ours["metrics"][name] for name in names & ours["metrics"].keys()}
    return max(
        difference(ours["loss"], theirs["loss"]),
        difference(compared, theirs["metrics"]),
        difference(ours["gradient"], theirs["gradient"]),
    )


if __name__ == "__main__":
    main()
