"""Supervised fine-tuning: next-token prediction on what the assistant says.

With p_t = pi(y_t | y_<t), over the N target tokens of the whole optimizer window, on all ranks:

    nll    -1/N  sum_t  log p_t
    dft    -1/N  sum_t  sg(p_t) log p_t        (sg: no gradient)

`dft` is Dynamic Fine-Tuning (arXiv 2508.05629, section 3.3): weighing each token by its own probability takes away the
1/p_t that plain fine-tuning, read as a policy gradient, hides in its reward. Label smoothing e, for nll, puts
(1-e) log p_t + e mean_v log pi(v | y_<t) in place of log p_t (arXiv 1512.00567, section 7).
"""

from __future__ import annotations

from typing import Literal

from llmtk import (
    Batch,
    ConfigurationError,
    Demo,
    Group,
    LossOutput,
    Mean,
    Round,
    RunView,
    Section,
    Sequence,
    Stage,
    Term,
)
from llmtk.contract import Row
from llmtk.demo import addition
from llmtk.demo.measure import exact_match


class SupervisedFineTuning(Stage):
    """Targets are the assistant's turns, stop token included, or the completion after its prompt."""

    summary = "Supervised fine-tuning: next-token prediction on what the assistant says"
    paper = "arXiv 2203.02155, section 3.5; dft: arXiv 2508.05629"
    citation = """
        @misc{ouyang2022training,
            title = {{Training language models to follow instructions with human feedback}},
            author = {Long Ouyang and Jeff Wu and Xu Jiang and Diogo Almeida and Carroll L. Wainwright and
                      Pamela Mishkin and Chong Zhang and Sandhini Agarwal and Katarina Slama and Alex Ray
                      and John Schulman and Jacob Hilton and Fraser Kelton and Luke Miller and Maddie Simens
                      and Amanda Askell and Peter Welinder and Paul Christiano and Jan Leike and Ryan Lowe},
            year = {2022},
            eprint = {2203.02155},
            archivePrefix = {arXiv},
            primaryClass = {cs.CL},
        }

        @misc{wu2025generalization,
            title = {{On the Generalization of SFT: A Reinforcement Learning Perspective with Reward Rectification}},
            author = {Yongliang Wu and Yizhou Zhou and Zhou Ziheng and Yingzhe Peng and Xinyu Ye and Xinting Hu
                      and Wenbo Zhu and Lu Qi and Ming-Hsuan Yang and Xu Yang},
            year = {2025},
            eprint = {2508.05629},
            archivePrefix = {arXiv},
            primaryClass = {cs.LG},
        }
    """
    row_types = ("dialogue", "prompt_completion")
    honours = frozenset({"label_smoothing_factor", "neftune_noise_alpha"})
    dropout = True
    defaults = {"train": {"learning_rate": 2e-5}}

    class Options(Section):
        """How the target tokens are weighed."""

        loss: Literal["nll", "dft"] = "nll"
        """`nll`: each token counts the same. `dft`: by its own probability, so that unlikely tokens pull less."""

    def check(self, run: RunView) -> None:
        if self.options.loss == "dft" and run.setting("label_smoothing_factor"):
            raise ConfigurationError(
                "train.label_smoothing_factor is used by sft.loss: nll alone; leave one of them out"
            )

    def prepare_batch(self, run: RunView, rows: list[Row]) -> Round:
        return Round.of(
            [
                Group([Sequence(row["input_ids"], row["targets"])], {"tokens": sum(row["targets"])}, place=row["place"])
                for row in rows
            ]
        )

    def compute_loss(self, run: RunView, batch: Batch) -> LossOutput:
        smoothing = run.setting("label_smoothing_factor")
        # Whether the target was the likeliest costs a pass over all logits: only in evaluation.
        scores = run.score(batch, also=(["vocab_mean"] if smoothing else []) + ([] if run.model.training else ["top1"]))
        logps = scores.logps

        if self.options.loss == "dft":
            loss = -(logps.detach().exp() * logps).sum()
        elif scores.vocab_mean is not None:
            loss = -((1 - smoothing) * logps + smoothing * scores.vocab_mean).sum()
        else:
            loss = -logps.sum()

        metrics = {"perplexity": Mean(-logps.detach().sum(), len(logps), then="exp")}
        if scores.top1 is not None:
            metrics["token_accuracy"] = Mean(scores.top1.sum(), len(logps))
        return LossOutput({"loss": Term(loss, per="tokens")}, metrics, scores)

    def demo(self) -> Demo:
        train = {"max_steps": 120, "per_device_train_batch_size": 64, "learning_rate": 1e-3, "warmup_steps": 10}
        held_out = addition.rows("held-out", 200)
        return Demo(
            train=addition.rows("train", 8000),
            eval=held_out,
            config={"train": {**train, "lr_scheduler_type": "cosine", "logging_steps": 20, "bf16": False}},
            figure="exact match",
            measure=lambda run: exact_match(run, held_out),
        )
