"""Direct preference optimisation (arXiv 2305.18290) and its kin.

With r = log pi(y|x) - log pi_ref(y|x), summed over the answer's tokens, for the P pairs (c, j) of the whole optimizer
window, on all ranks:

    1/P  sum_pairs  -log sigmoid(beta (r_c - r_j))

Other losses take the summand's place (`llmtk_dpo_losses`); several may be weighed against each other. What a loss needs
of the whole window, the sorts of `aot`, is computed in prepare_batch, over all ranks. Departures from other code: label
smoothing is honoured by `sigmoid` (cDPO); sorts are over the window, not over a micro-batch.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from llmtk_dpo_losses import LOSSES, Pairs, divergence_score
from llmtk_pref import (
    PairOptions,
    PairStage,
    chosen_nll,
    kl_metric,
    pair_batch,
    pair_demo,
    pair_metrics,
    sides,
)
from pydantic import Field
from torch import Tensor

from llmtk import Batch, ConfigurationError, Demo, LossOutput, Round, RunView, Term, hookimpl
from llmtk.config.unused import is_given, refuse_unused
from llmtk.contract import Row

Loss = Literal[
    "sigmoid", "sigmoid_norm", "hinge", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft",
]  # fmt: skip
_ON_DELTA = ("sigmoid", "sigmoid_norm", "hinge", "robust", "exo_pair", "discopop")
_USED = {
    "beta": tuple(LOSSES),
    "label_smoothing": ("sigmoid", "robust", "exo_pair", "aot", "aot_unpaired"),
    "f_divergence": _ON_DELTA,
    "ld_alpha": tuple(LOSSES),
    "use_weighting": tuple(name for name in LOSSES if not name.startswith("aot")),
    "discopop_tau": ("discopop",),
    "reference_free": tuple(LOSSES),
    "sync_ref_model": tuple(LOSSES),
}
"""Which losses use an option; the others refuse it."""


class DirectPreferenceOptimization(PairStage):
    """Pairs; the reference is the policy as it is when the run starts, unless `model.reference` names another."""

    summary = "Direct preference optimisation: answers of pairs against each other, relative to a reference"
    paper = "arXiv 2305.18290"
    citation = """
        @misc{rafailov2023direct,
            title = {{Direct Preference Optimization: Your Language Model is Secretly a Reward Model}},
            author = {Rafael Rafailov and Archit Sharma and Eric Mitchell and Stefano Ermon and Christopher D.
                      Manning and Chelsea Finn},
            year = {2023},
            eprint = {2305.18290},
            archivePrefix = {arXiv},
            primaryClass = {cs.LG},
        }
    """
    needs = frozenset({"reference"})
    honours = frozenset({"precompute_reference"})
    defaults = {"train": {"learning_rate": 5e-6}}

    class Options(PairOptions):
        """Which loss, and how far the policy may go."""

        loss: Loss | list[Loss] = "sigmoid"
        """One loss, or several, which are added up."""
        loss_weights: list[float] | None = None
        """The weight of each of several losses. By default 1 each."""
        beta: float = Field(0.1, gt=0)
        """How strongly the policy is held to the reference: small goes far."""
        label_smoothing: float = Field(0.0, ge=0, lt=0.5)
        """The share of labels that are wrong. `exo_pair` needs one over 0, for example 1e-3."""
        f_divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "reverse_kl"
        """What holds the policy to the reference (arXiv 2309.16240)."""
        f_alpha: float = 0.5
        """Order of `f_divergence: alpha`; at 1 it is the reverse KL."""
        reference_free: bool = False
        """Take a uniform reference: r = log pi(y|x)."""
        ld_alpha: float | None = Field(None, ge=0, le=1)
        """Weigh the tokens of the longer answer that lie beyond the shorter one's length by this (arXiv 2409.06411)."""
        use_weighting: bool = False
        """Weigh each pair by how likely the policy itself would be to write it (WPO, arXiv 2406.11827)."""
        rpo_alpha: float | None = Field(None, gt=0)
        """Add this times the chosen answers' negative log-prob a token (arXiv 2404.19733)."""
        discopop_tau: float = Field(0.05, gt=0)
        """Temperature of `discopop`."""
        sync_ref_model: bool = False
        """Move the reference towards the policy as it trains (TR-DPO, arXiv 2404.09656)."""
        ref_model_mixup_alpha: float = Field(0.6, gt=0, le=1)
        """reference = alpha policy + (1 - alpha) reference. 1: a hard update."""
        ref_model_sync_steps: int = Field(512, ge=1)
        """Steps between two updates of the reference."""

    @property
    def losses(self) -> dict[str, float]:
        """The losses and their weights."""
        names = [self.options.loss] if isinstance(self.options.loss, str) else self.options.loss
        return dict(zip(names, self.options.loss_weights or [1.0] * len(names), strict=True))

    @property
    def reference(self) -> Literal["none", "frozen", "changing"]:
        if self.options.reference_free or set(self.losses) == {"sft"}:
            return "none"
        return "changing" if self.options.sync_ref_model else "frozen"

    def check(self, run: RunView) -> None:
        o = self.options
        names = [o.loss] if isinstance(o.loss, str) else o.loss
        if not names or len(set(names)) < len(names):
            raise ConfigurationError(f"dpo.loss: {names}: name at least one loss, and each once")
        if o.loss_weights is not None and len(o.loss_weights) != len(names):
            raise ConfigurationError(f"dpo.loss_weights: {len(o.loss_weights)} weights for {len(names)} losses")
        refuse_unused("dpo", o, names, _USED)
        if is_given(o, "f_alpha") and o.f_divergence != "alpha":
            raise ConfigurationError("dpo.f_alpha is used by dpo.f_divergence: alpha alone; remove it")
        if o.f_divergence != "reverse_kl" and (others := sorted(set(names) - set(_ON_DELTA) - {"sft"})):
            raise ConfigurationError(f"dpo.f_divergence: {others[0]} knows the reverse KL alone; remove one of them")
        if o.use_weighting and (others := sorted(name for name in names if name.startswith("aot"))):
            raise ConfigurationError(
                f"dpo.use_weighting: {others[0]} compares answers of different pairs; remove one of them"
            )
        if "exo_pair" in names and not o.label_smoothing:
            raise ConfigurationError("dpo.loss: exo_pair needs dpo.label_smoothing over 0, for example 1e-3")
        if o.rpo_alpha is not None and "sft" in names:
            raise ConfigurationError("dpo.rpo_alpha adds what dpo.loss: sft is; remove one of them")
        for name in ("ref_model_mixup_alpha", "ref_model_sync_steps"):
            if is_given(o, name) and not o.sync_ref_model:
                raise ConfigurationError(f"dpo.{name} is used with dpo.sync_ref_model: true alone; remove it")
        if o.sync_ref_model and (o.reference_free or run.setting("precompute_reference")):
            other = "dpo.reference_free" if o.reference_free else "train.precompute_reference"
            raise ConfigurationError(f"dpo.sync_ref_model moves a reference, and with {other} there is none to move")
        if self.reference == "none" and run.setting("precompute_reference"):
            raise ConfigurationError("train.precompute_reference: there is no reference with these options; remove it")

    def prepare_batch(self, run: RunView, rows: list[Row]) -> Round:
        batch = pair_batch(rows)
        if self.reference == "none":
            reference_logps = torch.zeros(int(batch.targets.sum()))
        else:
            reference_logps = run.score_window(batch, model="reference").logps
        batch = batch.with_columns(per_target={"reference_logps": reference_logps})
        if any(name.startswith("aot") for name in self.losses):
            batch = self._with_sorted(run, batch)
        return Round([batch])

    def compute_loss(self, run: RunView, batch: Batch) -> LossOutput:
        o = self.options
        scores = run.score(batch, also=["square_sum"] if o.use_weighting else [])
        ratios = self._ratios(batch, scores.logps)
        lengths = sides(batch.target_counts.clamp(min=1))
        pairs = Pairs(
            *sides(ratios),
            *sides(divergence_score(ratios, o.f_divergence, o.f_alpha)),
            *lengths,
            aot_shift=batch.per_group.get("aot_shift"),
            aot_partner=batch.per_group.get("aot_partner"),
        )
        weights = _policy_weights(batch, scores.logps, scores.square_sum) if scores.square_sum is not None else 1.0

        terms = {
            name: Term((weights * LOSSES[name](pairs, o)).sum(), per="pairs", coefficient=weight)
            for name, weight in self.losses.items()
            if name != "sft"
        }
        if "sft" in self.losses:
            terms["sft"] = chosen_nll(scores, self.losses["sft"])
        if o.rpo_alpha is not None:
            terms["nll"] = chosen_nll(scores, o.rpo_alpha)

        metrics = pair_metrics(scores.sum(), o.beta * ratios)
        if self.reference != "none":
            metrics |= kl_metric(scores.logps, batch.per_target["reference_logps"])
        return LossOutput(terms, metrics, scores)

    @hookimpl
    def after_update(self, run: RunView) -> None:
        """Move the reference towards the policy, where that is asked for."""
        o = self.options
        if not o.sync_ref_model or run.step % o.ref_model_sync_steps:
            return
        with torch.no_grad():
            for kept, trained in zip(run.frozen["reference"].parameters(), run.model.parameters(), strict=True):
                kept.lerp_(trained.to(kept.dtype), o.ref_model_mixup_alpha)

    def demo(self) -> Demo:
        # Alone, the contrast makes right answers unlikelier too, if less so than wrong ones.
        return pair_demo(max_steps=100, learning_rate=5e-4, options={"dpo": {"rpo_alpha": 0.5}})

    def _ratios(self, batch: Batch, logps: Tensor) -> Tensor:
        """Return r of each answer (2 pairs,) from the log-probs of its tokens (targets,)."""
        ratios = logps - batch.per_target["reference_logps"]
        if self.options.ld_alpha is not None:
            ratios = ratios * _length_weights(batch, self.options.ld_alpha)
        return batch.sum_by_sequence(ratios)

    def _with_sorted(self, run: RunView, batch: Batch) -> Batch:
        """Compare each pair with that of its rank, over the whole window and all ranks."""
        batch = batch.to(run.device)
        ratios = self._ratios(batch, run.score_window(batch).logps)
        reference = batch.sum_by_sequence(batch.per_target["reference_logps"] * self._token_weights(batch))
        mine = torch.stack([*sides(ratios), *sides(reference)], dim=1).tolist()
        everyone: list[list[list[float]]] = run.gather(mine)
        before = sum(len(part) for part in everyone[: run.rank])
        window = torch.tensor([pair for part in everyone for pair in part], dtype=torch.float64).view(-1, 4)
        own = slice(before, before + len(mine))

        chosen, rejected, reference_ratio = window[:, 0], window[:, 1], window[:, 2] - window[:, 3]
        partner = torch.stack([_of_rank(chosen, rejected), _of_rank(rejected, chosen)], dim=1)
        shift = reference_ratio - _of_rank(chosen - rejected + reference_ratio, reference_ratio)
        return batch.with_columns(per_group={"aot_shift": shift[own].float(), "aot_partner": partner[own].float()})

    def _token_weights(self, batch: Batch) -> Any:
        alpha = self.options.ld_alpha
        return 1.0 if alpha is None else _length_weights(batch, alpha)


def _of_rank(values: Tensor, others: Tensor) -> Tensor:
    """Return for each of `values` (n,) that of `others` (n,) which has the same rank. Ties go by their place."""
    ranks = values.argsort(stable=True).argsort()
    return others.sort().values[ranks]


def _length_weights(batch: Batch, alpha: float) -> Tensor:
    """(targets,): 1 up to the length of the pair's shorter answer, alpha beyond it."""
    counts = batch.target_counts
    shared = counts.view(-1, 2).amin(1).repeat_interleave(2)
    first = (counts.cumsum(0) - counts)[batch.target_sequence]
    within = torch.arange(len(batch.target_sequence), device=first.device) - first
    return torch.where(within < shared[batch.target_sequence], 1.0, alpha)


def _policy_weights(batch: Batch, logps: Tensor, square_sum: Tensor) -> Tensor:
    """(pairs,): exp of the mean of log p(y_t) - log sum_v p(v)^2, of both answers: arXiv 2406.11827, equation 2."""
    aligned = batch.sum_by_sequence(logps.detach() - square_sum.log()) / batch.target_counts.clamp(min=1)
    chosen, rejected = sides(aligned.exp())
    return chosen * rejected
