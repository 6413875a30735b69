"""What every process of a distributed test does: many small runs, one after the other.

    python -m torch.distributed.run --nproc-per-node 2 worker.py OUT [CHECK ...]
    python worker.py OUT [CHECK ...]

Each check trains a tiny model and answers with JSON, which every rank writes to OUT/RANKS/CHECK.RANK.json. The test
compares these between one rank and two. Checks of one launch share the processes, because starting one costs seconds.
"""

from __future__ import annotations

import atexit
import faulthandler
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from llmtk_plugin_curriculum import Curriculum
from llmtk_plugin_ema import ExponentialMovingAverage
from llmtk_plugin_multitask import Multitask
from llmtk_pref import demo_rows
from llmtk_stage_sft import SupervisedFineTuning

from llmtk import Batch, Group, LossOutput, Mean, Round, Run, Sequence, Term, hookimpl, load
from llmtk.training import checkpoints
from llmtk.training import zero as zero_module
from llmtk.training.sharding import in_shards, whole

TINY = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
}
POISON = "!"
"""A row with this character in its prompt spoils the loss or the gradient."""
LIMIT = 300
"""Seconds after which a process shows where it hangs, and dies."""

Answer = dict[str, Any]


@dataclass(frozen=True)
class World:
    """This process among all, and where it writes."""

    rank: int
    size: int
    out: Path

    @property
    def is_last(self) -> bool:
        return self.rank == self.size - 1


def rows(count: int) -> list[dict[str, str]]:
    """Return rows in which long ones (even) and short ones (odd) take turns, all different."""
    return [
        {"prompt": "pq"[i % 2] * (3 + i % 5 + 24 * (1 - i % 2)), "completion": f"{i:02d}" * (1 + i % 3)}
        for i in range(count)
    ]


class Probe(SupervisedFineTuning):
    """Fine-tuning that keeps the first step's gradient, and counts rows, tokens and forwards of each window."""

    name = "probe"

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.gradient: Answer = {}
        self.shares: list[int] = []
        self.tokens: list[int] = []
        self.forwards: list[int] = [0]  # the first entry: of a round that a checkpoint brought

    def build_optimizer(self, run):
        optimizer = super().build_optimizer(run)

        def keep(*_):
            if not self.gradient:
                gradients = {n: p.grad for n, p in run.model.named_parameters() if p.grad is not None}
                self.gradient = {name: gradient.tolist() for name, gradient in whole(gradients).items()}

        optimizer.register_step_pre_hook(keep)
        return optimizer

    def prepare_batch(self, run, rows):
        self.shares.append(len(rows))
        self.tokens.append(sum(len(row["input_ids"]) for row in rows))
        self.forwards.append(0)
        return super().prepare_batch(run, rows)

    def compute_loss(self, run, batch):
        self.forwards[-1] += 1
        return super().compute_loss(run, batch)


class InTurns(Probe):
    """Its rows do not say how long they are, and so are dealt to the ranks in turns."""

    name = "in-turns"

    def encode_rows(self, run, rows):
        return super().encode_rows(run, rows).remove_columns("length")


class InOrder:
    """Gives the rows in the order of the data."""

    def __init__(self, count: int) -> None:
        self.count = count

    @hookimpl
    def order_examples(self, run, epoch):
        return list(range(self.count))


