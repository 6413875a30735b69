"""The losses of dpo, ipo, cpo, simpo and orpo beside those of TRL 1.16.0, on the same log-probs of tokens.

    python tests/parity/preferences.py

Each stage makes its batch and its loss as in a run, only that the log-probs are given; TRL's own methods make its loss,
in the environment that the benchmarks use (.venv-trl, made on the first call; without it the comparison is skipped).
Compared, to 1e-6: the mean loss over the pairs, and its gradient by the log-prob of each token.

Where llmtk differs by choice, and what is compared instead:
- `dpo.loss: sigmoid` honours label smoothing (conservative DPO), TRL's does not: compared without.
- `aot` and `aot_unpaired` sort (stably) over the optimizer's window, TRL over a micro-batch: compared with one.
- A token mean (`sft`, the NLL of cpo and orpo) is over the window, TRL's over a micro-batch: compared with one. The NLL
  of TRL's cpo and orpo is made of logits within its forward pass and is not compared here.
- `simpo` is a stage of its own, without NLL, whose gamma and TRL's simpo_gamma are the same number; its hinge and cpo's
  AlphaPO have no counterpart. `dpo.reference_free` and `dpo.rpo_alpha` have none either.
- orpo's log(1 - e^x) keeps finite gradients where x rounds to 0, TRL's are NaN there: shown at the end.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

from peer import answered, ask, difference

PAIRS = 64
TOLERANCE = 1e-6
"""Of the loss's size, or of 1 where that is smaller; float32 on both sides."""

Case = tuple[str, dict[str, Any], str, dict[str, Any]]
"""The stage and its options; TRL's trainer and its settings."""


