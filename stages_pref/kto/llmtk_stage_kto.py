"""Kahneman-Tversky optimisation (arXiv 2402.01306): answers that are labelled desirable or not, each for itself.

With r = log pi(y|x) - log pi_ref(y|x), summed over the answer's tokens, w its label's weight, for the N rows of the
whole optimizer window, on all ranks:

    1/N  sum_rows  w_D (1 - sigmoid(beta (r - KL)))  if desirable,   w_U (1 - sigmoid(beta (KL - r)))  if not

    KL = max(0, 1/N  sum_rows  log pi(y'|x) - log pi_ref(y'|x)),  without gradient,

y' being the answer of another row of the window: a derangement, drawn anew for each window (section 4.1).
`apo_zero_unpaired` (APO-zero, arXiv 2408.06266, on rows that are no pairs) is the same with KL = 0.

Departures from other code, which shifts the completions of each device's micro-batch by one and takes the KL of these:
here it is one number for the whole window, the same however the window is shuffled or cut, and no prompt meets an
answer of its own while the window holds enough others.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from llmtk_pref import DEMO_TRAIN, demo_rows, kl_metric, share_preferred
from pydantic import Field
from torch import Tensor

from llmtk import Batch, ConfigurationError, Data, Demo, Group, LossOutput, Mean, Round, RunView, Section, Stage, Term
from llmtk import Sequence as Tokens
from llmtk.contract import Row
from llmtk.demo import addition
from llmtk.demo.measure import exact_match


def losses(ratios: Tensor, desirable: Tensor, kl: Tensor | float, beta: float) -> Tensor:
    """Return 1 - sigmoid(beta (r - KL)) for desirable answers, 1 - sigmoid(beta (KL - r)) for others.

    `ratios` r and `desirable` (bool) have shape (rows,), as has what is returned. arXiv 2402.01306, section 4.1.
    """
    gain = torch.where(desirable, ratios - kl, kl - ratios)
    return (-beta * gain).sigmoid()  # 1 - sigmoid(z) = sigmoid(-z), which is exact where sigmoid(z) is nearly 1


class KahnemanTverskyOptimization(Stage):
    """Labelled answers; the reference is the policy as it is when the run starts, unless `model.reference` is given."""

    summary = "Kahneman-Tversky optimisation: answers labelled desirable or not, relative to a reference"
    paper = "arXiv 2402.01306"
    citation = """
        @misc{ethayarajh2024kto,
            title = {{KTO: Model Alignment as Prospect Theoretic Optimization}},
            author = {Kawin Ethayarajh and Winnie Xu and Niklas Muennighoff and Dan Jurafsky and Douwe Kiela},
            year = {2024},
            eprint = {2402.01306},
            archivePrefix = {arXiv},
            primaryClass = {cs.LG},
        }
    """
    row_types = ("labelled",)
    needs = frozenset({"reference"})
    honours = frozenset({"precompute_reference"})
    defaults = {"train": {"learning_rate": 5e-6}}

    class Options(Section):
        """Which loss, how far the policy may go, and how the labels are weighed."""

        loss: Literal["kto", "apo_zero_unpaired"] = "kto"
        """`kto` compares with the KL of the window; `apo_zero_unpaired` (arXiv 2408.06266) with zero, which is cheaper,
        for answers that are better than the model's own."""
        beta: float = Field(0.1, gt=0)
        """How strongly the policy is held to the reference: small goes far."""
        desirable_weight: float = Field(1.0, gt=0)
        """Weight of desirable answers. The run says what suits the counts of its labels."""
        undesirable_weight: float = Field(1.0, gt=0)
        """Weight of undesirable answers."""

    def __init__(self, options: Section | None = None) -> None:
        super().__init__(options)
        # The last window's KL. Evaluation draws from a generator of its own, and so carries a KL of its own.
        self._carried: WeakKeyDictionary[torch.Generator, float] = WeakKeyDictionary()

    def check(self, run: RunView) -> None:
        if self.options.loss == "kto" and run.setting("precompute_reference"):
            raise ConfigurationError(
                "train.precompute_reference: kto.loss: kto asks the reference about mismatched prompts and answers, "
                "which are new in each window. Set it to false, or take kto.loss: apo_zero_unpaired"
            )

    def build_data(self, run: RunView) -> Data:
        data = super().build_data(run)
        labels: list[bool] = data.train["label"][:]  # type: ignore[index]
        desirable = sum(labels)
        run.notify(_advice(desirable, len(labels) - desirable, self.options))
        return data

    def prepare_batch(self, run: RunView, rows: list[Row]) -> Round:
        batch = Batch.collate([_group(row, row["completion_ids"], row["completion_targets"]) for row in rows])
        reference = run.score_window(batch, model="reference")
        desirable = torch.tensor([row["label"] for row in rows], dtype=torch.bool)
        kl, metrics = (0.0, {}) if self.options.loss != "kto" else self._window_kl(run, rows)
        columns = {
            "desirable": desirable,
            "kl": torch.full((len(rows),), kl),
            "margin_weight": _margin_weights(run, desirable),
        }
        batch = batch.with_columns(per_group=columns, per_target={"reference_logps": reference.logps})
        return Round([batch], metrics)

    def compute_loss(self, run: RunView, batch: Batch) -> LossOutput:
        o, columns = self.options, batch.per_group
        scores = run.score(batch)
        reference_logps = batch.per_target["reference_logps"]
        ratios = batch.sum_by_sequence(scores.logps - reference_logps)
        weights = torch.where(columns["desirable"], o.desirable_weight, o.undesirable_weight)

        loss = weights * losses(ratios, columns["desirable"], columns["kl"], o.beta)

        metrics = _metrics(columns, scores.sum().detach(), o.beta * ratios.detach())
        metrics |= (
            {"kl": Mean(columns["kl"].sum(), len(batch))}
            if o.loss == "kto"
            else kl_metric(scores.logps, reference_logps)
        )
        return LossOutput({"loss": Term(loss.sum(), per="rows")}, metrics, scores)

    def extra_checkpoint_state(self, run: RunView) -> Mapping[str, Any]:
        """Keep the last window's KL, which a window of one row takes over."""
        return {"kl": self._carried.get(run.generator("mismatch"), 0.0)} if self.options.loss == "kto" else {}

    def restore_checkpoint_state(self, run: RunView, state: Mapping[str, Any]) -> None:
        if state:
            self._carried[run.generator("mismatch")] = state["kl"]

    def _window_kl(self, run: RunView, rows: list[Row]) -> tuple[float, dict[str, Mean]]:
        """Return the KL of the window, on all ranks, and how many of its answers were paired with their own prompt."""
        generator = run.generator("mismatch")
        mine = [[_digest(row["prompt_ids"]), row["completion_ids"], row["completion_targets"]] for row in rows]
        everyone: list[list[list[Any]]] = run.gather(mine)
        window = [answer for part in everyone for answer in part]
        if len(window) < 2:
            run.notify(
                "A window of one row has no other answer to estimate the KL with: it keeps that of the last window, "
                "0 at the start. More rows in a step (train.gradient_accumulation_steps) estimate it"
            )
            return self._carried.get(generator, 0.0), {}

        # By their content, so that it does not matter in which order they came.
        order = sorted(range(len(window)), key=window.__getitem__)
        drawn = mismatch([window[row][0] for row in order], generator)
        partner = {order[place]: order[other] for place, other in enumerate(drawn)}
        first = sum(len(part) for part in everyone[: run.rank])
        others = [window[partner[first + index]] for index in range(len(rows))]

        batch = Batch.collate([
            _group(row, *_fitted(row, ids, targets, run.max_length))
            for row, (_, ids, targets) in zip(rows, others, strict=True)
        ])  # fmt: skip
        policy, reference = run.score_window(batch), run.score_window(batch, model="reference")
        moved = float((policy.logps.double() - reference.logps.double()).sum())
        kl = max(0.0, run.sum_over_ranks({"moved": moved})["moved"] / len(window))
        self._carried[generator] = kl

        own_prompt = sum(own[0] == other[0] for own, other in zip(mine, others, strict=True))
        if any(window[row][0] == window[other][0] for row, other in partner.items()):
            run.notify(
                "More than half of a window's rows have one prompt: some of the answers that the KL is estimated with "
                "stand behind their own prompt (kl_own_prompt is their share). More rows in a step avoid it"
            )
        return kl, {"kl_own_prompt": Mean(own_prompt, len(rows))}

    def demo(self) -> Demo:
        return _demo()