def make(
    world: World,
    name: str,
    stage: type | str = Probe,
    *,
    data: list[dict[str, str]] | None = None,
    evaluation: str | list[dict[str, str]] | None = None,
    in_order: bool = False,
    plugins: tuple[object, ...] = (),
    model: Any = None,
    peft: Any = None,
    resume: str | None = None,
    options: Any = None,
    fsdp: Any = None,
    deepspeed: Any = None,
    **train: Any,
) -> Run:
    """Make a run whose global batch is 8 rows, however many ranks there are."""
    data = rows(40) if data is None else data
    settings = {"bf16": False, "per_device_train_batch_size": 8 // world.size, "max_steps": 20, "logging_steps": 1}
    settings |= {"optim": "sgd", "learning_rate": 0.2, "max_grad_norm": 0}
    run = Run(
        stage,
        model=model or {"from_config": TINY, "tokenizer": {"kind": "byte"}},
        data={"train": data, "eval": evaluation},
        peft=peft,
        plugins=[*((InOrder(len(data)),) if in_order else ()), *plugins],
        resume=resume,
        fsdp=fsdp if world.size > 1 else None,
        deepspeed=deepspeed if world.size > 1 else None,
        output_dir=str(world.out / f"{name}-{world.size}"),
        train=settings | train,
        **({stage: options} if isinstance(stage, str) else {}),
    )
    run.said = []
    speak = run.console.say
    run.console.say = lambda message: (run.said.append(message), speak(message))
    return run


def weights(run: Run) -> Answer:
    parameters = in_shards(run.model).named_parameters()
    trained = {name: parameter for name, parameter in parameters if parameter.requires_grad}
    return {name: parameter.tolist() for name, parameter in whole(trained).items()}


def trained(run: Run) -> Answer:
    """Train, and tell what came of it."""
    result = run.train()
    stage: Any = run.stage
    return {
        "steps": result.steps,
        "weights": weights(run),
        "gradient": getattr(stage, "gradient", {}),
        "shares": getattr(stage, "shares", []),
        "tokens": getattr(stage, "tokens", []),
        "forwards": getattr(stage, "forwards", []),
        "metrics": run.records.read("metrics"),
        "said": run.said,
    }


def failure(action: Callable[[], Any]) -> str:
    """Return the error that an action ends with."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def last_checkpoint(run: Run) -> Answer:
    """Return the newest checkpoint's step, what is wrong with it, and its bytes of weights and optimizer state."""
    step, path = checkpoints.list_checkpoints(run.checkpoints)[-1]
    files = ("weights.safetensors", "optimizer.safetensors")
    return {"step": step, "problem": checkpoints.verify(path)} | {f: (path / f).read_bytes().hex() for f in files}


# Training is the same for one rank and two


def sgd(world: World) -> Answer:
    run = make(world, "sgd")
    answer = trained(run)
    run.save(world.out / f"base-{world.size}")
    return answer


def adamw(world: World) -> Answer:
    return trained(make(world, "adamw", optim="adamw_torch_fused", learning_rate=1e-3, adam_epsilon=1e-5))


def accumulated(world: World) -> Answer:
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4 // world.size}
    return trained(make(world, "accumulated", **settings))


def sharded(world: World) -> Answer:
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4 // world.size, "max_grad_norm": 0.5}
    return trained(make(world, "sharded", fsdp={}, evaluation=rows(6), **settings))


def sharded_adamw(world: World) -> Answer:
    settings = {"optim": "adamw_torch_fused", "learning_rate": 1e-3, "adam_epsilon": 1e-5}
    return trained(make(world, "sharded_adamw", fsdp={"reshard_after_forward": False}, **settings))


def sharded_by_difficulty(world: World) -> Answer:
    """Rows in the order of their losses, which all ranks measure together; and the same of a run that goes on."""
    options = Curriculum.Options(by="loss", steps=8)
    settings = {"fsdp": {}, "max_steps": 12, "data": rows(40), "lr_scheduler_type": "constant"}
    whole = make(world, "sharded_by_difficulty", plugins=(Curriculum(options),), **settings)
    answer = trained(whole)
    parts = settings | {"max_steps": 7}
    make(world, "sharded_by_difficulty_parts", plugins=(Curriculum(options),), **parts).train()
    run = make(world, "sharded_by_difficulty_parts", plugins=(Curriculum(options),), resume="auto", **settings)
    run.train()
    return answer | {"same": weights(run) == weights(whole)}


def sharded_average(world: World) -> Answer:
    average = ExponentialMovingAverage(ExponentialMovingAverage.Options())
    run = make(world, "sharded_average", fsdp={}, max_steps=1, plugins=(average,))
    return {"error": failure(run.train), "written": (run.output_dir / "config.yaml").exists()}


def sharded_goes_on(world: World) -> Answer:
    return _goes_on(world, "sharded", fsdp={})


def _goes_on(world: World, name: str, **section: Any) -> Answer:
    """Stop a sharded run with an adapter or without, go on, and read what was exported."""
    answer = {}
    for kind, peft in (("full", None), ("lora", {"r": 2})):
        settings = {"optim": "adamw_torch", "lr_scheduler_type": "constant", "learning_rate": 1e-3, **section}
        settings |= {"peft": peft, "model": str(world.out / f"base-{world.size}") if peft else None}
        uncut = make(world, f"{name}_whole_{kind}", max_steps=4, **settings)
        uncut.train()
        make(world, f"{name}_parts_{kind}", max_steps=2, **settings).train()
        parts = make(world, f"{name}_parts_{kind}", max_steps=4, resume="auto", **settings)
        parts.train()
        answer[kind] = {
            "same": weights(parts) == weights(uncut),
            "checkpoint": last_checkpoint(parts) == last_checkpoint(uncut),
            "exported": exported(uncut) == weights(uncut),
        }
    return answer


def exported(run: Run) -> Answer:
    """Return the trained weights as anybody would load them."""
    loaded = dict(load(str(run.output_dir))[0].named_parameters())
    return {name: loaded[name].tolist() for name, parameter in run.model.named_parameters() if parameter.requires_grad}


def zero(stage: int) -> Callable[[World], Answer]:
    """Return the check of a stage of DeepSpeed's ZeRO: accumulated, clipped, with steps that are refused."""

    def check(world: World) -> Answer:
        zero_module.PERSISTENT = 0  # each parameter of this model is small
        name, section = f"zero_{stage}", {"zero_stage": stage}
        settings = {"optim": "adamw_torch_fused", "learning_rate": 1e-3, "adam_epsilon": 1e-5, "max_grad_norm": 0.5}
        settings |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4 // world.size}
        answer = trained(make(world, name, deepspeed=section, evaluation=rows(6), **settings))
        for stage_class in (Poisoned, Kinked, Infinite):
            found = _refused(world, f"{name}_{stage_class.name}", stage_class, deepspeed=section)
            answer[stage_class.name] = found
        return answer | _goes_on(world, name, deepspeed=section)

    check.__name__ = f"zero_{stage}"
    return check


def clipped(world: World) -> Answer:
    return trained(make(world, "clipped", max_grad_norm=0.05))


def unequal(world: World) -> Answer:
    """Long rows on one rank, short ones on the other: a token budget cuts them into unequal numbers."""
    return trained(make(world, "unequal", InTurns, data=rows(16), in_order=True, micro_batch_tokens=40))


def dealt(world: World) -> Answer:
    """The same rows, dealt by length."""
    return trained(make(world, "dealt", data=rows(16), in_order=True, micro_batch_tokens=40))


def tail(world: World) -> Answer:
    """An epoch of 9 rows: its second batch has a row for the first rank alone."""
    return trained(make(world, "tail", data=rows(9)))


def tail_of_three(world: World) -> Answer:
    """A last batch of 3 rows in micro-batches of one: two on one rank, one on the other, with nothing to split."""
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8 // world.size}
    return trained(make(world, "three", data=rows(11), in_order=True, **settings))


def experts(world: World) -> Answer:
    """The batches of `tail_of_three`, with a router loss: each row has its own, however many ranks there are."""
    routed = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.1}
    model = {"from_config": TINY | {"model_type": "mixtral", "output_router_logits": True} | routed}
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8 // world.size}
    model |= {"tokenizer": {"kind": "byte"}}
    return trained(make(world, "experts", data=rows(11), in_order=True, model=model, **settings))