def cases() -> list[Case]:
    """Return what is compared."""
    smoothed = {"robust": 0.1, "exo_pair": 0.05, "aot": 0.1, "aot_unpaired": 0.1}
    plain = ("sigmoid", "hinge", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "sigmoid_norm", "sft")
    found: list[Case] = [("dpo", {"loss": loss}, "dpo", {"loss_types": [loss]}) for loss in plain]
    for loss, e in smoothed.items():
        found.append(("dpo", {"loss": loss, "label_smoothing": e}, "dpo", {"loss_types": [loss], "label_smoothing": e}))
    tau = {"discopop_tau": 0.3}
    found.append(("dpo", {"loss": "discopop", **tau}, "dpo", {"loss_types": ["discopop"], **tau}))
    for ours, theirs in {"forward_kl": "forward_kl", "js": "js_divergence", "alpha": "alpha_divergence"}.items():
        alpha = ours == "alpha"
        found.append(
            (
                "dpo",
                {"f_divergence": ours} | ({"f_alpha": 0.7} if alpha else {}),
                "dpo",
                {"f_divergence_type": theirs} | ({"f_alpha_divergence_coef": 0.7} if alpha else {}),
            )
        )
    found += [
        ("dpo", {"ld_alpha": 0.4}, "dpo", {"ld_alpha": 0.4}),
        ("dpo", {"use_weighting": True}, "dpo", {"use_weighting": True}),
        (
            "dpo",
            {"loss": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
            "dpo",
            {"loss_types": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        ),
        ("ipo", {"beta": 0.1}, "dpo", {"loss_types": ["ipo"]}),
        ("cpo", {"cpo_alpha": 0.0}, "cpo", {"loss_type": "sigmoid"}),
        ("cpo", {"cpo_alpha": 0.0, "label_smoothing": 0.2}, "cpo", {"loss_type": "sigmoid", "label_smoothing": 0.2}),
        ("cpo", {"cpo_alpha": 0.0, "loss": "hinge"}, "cpo", {"loss_type": "hinge"}),
        ("cpo", {"cpo_alpha": 0.0, "loss": "ipo"}, "cpo", {"loss_type": "ipo"}),
        ("simpo", {"beta": 2.0, "gamma": 1.0}, "cpo", {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0}),
        ("orpo", {"beta": 0.3}, "orpo", {"beta": 0.3}),
    ]
    return found


def main() -> None:
    """Compare, print a table, and end with an error if anything differs."""
    if answered(trl_side):
        return
    data, wanted = log_probs(), cases()
    question = {"data": data, "cases": [case[2:] for case in wanted], "certain": [0.0, -1e-8, -1e-3]}
    answers = ask(__file__, question)

    print(f"{'stage and options':84} {'loss':>12} {'difference':>11} {'of gradients':>13}")
    worst = 0.0
    for (stage, options, *_), theirs in zip(wanted, answers["cases"], strict=True):
        ours = llmtk_side(data, stage, options)
        apart, by_token = (difference(ours[key], theirs[key]) for key in ("loss", "gradient"))
        print(f"{stage + ' ' + json.dumps(options):84} {ours['loss']:12.6f} {apart:11.1e} {by_token:13.1e}")
        worst = max(worst, apart, by_token)
    certainty(question["certain"], answers["certain"])
    if not worst <= TOLERANCE:
        sys.exit(f"llmtk and TRL differ by {worst:.1e}, more than {TOLERANCE}")
    print(f"llmtk and TRL agree to {worst:.1e}")


def log_probs() -> dict[str, Any]:
    """Return log-probs of the tokens of pairs, chosen and rejected in turn, by policy and reference.

    They are multiples of 1/1024, of which float32 holds every sum exactly: what differs, differs in the losses. No two
    pairs have the same log-ratio: among such, which aot compares with which is arbitrary, and the gradients with it.
    """
    from random import Random

    random = Random(0)
    lengths = [random.randint(1, 12) for _ in range(2 * PAIRS)]

    def tokens(low: int, high: int) -> list[list[float]]:
        return [[random.randint(low, high) / 1024 for _ in range(length)] for length in lengths]

    reference = tokens(-4096, -64)
    policy = [[min(-1 / 1024, value + random.randint(-1500, 1500) / 1024) for value in row] for row in reference]
    return {"policy": policy, "reference": reference, "log_square_sum": tokens(-2048, -64)}


# llmtk's side


def llmtk_side(data: dict[str, Any], name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return the loss that a stage makes of the log-probs, and its gradient by each token's."""
    import importlib

    import torch

    from llmtk import Stage
    from llmtk.scoring import Scores

    def flat(key: str) -> torch.Tensor:
        return torch.tensor([value for row in data[key] for value in row])

    policy = flat("policy").requires_grad_()
    module = importlib.import_module(f"llmtk_stage_{name}")
    kind = next(
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Stage) and value.__module__ == module.__name__
    )
    stage = kind(kind.Options(**options))
    run: Any = SimpleNamespace(
        rank=0,
        device=torch.device("cpu"),
        gather=lambda value: [value],
        setting=lambda key: False,
        score=lambda batch, also=(): Scores(
            batch, policy, square_sum=flat("log_square_sum").exp() if "square_sum" in also else None
        ),
        score_window=lambda batch, model=None: Scores(batch, policy.detach() if model is None else flat("reference")),
    )
    stage.check(run)
    (window,) = stage.prepare_batch(run, rows(data)).windows
    terms = stage.compute_loss(run, window).terms
    if name == "orpo":
        terms = {"odds_ratio": terms["odds_ratio"]}
    parts = [term.coefficient * term.sum / window.weights[term.per].sum() for term in terms.values()]
    loss = torch.stack(parts).sum()
    (gradient,) = torch.autograd.grad(loss, policy)
    return {"loss": loss.item(), "gradient": gradient.tolist()}


def rows(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Return encoded pairs with answers of the given lengths; which tokens they are does not matter."""
    lengths = iter([len(row) for row in data["policy"]])
    answers = [[2] * length for length in lengths]
    return [
        {
            "prompt_ids": [1],
            "chosen_ids": chosen,
            "chosen_targets": [True] * len(chosen),
            "rejected_ids": rejected,
            "rejected_targets": [True] * len(rejected),
            "place": "",
        }
        for chosen, rejected in zip(answers[::2], answers[1::2], strict=True)
    ]


def certainty(logps: list[float], theirs: list[float]) -> None:
    """Print the odds ratio's gradients at answers that are all but certain, and end if ours are not finite."""
    import math

    import torch
    from llmtk_stage_orpo import log_odds_ratio

    chosen = torch.tensor(logps, requires_grad=True)
    loss = -torch.nn.functional.logsigmoid(log_odds_ratio(chosen, torch.full_like(chosen, -2.0)))
    (ours,) = torch.autograd.grad(loss.sum(), chosen)
    for logp, mine, other in zip(logps, ours.tolist(), theirs, strict=True):
        print(f"orpo's gradient at a mean log-prob of {logp:g}: llmtk {mine:.6g}, TRL {other:.6g}")
        if not math.isfinite(mine):
            sys.exit("llmtk's is not finite")


# TRL's side: this file again, in its environment


def trl_side(question: dict[str, Any]) -> dict[str, Any]:
    """Return the losses and gradients of TRL's methods."""
    import torch
    from trl.experimental.orpo import ORPOTrainer

    makers = {"dpo": trl_dpo, "cpo": trl_cpo, "orpo": trl_orpo}
    found = []
    for trainer, settings in question["cases"]:
        policy = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(row) for row in question["data"]["policy"]], batch_first=True
        ).requires_grad_()
        loss = makers[trainer](question["data"], policy, settings)
        (gradient,) = torch.autograd.grad(loss, policy)
        lengths = [len(row) for row in question["data"]["policy"]]
        flat = [value for row, length in zip(gradient, lengths, strict=True) for value in row[:length].tolist()]
        found.append({"loss": loss.item(), "gradient": flat})

    chosen = torch.tensor(question["certain"], requires_grad=True)
    losses = ORPOTrainer.odds_ratio_loss(stand_in(beta=1.0), chosen, torch.full_like(chosen, -2.0))[0]
    (certain,) = torch.autograd.grad(-losses.sum(), chosen)
    return {"cases": found, "certain": certain.tolist()}


def stand_in(**settings: Any) -> Any:
    """Return what stands in for a trainer: its settings, and one process."""
    accelerator = SimpleNamespace(device="cpu", gather=lambda value: value, gather_for_metrics=lambda value: value)
    return SimpleNamespace(accelerator=accelerator, **settings)


def means_and_sums(data: dict[str, Any], policy: Any) -> tuple[Any, Any]:
    """Return the mean and the summed log-probs of answers (2 pairs,)."""
    import torch

    sums = policy.sum(1)
    return sums / torch.tensor([len(row) for row in data["policy"]]), sums


def trl_cpo(data: dict[str, Any], policy: Any, settings: dict[str, Any]) -> Any:
    """Return TRL's CPO loss; its forward pass averages for ipo and simpo, and else sums."""
    from trl.experimental.cpo import CPOTrainer

    means, sums = means_and_sums(data, policy)
    logps = means if settings["loss_type"] in ("ipo", "simpo") else sums
    trainer = stand_in(**{"alpha": 0.0, "beta": 0.1, "label_smoothing": 0.0, **settings})
    return CPOTrainer.cpo_loss(trainer, logps[::2], logps[1::2])[0].mean()


def trl_orpo(data: dict[str, Any], policy: Any, settings: dict[str, Any]) -> Any:
    """Return the term that TRL's ORPO subtracts, with its sign."""
    from trl.experimental.orpo import ORPOTrainer

    means, _ = means_and_sums(data, policy)
    return -ORPOTrainer.odds_ratio_loss(stand_in(**settings), means[::2], means[1::2])[0].mean()


def trl_dpo(data: dict[str, Any], policy: Any, settings: dict[str, Any]) -> Any:
    """Return TRL's DPO loss, of models that answer with the given log-probs: chosen answers first, then rejected."""
    import torch
    from trl import DPOTrainer
    from trl.trainer import dpo_trainer

    def padded(key: str) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in data[key]], batch_first=True)

    def in_halves(values: torch.Tensor) -> torch.Tensor:
        return torch.cat([values[::2], values[1::2]])

    def model(logps: torch.Tensor) -> Any:
        zeros = torch.zeros_like(logps)
        answer = SimpleNamespace(
            log_probs=logps,
            log_sum_sq_probs=in_halves(padded("log_square_sum")),
            entropy=zeros,
            mean_logits=zeros,
            is_top1=zeros.bool(),
        )
        return lambda **_: answer

    lengths = torch.tensor([len(row) for row in data["policy"]])
    is_answer = torch.arange(policy.shape[1]) < lengths[:, None]
    mask = torch.cat([torch.zeros(len(lengths), 1, dtype=torch.long), is_answer.long()], dim=1)
    inputs = {"input_ids": mask + 1, "attention_mask": torch.ones_like(mask), "completion_mask": in_halves(mask)}
    dpo_trainer.disable_gradient_checkpointing = lambda *_: nullcontext()
    defaults: dict[str, Any] = {
        "beta": 0.1,
        "label_smoothing": 0.0,
        "loss_types": ["sigmoid"],
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 1.0,
        "ld_alpha": None,
        "use_weighting": False,
        "discopop_tau": 0.05,
    }
    settings = defaults | settings
    trainer = stand_in(
        model=SimpleNamespace(training=True),
        ref_model=model(in_halves(padded("reference"))),
        args=SimpleNamespace(discopop_tau=settings["discopop_tau"], gradient_checkpointing_kwargs=None),
        precompute_ref_logps=False,
        aux_loss_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        **{"loss_weights": [1.0] * len(settings["loss_types"]), **settings},
    )
    return DPOTrainer._compute_loss(trainer, model(in_halves(policy)), inputs, return_outputs=False)


if __name__ == "__main__":
    main()
