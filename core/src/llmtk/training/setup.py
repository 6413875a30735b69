"""Setting a run up: everything that it needs is loaded, and what cannot be run is refused, cheapest first."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from llmtk import scoring
from llmtk.errors import ConfigurationError
from llmtk.generation.engines import check_engine
from llmtk.host import manager
from llmtk.scoring import Scorer
from llmtk.training import optimizers
from llmtk.training.backend import Backend
from llmtk.training.fetching import Fetcher
from llmtk.training.forward import Forward
from llmtk.training.neftune import EmbeddingNoise
from llmtk.training.order import row_lengths, row_order
from llmtk.training.planning import make_plan
from llmtk.training.predicting import check_predictions, check_room, read_questions
from llmtk.training.randomness import Randomness
from llmtk.training.router import RouterLoss
from llmtk.training.sharding import check_moving_reference, check_parallelism
from llmtk.training.stream import check_streaming

if TYPE_CHECKING:
    from pathlib import Path

    from llmtk.contract import Data
    from llmtk.run import Run


def check(run: Run) -> None:
    """Refuse what can be refused without data and model, cheapest first."""
    from llmtk.models.checks import check_model
    from llmtk.models.options import check_options

    run.stage.check(run)
    check_predictions(run)
    model, merges = run.config.model, run.config.train.merge_and_save
    check_model(model)
    check_options(model, run.config.peft, merges=merges, dropout=_keeps_dropout(run))
    optimizers.check_scheduler(run.config.train)
    check_engine(run.config.generation)
    if run.config.data.streaming:
        check_streaming(run)
    if run.config.samples.count and run.stage.head == "value":
        raise ConfigurationError(f"samples.count: a model of stage {run.stage_name} writes no text; set it to 0")


def read_rows(run: Run) -> None:
    """Read the rows, and refuse bad ones, and options that need evaluation rows where there are none."""
    from llmtk.data import read_splits

    run.splits = read_splits(run.config.data, run.stage.row_types, seed=run.data_seed)
    _check_evaluation(run)


def load(run: Run) -> None:
    """Load everything, cheapest first, so that what can be refused is refused before it costs anything."""
    check_parallelism(run.config)
    check(run)
    if run.stage.reference == "changing":
        check_moving_reference(run.config)
    _start(run)
    if run.config.model.trust_remote_code:
        run.notify("WARNING: model.trust_remote_code is on: Python code that comes with the model runs as you")
    read_rows(run)
    data = _encode_data(run)
    run.questions = read_questions(run) if run.config.train.do_predict else []
    run.train_rows, run.eval_rows, run.test_rows = data.train, data.eval, data.test
    run.train_lengths = row_lengths(data.train)
    run.fetcher = Fetcher(data.train, run.config.train.dataloader_num_workers)
    _load_models(run)
    check_room(run)
    optimizer = run.hooks.build_optimizer()
    run.backend.prepare(run.model, run.frozen, optimizer)
    run.optimizer = optimizer
    run.order = row_order(run.config, data, run.data_seed, run.global_rows, run.hooks)
    run.plan = make_plan(run)
    run.scheduler = optimizers.build_scheduler(optimizer, run.config.train, run.plan.max_steps)
    run.schedule_waits = optimizers.waits_for_evaluation(run.config.train)


def open_finished(run: Run, exported: Path, *, with_data: bool) -> None:
    """Load a finished run's model, and its data only if they are wanted."""
    if not hasattr(run, "backend"):
        from llmtk.models.saving import load_folder

        _start(run)
        like, dtype = run.config.model, run.backend.compute_dtype
        run.opened, run.tokenizer = load_folder(exported, like, dtype)
        if dtype == torch.float32 and like.quantization is None:
            run.opened.float()  # an adapter's base may be saved in less than it was trained on in
        _load_models(run)
        run.backend.place(run.model, run.frozen)
    if with_data and not hasattr(run, "eval_rows"):
        from llmtk.data import read_splits

        run.splits = read_splits(run.config.data, run.stage.row_types, seed=run.data_seed)
        run.eval_rows = run.hooks.build_data().eval


def load_data(run: Run) -> Data:
    """Read and encode the rows as a run does before it trains, without a model."""
    from llmtk.data import read_splits

    if not hasattr(run, "splits"):
        _meet(run)
        run.splits = read_splits(run.config.data, run.stage.row_types, seed=run.data_seed)
    return _encode_data(run)