def lora(world: World) -> Answer:
    """On the model of `sgd`, with activations recomputed."""
    # Each world on its own copy would start from weights that differ in the last bits.
    base = world.out / "base-1"
    peft = {"r": 4, "lora_alpha": 8}
    model = {"name_or_path": str(base)}
    return trained(make(world, "lora", model=model, peft=peft, gradient_checkpointing=True, learning_rate=0.5))


# Preference stages, whose windows are looked at as a whole: by kto for its KL, by dpo's transport for its sorts

PREFERENCES: dict[str, tuple[str, Answer]] = {
    "dpo": ("dpo", {}),
    "dpo_transport": ("dpo", {"loss": ["aot", "aot_unpaired"]}),
    "dpo_moving": ("dpo", {"sync_ref_model": True, "ref_model_sync_steps": 2}),
    "ipo": ("ipo", {}),
    "kto": ("kto", {}),
    "cpo": ("cpo", {}),
    "simpo": ("simpo", {}),
    "orpo": ("orpo", {"nll_on": "all"}),
    "rm": ("rm", {"center_rewards_coefficient": 0.1}),
}


def preference(name: str) -> Callable[[World], Answer]:
    """Return the check of a stage, with rows left over at the end of an epoch."""
    stage, options = PREFERENCES[name]

    def check(world: World) -> Answer:
        pairs = demo_rows("train", 19)
        settings = {"max_steps": 6, "learning_rate": 0.05, "eval_strategy": "steps", "eval_steps": 3}
        return trained(make(world, name, stage, data=pairs, evaluation=pairs[:5], options=options, **settings))

    check.__name__ = name
    return check