def mismatch(prompts: Sequence[str], generator: torch.Generator) -> list[int]:
    """Return for each row of two or more the index of the row whose answer it gets: a random derangement.

    Rows stand in a random order, those of one prompt together, and each gets the answer that stands as many places
    further on as the most frequent prompt has rows. So none gets an answer of its own prompt while that one has at most
    half of the rows; beyond that, as few as can be do, and still not their own.
    """
    names = sorted(set(prompts))
    place = dict(zip(names, torch.randperm(len(names), generator=generator).tolist(), strict=True))
    within = torch.randperm(len(prompts), generator=generator).tolist()
    line = sorted(range(len(prompts)), key=lambda row: (place[prompts[row]], within[row]))
    step = max(Counter(prompts).values()) if len(names) > 1 else 1
    partner = dict(zip(line, line[step:] + line[:step], strict=True))
    return [partner[row] for row in range(len(prompts))]


def _digest(tokens: Sequence[int]) -> str:
    return hashlib.blake2b(np.asarray(tokens, dtype=np.int64).tobytes(), digest_size=16).hexdigest()


def _group(row: Row, ids: Sequence[int], targets: Sequence[bool]) -> Group:
    """Return a row's prompt with an answer. Nothing else stands behind the prompt, so it is no shared prefix."""
    prompt = row["prompt_ids"]
    answer = Tokens([*prompt, *ids], [False] * len(prompt) + list(targets))
    return Group([answer], {"rows": 1}, place=row["place"])