def _start(run: Run) -> None:
    """Meet the other ranks, and settle on a folder."""
    _meet(run)
    if run.exported is None:
        run.folder.settle(run.backend)


def _meet(run: Run) -> None:
    """Make the backend, and check that all ranks run the same."""
    config = run.config
    # A finished run's model is opened whole.
    fsdp, deepspeed = (config.fsdp, config.deepspeed) if run.exported is None else (None, None)
    run.backend = Backend(config.train, str(run.folder.path), fsdp=fsdp, deepspeed=deepspeed)
    run.console.speaks = run.backend.is_main
    run.randomness = Randomness(run.config.train.seed, run.backend.rank)
    digest = manager.digest(manager.plugin_versions(run.manager))
    if len(set(run.gather(digest))) > 1:
        raise ConfigurationError("the ranks have other plugins, or other versions of them; install the same on all")


def _encode_data(run: Run) -> Data:
    """Load the tokenizer, say what there is to say of the rows, and encode them."""
    _load_tokenizer(run)
    for notice in run.splits.notices:
        run.notify(notice)
    return run.hooks.build_data()


def _load_tokenizer(run: Run) -> None:
    from llmtk.data import chat_template
    from llmtk.models.tokenizers import load_tokenizer

    run.tokenizer = load_tokenizer(run.config.model, lambda: (text for row in run.splits.train for text in row.texts()))
    if run.config.data.template is not None:
        # It goes along with the exported model, which is then asked as it was trained.
        run.tokenizer.chat_template = chat_template(run.tokenizer, run.config.data.template)


def _load_models(run: Run) -> None:
    models = run.hooks.build_models()
    run.model = models.root
    run.frozen = dict(models.frozen)
    run.changing = models.changing
    if not _keeps_dropout(run):
        from llmtk.models.loading import disable_dropout

        disable_dropout(run.model)
    run.model.train()
    router, noise = RouterLoss(run.model, run.notify), _embedding_noise(run)
    own = _scorer(run, run.model)
    scorers: dict[str | None, Scorer] = {None: own, **dict.fromkeys(models.views, own)}
    scorers |= {name: _scorer(run, model) for name, model in run.frozen.items()}
    run.forward = Forward(run, scorers, models.views, router, noise)
    run.forward.compiled = _compile(run)


def _compile(run: Run) -> bool:
    """Compile the layers if the configuration asks for it; say why not, where it cannot be done."""
    train = run.config.train
    if not train.compiles or run.exported is not None:
        return False
    from llmtk.training.compiling import compile_layers

    backend, mode = train.torch_compile_backend, train.torch_compile_mode
    reason = compile_layers(run.model, run.forward.scorers[None], run.gather, backend, mode)
    if reason:
        run.notify(f"train.torch_compile is left out, the model computes as without: {reason}")
    return reason is None


def _keeps_dropout(run: Run) -> bool:
    """Whether dropout stays on: as the stage has it, unless the user says otherwise."""
    asked = run.config.train.disable_dropout
    return run.stage.dropout if asked is None else not asked


def _embedding_noise(run: Run) -> EmbeddingNoise | None:
    alpha, purpose = run.config.train.neftune_noise_alpha, f"neftune/{run.rank}"
    return None if alpha is None else EmbeddingNoise(run.model, alpha, lambda: run.generator(purpose))


def _scorer(run: Run, model: nn.Module) -> Scorer:
    """Choose how to score a model, before it is wrapped."""
    model.to(run.device)
    forced = "train.scoring" if run.config.train.scoring == "padded" else ""
    return scoring.choose(model, run.gather, forced)


def _check_evaluation(run: Run) -> None:
    """Refuse options that need evaluations where there are none."""
    config = run.config.train
    if run.splits.eval is not None and config.evaluates:
        return
    needing = [
        ("train.do_train: false", not config.do_train),
        ("train.eval_strategy", config.eval_strategy == "steps"),
        ("train.load_best_model_at_end", config.load_best_model_at_end),
        (f"train.lr_scheduler_type: {config.lr_scheduler_type}", optimizers.waits_for_evaluation(config)),
        ("samples.count", run.config.samples.count > 0),
    ]
    if asked := [name for name, asks in needing if asks]:
        if run.splits.eval is not None:
            none = "eval_strategy: no" if config.do_eval else "do_eval: false"
            raise ConfigurationError(f"{asked[0]} needs evaluations, and {none} makes none; change one")
        raise ConfigurationError(f"{asked[0]} needs evaluation data: give data.eval, a share (0.1) or a file")