def tasks_together(world: World) -> Answer:
    """Two sources of pairs, told apart, and text beside them: fewer rows of it in a step than there are pairs."""
    folder = world.out / f"tasks-{world.size}-{world.rank}"
    folder.mkdir()
    pairs = demo_rows("train", 19)
    for name, part in (("few", pairs[:5]), ("many", pairs[5:])):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    sources: Any = [str(folder / "many.jsonl"), {"path": str(folder / "few.jsonl"), "weight": 2}]
    settings = {"max_steps": 6, "learning_rate": 0.05, "eval_strategy": "steps", "eval_steps": 3}
    settings |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4 // world.size}
    together = Multitask(Multitask.Options(beside={"data": rows(7), "rows": 5, "coefficient": 0.5}))
    return trained(make(world, "tasks", "dpo", data=sources, evaluation=sources[0], plugins=(together,), **settings))


def precomputed(world: World) -> Answer:
    """The reference's log-probs computed by two ranks, each its share."""
    os.environ["LLMTK_CACHE"] = str(world.out / f"cache-{world.size}")
    pairs = demo_rows("train", 19)
    run = make(world, "precomputed", "dpo", data=pairs, max_steps=6, learning_rate=0.05, precompute_reference=True)
    return trained(run)


# Reinforcement, whose rounds are written by all ranks


REWARDS = Path(__file__).parents[1] / "rewards.py"
ROUNDS: Answer = {"num_generations": 3, "max_completion_length": 5, "num_iterations": 2, "mini_batches": 2}
REINFORCEMENT: dict[str, tuple[str, str, Answer]] = {
    "grpo": ("grpo", "graded", {"beta": 0.1, "loss": "grpo"}),
    "grpo_batch": ("grpo", "graded", {"scale_rewards": "batch", "entropy_coef": 0.01}),
    "grpo_dynamic": ("grpo", "half", {"dynamic_sampling": True}),
    "grpo_dropped": ("grpo", "half", {"drop_flat_groups": True}),
    "rloo": ("rloo", "graded", {"beta": 0.1}),
    "ppo": ("ppo", "graded", {"whiten_rewards": True}),
}


class Written:
    """Keeps what the windows of each round have: the place of each prompt, and the tokens of its completions."""

    def __init__(self) -> None:
        self.rounds: list[list[list[Any]]] = []

    @hookimpl
    def around_prepare_batch(self, run, rows, inner):
        round = inner(rows)
        self.rounds.append([self.of(window) for window in round.windows])
        return round

    @staticmethod
    def of(window: Batch) -> list[Any]:
        owners = window.sequence_group[window.target_sequence].tolist()
        answers: list[list[Any]] = [[place] for place in window.places]
        for owner, token in zip(owners, window.target_tokens.tolist(), strict=True):
            answers[owner].append(token)
        return sorted(answers)


def rounds(world: World, name: str, stage: str, reward: str, options: Answer, **settings: Any) -> tuple[Run, Written]:
    """Make a run on 19 prompts, so that rows are left over at the end of an epoch."""
    prompts = [{"prompt": f"{'why ' * (i % 4)}{i}?"} for i in range(19)]
    rewards = [{"file": str(REWARDS), "function": reward}]
    watch = Written()
    options = {**ROUNDS, "rewards": rewards, **options}
    settings = {"max_steps": 12, "learning_rate": 0.1, "save_strategy": "no", **settings}
    return make(world, name, stage, data=prompts, options=options, plugins=(watch,), **settings), watch