def _fitted(row: Row, ids: list[int], targets: list[bool], length: int) -> tuple[list[int], list[bool]]:
    """Cut another row's answer to what fits behind this row's prompt. What nothing stands before is no target."""
    room = length - len(row["prompt_ids"])
    first = targets[:1] if row["prompt_ids"] else [False]
    return ids[:room], (first + targets[1:])[:room]


def _margin_weights(run: RunView, desirable: Tensor) -> Tensor:
    """Return (rows,) what makes the mean over a window's rows the difference of its labels' means; 0 where one lacks.

    That is N / N_D for a desirable row of a window, and -N / N_U for another.
    """
    counts = run.sum_over_ranks({"desirable": float(desirable.sum()), "rows": len(desirable)})
    good, bad = counts["desirable"], counts["rows"] - counts["desirable"]
    if not good or not bad:
        return torch.zeros(len(desirable))
    return torch.where(desirable, counts["rows"] / good, -counts["rows"] / bad)


def _metrics(columns: Mapping[str, Tensor], logps: Tensor, rewards: Tensor) -> dict[str, Mean]:
    """Return rewards and log-probs of both labels as means over their rows; rewards/margins as one over windows' rows.

    A margin is the difference of the two labels' mean rewards in a window; windows with one label alone have none.
    """
    desirable, weights = columns["desirable"], columns["margin_weight"]
    metrics = {"rewards/margins": Mean((weights * rewards).sum(), weights.count_nonzero())}
    for name, values in (("rewards", rewards), ("logps", logps)):
        metrics[f"{name}/chosen"] = Mean(values[desirable].sum(), desirable.sum())
        metrics[f"{name}/rejected"] = Mean(values[~desirable].sum(), (~desirable).sum())
    return metrics


def _advice(desirable: int, undesirable: int, options: Any) -> str:
    """Say which weights suit the counts: w_D n_D / (w_U n_U) from 1 to 4/3, arXiv 2402.01306, section 4.2."""
    told = f"Labels: {desirable:,} rows are desirable and {undesirable:,} are not"
    if not desirable or not undesirable:
        there, rest = ("desirable", "less") if desirable else ("undesirable", "more")
        return (
            f"Warning. {told}. With {there} answers alone, nothing shows the policy what should become {rest} likely; "
            "rows of the other label would"
        )
    good, bad = options.desirable_weight * desirable, options.undesirable_weight * undesirable
    if 1 <= good / bad <= 4 / 3:
        return f"{told}. Their weights suit them: {good / bad:.2f} to 1, recommended is 1 to 4/3"
    low, high = bad / desirable, good / undesirable
    return (
        f"{told}, with their weights {good / bad:.2f} to 1; recommended is 1 to 4/3. So either kto.desirable_weight "
        f"from {low:.3g} to {low * 4 / 3:.3g}, or kto.undesirable_weight from {high * 3 / 4:.3g} to {high:.3g}"
    )


# The demo: right and wrong sums, labelled


def _demo() -> Demo:
    """Return sums of which 9 of 16 are right, one answer to a prompt; held out, a right and a wrong one to each."""
    problems = [addition.dialogue(problem) for problem in addition.problems("held-out", 200, 1)]
    return Demo(
        train=[_labelled(pair, index % 16 < 9) for index, pair in enumerate(demo_rows("train", 4000))],
        eval=[_labelled(pair, label) for pair in demo_rows("held-out", 200, seed=1) for label in (True, False)],
        config={"train": DEMO_TRAIN | {"max_steps": 200, "learning_rate": 2e-4}, "kto": {"beta": 0.3}},
        figure="preference accuracy",
        measure=_preference_accuracy,
        also={"exact match": lambda run: exact_match(run, problems)},
    )


def _labelled(pair: dict[str, Any], label: bool) -> dict[str, Any]:
    return {"prompt": pair["prompt"], "completion": pair["chosen" if label else "rejected"], "label": label}


def _preference_accuracy(run: RunView) -> float:
    """Return the share of held-out prompts whose right answer is likelier under the policy than the wrong one."""
    assert run.eval_rows is not None
    mine = range(run.rank, len(run.eval_rows) // 2, run.world_size)
    rows = [run.eval_rows[2 * pair + side] for pair in mine for side in (0, 1)]
    return share_preferred(
        run, Batch.collate([_group(row, row["completion_ids"], row["completion_targets"]) for row in rows])
    )