def reinforcement(name: str) -> Callable[[World], Answer]:
    """Return the check of a stage."""
    stage, reward, options = REINFORCEMENT[name]

    def check(world: World) -> Answer:
        run, watch = rounds(world, name, stage, reward, options)
        return trained(run) | {"written": watch.rounds}

    check.__name__ = name
    return check


def left_out(world: World) -> Answer:
    """Rounds of two prompts, of which the odd one has no reward: with two ranks, one of them has nothing left."""
    options = {"on_reward_error": "drop", "mini_batches": 1, "beta": 0.1}
    settings = {"per_device_train_batch_size": 2 // world.size, "max_steps": 8}
    run, watch = rounds(world, "left-out", "grpo", "even", options, **settings)
    return trained(run) | {"written": watch.rounds}


def all_left_out(world: World) -> Answer:
    """No row has a reward: every step is left out, on all ranks."""
    run, _ = rounds(world, "all-left-out", "grpo", "never", {"on_reward_error": "drop"}, max_steps=4)
    return trained(run)


def failing_reward(world: World) -> Answer:
    """With rounds of two prompts the first odd one is on one rank."""
    settings = {"per_device_train_batch_size": 2 // world.size, "max_steps": 8}
    run, _ = rounds(world, "failing-reward", "grpo", "even", {"mini_batches": 1}, **settings)
    return {"error": failure(run.train)}


class Bonus(Probe):
    """A second term, divided by a weight that few rows have: those of a prompt of 31 letters."""

    name = "bonus"

    def prepare_batch(self, run, rows):
        plain = super().prepare_batch(run, rows).windows[0]
        first = [sum(t == row["input_ids"][0] for t in row["input_ids"]) == 31 for row in rows]
        groups = [
            Group(
                [Sequence(row["input_ids"], row["targets"])],
                {"tokens": sum(row["targets"]), "bonus": float(has)},
                per_sequence={"has": [has]},
                place=row["place"],
            )
            for row, has in zip(rows, first, strict=True)
        ]
        assert len(plain) == len(groups)
        return Round.of(groups)

    def compute_loss(self, run, batch):
        output = super().compute_loss(run, batch)
        bonus = (output.scores.sum() * batch.per_sequence["has"]).sum()
        terms = output.terms | {"bonus": Term(-bonus, per="bonus", coefficient=0.25)}
        return LossOutput(terms, output.metrics, output.scores)


def zero_weight(world: World) -> Answer:
    """The weight is zero on one rank in some windows, and on both in others."""
    return trained(make(world, "zero", Bonus, data=rows(32), in_order=True))


# Metrics


class Partial(InTurns):
    """A metric of batches with a prompt of p alone: with rows in order, of the first rank alone."""

    name = "partial"

    def compute_loss(self, run, batch):
        output = super().compute_loss(run, batch)
        letter = run.tokenizer("p")["input_ids"][-1]
        found = (batch.tokens == letter).sum()
        metrics = dict(output.metrics)
        if found:
            metrics["letters"] = Mean(found, (batch.segment_lengths > 20).sum())
        return LossOutput(output.terms, metrics, output.scores)


class OnLastRank:
    """A metric that the last rank alone gives."""

    @hookimpl
    def extra_metrics(self, run, window):
        if run.rank < run.world_size - 1:
            return {}
        return {"last": Mean(3.0 * run.step, 2.0), "grown": Mean(float(run.step), 1, then="exp")}


def partial_metrics(world: World) -> Answer:
    return trained(make(world, "metrics", Partial, data=rows(16), in_order=True, plugins=(OnLastRank(),), max_steps=4))


def evaluation(world: World) -> Answer:
    """Rows by themselves, so that no sum depends on what stands beside them; and rows together."""
    run = make(world, "evaluation", evaluation=rows(13), max_steps=1, learning_rate=0, per_device_eval_batch_size=1)
    run.train()
    together = make(world, "together", evaluation=rows(13), max_steps=1, learning_rate=0, per_device_eval_batch_size=3)
    together.train()
    return {"alone": run.evaluate(), "other data": run.evaluate(rows(3)), "together": together.evaluate()}


# Stopping


class StopOnLastRank:
    """The last rank alone wants to stop."""

    @hookimpl
    def should_stop(self, run, step):
        return run.rank == run.world_size - 1 and step.step == 3


def stop(world: World) -> Answer:
    run = make(world, "stop", plugins=(StopOnLastRank(),))
    return trained(run) | {"checkpoint": last_checkpoint(run), "by": run.state.stopped_by}


class Signal:
    """The last rank alone gets SIGTERM: once a step is done, or in the midst of an evaluation."""

    def __init__(self, world: World, step: int, evaluating: bool = False) -> None:
        self.world, self.at, self.evaluating = world, step, evaluating

    @hookimpl
    def after_update(self, run, step):
        if not self.evaluating:
            self.strike(step.step)

    @hookimpl
    def around_compute_loss(self, run, batch, inner):
        if self.evaluating and not run.model.training:
            self.strike(run.step)
        return inner(batch)

    def strike(self, step: int) -> None:
        if self.world.is_last and step == self.at:
            os.kill(os.getpid(), signal.SIGTERM)


class Silent(Signal):
    """The same plugin, for the run that is never stopped."""

    def strike(self, step: int) -> None:
        pass


Silent.__qualname__ = Signal.__qualname__


class ThreeWindows(Probe):
    """Each round goes over its rows three times, in windows that know which pass they are."""

    name = "three-windows"

    @property
    def windows_per_round(self):
        return 3

    def prepare_batch(self, run, rows):
        noise = torch.rand(1, generator=run.generator("passes")).item()
        window = super().prepare_batch(run, rows).windows[0]
        return Round([window] * 3, {"noise": Mean(noise, 1.0)})


def interrupted_and_resumed(world: World, name: str, signal_at: int, evaluating: bool, stage: type) -> Answer:
    """Stop a run by a signal to one rank, resume it, and give it beside one that was never stopped."""
    settings = {"optim": "adamw_torch_fused", "learning_rate": 1e-2, "max_steps": 8, "eval_strategy": "steps"}
    settings |= {"eval_steps": 4, "save_steps": 100, "data": rows(21), "evaluation": rows(11)}
    whole = make(world, f"{name}-whole", stage, plugins=(Silent(world, 0),), **settings)
    whole.train()
    first = make(world, name, stage, plugins=(Signal(world, signal_at, evaluating),), **settings)
    error = failure(first.train)
    stopped = last_checkpoint(first)
    window = first.state.window
    pending = first.state.pending is not None
    second = make(world, name, stage, plugins=(Silent(world, 0),), resume="auto", **settings)
    second.train()
    return {
        "error": error,
        "stopped": {"step": stopped["step"], "problem": stopped["problem"]},
        "window": window,
        "pending": pending,
        "whole": last_checkpoint(whole) | {"metrics": whole.records.read("metrics"), "weights": weights(whole)},
        "resumed": last_checkpoint(second) | {"metrics": second.records.read("metrics"), "weights": weights(second)},
    }


def signalled(world: World) -> Answer:
    return interrupted_and_resumed(world, "signalled", 3, False, Probe)


def signalled_in_a_round(world: World) -> Answer:
    return interrupted_and_resumed(world, "in-round", 5, False, ThreeWindows)


def signalled_in_evaluation(world: World) -> Answer:
    return interrupted_and_resumed(world, "in-evaluation", 4, True, Probe)


# Faults of one rank


class Poisoned(InTurns):
    """The loss of a batch with the poisoned row is not finite."""

    name = "poisoned"

    def compute_loss(self, run, batch):
        output = super().compute_loss(run, batch)
        if not bool((batch.tokens == run.tokenizer(POISON)["input_ids"][-1]).any()):
            return output
        loss = output.terms["loss"].sum
        return LossOutput({"loss": Term(self.spoilt(loss), per="tokens")}, output.metrics, output.scores)

    def spoilt(self, loss):
        return loss * float("nan")


class Kinked(Poisoned):
    """The loss is finite and its gradient is not: the root of zero."""

    name = "kinked"

    def spoilt(self, loss):
        return loss + (loss * 0).sqrt()


class Infinite(Poisoned):
    """The loss is not finite and its gradient is."""

    name = "infinite"

    def spoilt(self, loss):
        return loss + float("inf")


class Watch:
    """Keeps the weights before and after each step, and what was refused."""

    def __init__(self) -> None:
        self.weights: list[Answer] = []
        self.skipped: list[str | None] = []

    @hookimpl
    def run_started(self, run, plan):
        self.weights.append(weights(run))

    @hookimpl
    def step_finished(self, run, step):
        self.weights.append(weights(run))
        self.skipped.append(step.skipped)


def with_poison(at: int) -> list[dict[str, str]]:
    data = rows(16)
    data[at] = {"prompt": POISON, "completion": "00"}
    return data


def _refused(world: World, name: str, stage: type, **section: Any) -> Answer:
    """Row 12 of 16 is poisoned, a row of the last rank: of each two steps the second is refused, on all ranks."""
    watch = Watch()
    run = make(world, name, stage, data=with_poison(11), in_order=True, plugins=(watch,), max_steps=4, **section)
    answer = trained(run)
    return answer | {"skipped": watch.skipped, "history": watch.weights, "places": run.train_rows[11]["place"]}


def poisoned(world: World) -> Answer:
    return _refused(world, "poisoned", Poisoned)


def kinked(world: World) -> Answer:
    return _refused(world, "kinked", Kinked)


def given_up(world: World) -> Answer:
    run = make(world, "given-up", Poisoned, data=with_poison(1), in_order=True, max_nonfinite_steps=1)
    return {"error": failure(run.train), "place": run.train_rows[1]["place"], "weights": weights(run)}


class Left:
    """A plugin of one rank."""

    @hookimpl
    def run_started(self, run, plan):
        pass


class Right(Left):
    """A plugin of the others."""


def other_plugins(world: World) -> Answer:
    run = make(world, "plugins", plugins=(Right() if world.is_last else Left(),))
    return {"error": failure(run.train), "folder": run.output_dir.exists()}


class BreaksAtSave:
    """Its state cannot be saved on one rank."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    @hookimpl
    def extra_checkpoint_state(self, run):
        if run.rank == self.rank:
            raise OSError("the disk is full")
        return {"count": run.step}


def broken_save(world: World) -> Answer:
    """Twice: a rank other than the first fails, and the first does, in a part of the write that it does alone."""
    run = make(world, "save-last", plugins=(BreaksAtSave(world.size - 1),), save_steps=2, max_steps=4)
    answer = {"last": failure(run.train), "left": [step for step, _ in checkpoints.list_checkpoints(run.checkpoints)]}
    commit = checkpoints.commit

    def fail(aside: Path, path: Path) -> None:
        raise OSError("the disk is full")

    checkpoints.commit = fail
    try:
        run = make(world, "save-first", save_steps=2, max_steps=4)
        answer["first"] = failure(run.train)
    finally:
        checkpoints.commit = commit
    run = make(world, "save-first", save_steps=2, max_steps=4, resume="auto")
    return answer | {"afterwards": run.train().steps}


def broken_export(world: World) -> Answer:
    """The first rank fails to write the model, which the others do not even try."""

    class NoExport(Probe):
        name = "no-export"

        def export_model(self, run, path):
            raise OSError("the disk is full")

    run = make(world, "export", NoExport, max_steps=1)
    return {"error": failure(run.train)}


# What a stage may ask of the run


class Asking(Probe):
    """Asks everything collective in prepare_batch, on a rank without rows too."""

    name = "asking"

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.asked: list[Answer] = []

    def prepare_batch(self, run, rows):
        round = super().prepare_batch(run, rows)
        window = round.windows[0]
        scores = run.score_window(window)
        more = run.draw(3)
        self.asked.append(
            {
                "rows": [row["place"] for row in rows],
                "drawn": [row["place"] for row in more],
                "sum": run.sum_over_ranks({"rows": len(rows), f"rank {run.rank}": 1.5}),
                "gathered": run.gather({"rank": run.rank, "rows": len(rows)}),
                "logps": scores.logps.tolist(),
                "scored": [scores.logps.shape == window.target_tokens.shape, list(scores.sum().shape)],
                "training": run.model.training,
            }
        )
        return round


def asking(world: World) -> Answer:
    """Batches of 8, 8 and 1 rows: each draws 3 more, so that an epoch's end comes in the midst of a draw too."""
    run = make(world, "asking", Asking, data=rows(12), max_steps=4, learning_rate=0)
    answer = trained(run)
    return answer | {"asked": run.stage.asked}


class Alone(Probe):
    """The last rank runs the model once more than the others: without gradient."""

    name = "alone"

    def prepare_batch(self, run, rows):
        round = super().prepare_batch(run, rows)
        if run.rank == run.world_size - 1:
            with torch.no_grad():
                run.score(round.windows[0])
        return round


def a_forward_alone(world: World) -> Answer:
    return trained(make(world, "alone", Alone, max_steps=2))


def generation(world: World) -> Answer:
    """Each rank answers its share of the prompts: an unequal one, then none on the first rank."""
    run = make(world, "generation", max_steps=1, learning_rate=0)
    run.train()
    prompts = [[40 + index] * (1 + 3 * index) for index in range(5)]

    def answered(owners: list[int]) -> Answer:
        mine = [prompt for prompt, owner in enumerate(owners) if owner % world.size == world.rank]
        sampling = run.sampling(n=3, max_new_tokens=10, batch_size=4)
        answers = run.generate([prompts[prompt] for prompt in mine], sampling, seeds=mine)
        return {str(prompt): [a.tokens for a in copies] for prompt, copies in zip(mine, answers, strict=True)}

    return {"answers": [answered([0, 1, 1, 0, 1]), answered([1, 1, 1, 1, 1])]}


# Resuming


def checkpoint_of_this_world(world: World) -> Answer:
    return {"steps": make(world, "worlds", max_steps=2, save_steps=1).train().steps}


def resume_of_other_world(world: World) -> Answer:
    """Go on with the run that the other number of ranks has written."""
    other = World(world.rank, 3 - world.size, world.out)
    if not (world.out / f"worlds-{other.size}").is_dir():
        return {"error": "there is no such run yet"}
    batch = 8 // other.size
    run = make(other, "worlds", resume="auto", max_steps=4, save_steps=1, per_device_train_batch_size=batch)
    return {"error": failure(run.train)}


CHECKS: list[Callable[[World], Answer]] = [
    sgd,
    adamw,
    accumulated,
    clipped,
    unequal,
    dealt,
    tail,
    tail_of_three,
    experts,
    lora,
    zero_weight,
    *map(preference, PREFERENCES),
    tasks_together,
    precomputed,
    *map(reinforcement, REINFORCEMENT),
    left_out,
    all_left_out,
    failing_reward,
    partial_metrics,
    evaluation,
    stop,
    signalled,
    signalled_in_a_round,
    signalled_in_evaluation,
    poisoned,
    kinked,
    given_up,
    other_plugins,
    broken_save,
    broken_export,
    asking,
    a_forward_alone,
    generation,
    checkpoint_of_this_world,
    resume_of_other_world,
]


SHARDED: list[Callable[[World], Answer]] = [
    sharded,
    sharded_adamw,
    sharded_goes_on,
    sharded_by_difficulty,
    sharded_average,
    *map(zero, (1, 2, 3)),
]
"""Done when they are named alone: PyTorch's caches keep the groups of a sharded model, and gloo's threads with them, so
that such a process had better end without the interpreter's last words."""


def say_which_threads_live(out: Path) -> None:
    """Write the names of the process's threads, the runtimes' own among them, where the system tells."""
    tasks = Path("/proc/self/task")
    names = [(task / "comm").read_text().strip() for task in tasks.iterdir()] if tasks.is_dir() else []
    out.write_text(json.dumps({"threads": names}))


def main(out: str, *names: str) -> None:
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    world = World(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")), Path(out))
    answers = world.out / str(world.size)
    answers.mkdir(parents=True, exist_ok=True)
    # Called after the backend's own handler, which is registered later.
    atexit.register(say_which_threads_live, answers / f"at_the_end.{world.rank}.json")
    for check in [*CHECKS, *SHARDED] if names else CHECKS:
        if names and check.__name__ not in names:
            continue
        print(f"== {check.__name__}", flush=True)
        try:
            answer = check(world)
        except Exception as error:
            answer = {"failed": f"{type(error).__name__}: {error}"}
            sys.excepthook(*sys.exc_info())
        (answers / f"{check.__name__}.{world.rank}.json").write_text(json.dumps(answer))
    if set(names) & {check.__name__ for check in SHARDED}:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
