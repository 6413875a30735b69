"""The sections of a run's configuration that every stage shares.

Keys under ``train`` are named, and mean, as in transformers' ``TrainingArguments``. A stage adds a section of its own,
named after it. The text under each key is what ``llmtk show`` and the JSON Schema print.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from llmtk.errors import suggest


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors, values do not change, docstrings are the help."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


def _apart(columns: dict[str, str | None]) -> dict[str, str | None]:
    names = [name for name in columns.values() if name is not None]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"several columns are named {twice[0]}; give each a name of its own")
    return columns


Columns = Annotated[dict[str, str | None], AfterValidator(_apart)]
"""A column's name in the data -> its name in one of llmtk's formats, or null to leave it out."""


class SourceConfig(Section):
    """One source of rows, where more is to be said than its path."""

    path: str
    """A file, a folder that `datasets` has saved, a data set's name on the hub, or a name from data.catalog."""
    name: str | None = None
    """Which configuration of a hub data set, as in `datasets.load_dataset`."""
    split: str | None = None
    """Which split of a hub data set, or of a saved one that has several."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set."""
    format: str | None = None
    """The format's name, where the columns fit several. By default it is told by the columns."""
    columns: Columns | None = None
    """As data.columns, for this source alone."""
    weight: float = Field(default=1.0, gt=0)
    """How often each row comes in an epoch. 2: twice. 0.5: every other row, and the others in the next epoch. Training
    data alone."""


def _names_source(item: object) -> bool:
    """Tell a source from a row: it has a path, and all its keys are those of a source, or nearly."""
    if not isinstance(item, Mapping):
        return isinstance(item, str | SourceConfig)
    known = SourceConfig.model_fields
    return "path" in item and all(key in known or suggest(str(key), known) for key in item)


def _kind_of_list(value: object) -> str:
    return "sources" if isinstance(value, list) and any(map(_names_source, value)) else "rows"


Source = (
    str
    | SourceConfig
    | Annotated[
        Annotated[list[str | SourceConfig], Tag("sources")] | Annotated[list[dict[str, Any]], Tag("rows")],
        Discriminator(_kind_of_list),
    ]
)
"""A source, several, or (from Python) the rows themselves. A text is a source's path."""


HELD_OUT = ("eval", "test")
"""The splits of the data that nothing is learnt from."""


class TokenizerConfig(Section):
    """A tokenizer trained on the run's own training data."""

    kind: Literal["char", "bpe", "byte"]
    """`char`: one token a character; `bpe`: byte-level BPE; `byte`: one token a byte."""
    vocab_size: int = Field(8192, ge=2)
    """Tokens in a `bpe` vocabulary, special tokens included. The other kinds have the size that they have."""

    @model_validator(mode="after")
    def _size_is_for_bpe(self) -> TokenizerConfig:
        if self.kind != "bpe" and "vocab_size" in self.model_fields_set:
            raise ValueError(f"vocab_size is used by kind: bpe alone; kind: {self.kind} has the size that it has")
        return self


class ModelConfig(Section):
    """Which model is trained."""

    name_or_path: str | None = None
    """A folder, a hub name, or `builtin` for the tiny model that llmtk carries. A folder with an adapter: the adapter
    is trained on, on its base."""
    from_config: dict[str, Any] | None = None
    """Train from scratch: a transformers `model_type` and any fields of its configuration."""
    tokenizer: TokenizerConfig | str | None = None
    """A tokenizer's folder or hub name, or how to train one. By default the model's own."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the loaded weights. `auto`: float32 for weights that are trained; for those frozen under an adapter, the
    type that the run computes in."""
    attn_implementation: str | None = None
    """As in transformers' `from_pretrained`: `sdpa`, `eager`, `flash_attention_2`, ... By default its own."""
    quantization: Literal["4bit", "8bit"] | None = None
    """Load the weights quantised, by bitsandbytes: a quarter or half of the memory, for an adapter to be trained on."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """The values that 4 bits stand for: normal quantiles (nf4, arXiv 2305.14314) or floating point (fp4)."""
    bnb_4bit_use_double_quant: bool = True
    """Quantise the scales of 4-bit weights as well."""
    bnb_4bit_compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What 4-bit weights are multiplied in. `auto`: what the run computes in."""
    train_only: int | list[str] | None = None
    """Train these parameters alone: the number of the last layers, or names of modules or parameters, `*` standing for
    anything (`[layers.30, layers.31, lm_head]`)."""
    freeze: int | list[str] | None = None
    """Train all but these: the number of the first layers, or names as in train_only (`[embed_tokens]`)."""
    reference: str | None = None
    """The reference model's folder or hub name (stages that need one). By default the model itself, as it is when the
    run starts."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you have read that code."""

    @model_validator(mode="after")
    def _one_origin(self) -> ModelConfig:
        if self.name_or_path and self.from_config:
            raise ValueError("give name_or_path (continue a model) or from_config (train from scratch), not both")
        if self.from_config is not None and not isinstance(self.from_config.get("model_type"), str):
            raise ValueError("from_config needs model_type, for example {model_type: llama, hidden_size: 256, ...}")
        return self

    @model_validator(mode="after")
    def _quantised_as_asked(self) -> ModelConfig:
        for key in ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype"):
            if key in self.model_fields_set and self.quantization != "4bit":
                raise ValueError(f"{key} needs quantization: 4bit; it is {self.quantization or 'not given'}")
        if self.quantization and self.from_config:
            raise ValueError("quantization is for trained weights: from_config has random ones. Leave one out")
        return self

    @model_validator(mode="after")
    def _some_is_frozen(self) -> ModelConfig:
        if self.train_only is not None and self.freeze is not None:
            raise ValueError("give train_only or freeze, not both: each says what the other leaves")
        for key in ("train_only", "freeze"):
            if (asked := getattr(self, key)) is not None and (not asked or (isinstance(asked, int) and asked < 0)):
                raise ValueError(
                    f"{key} is {asked}: give a number of layers from 1, or names. Leave it out to train all"
                )
        return self


class DataConfig(Section):
    """Where rows come from, and how they become tokens."""

    train: Source | None = None
    """Training data: a JSON, JSONL, CSV, Parquet or text file, a folder that `datasets` has saved, a data set's name on
    the hub, or a name from data.catalog. Or several, each with settings of its own: {path: ..., weight: 2}."""
    eval: float | Source | None = None
    """Evaluation data: a share of the training data to hold out (0.1), or sources."""
    test: float | Source | None = None
    """Data that the finished model is evaluated on once, its metrics named `test_...`: a share to hold out, or
    sources."""
    columns: Columns = Field(default_factory=dict)
    """Names of columns in the data -> those of llmtk's formats: {question: prompt, answer: completion}. `a.b` is the
    column b inside of a; null leaves a column out. For every source without columns of its own."""
    catalog: str | None = None
    """A YAML file that names your own data sets: NAME: PATH, or NAME: {path: ..., columns: ...}. Its relative paths
    start at its folder."""
    max_length: int = Field(2048, ge=2)
    """Tokens of a sequence, at most."""
    max_prompt_length: int | None = Field(default=None, ge=1)
    """Tokens of a prompt (what stands before the first target), at most. Its beginning is cut, or the row is left out,
    as on_too_long says."""
    on_too_long: Literal["truncate", "drop"] = "truncate"
    """What happens to a row over max_length: it is cut, or it is left out. Both are counted and said."""
    truncation_side: Literal["left", "right"] = "right"
    """Where a row is cut: at its end, or at its beginning, where the prompt gives way to the answers."""
    loss_on: Literal["assistant", "last_turn", "completion", "everything"] | None = None
    """What is learnt. `assistant`: all turns of the assistant, the default for dialogues; `last_turn`: the last;
    `completion`: what follows the prompt, the default for rows of prompt and completion; `everything`: every token."""
    template: str | None = None
    """The chat template: a file, or `chatml`. By default the tokenizer's own."""
    streaming: bool = False
    """Read the training data as they go, for what memory cannot hold: JSONL, CSV and Parquet files and data sets on the
    hub. Rows are shuffled within blocks of 1,024; bad ones are told when they come. Needs train.max_steps."""
    num_proc: int = Field(default=1, ge=1)
    """Processes in which rows are put through the template and tokenised. More pay for very many dialogues."""
    cache: bool | None = None
    """Keep the tokens on disk, under a hash of what they follow from, for the next run with the same. By default for
    10,000 rows and more."""

    @model_validator(mode="after")
    def _shares_are_shares(self) -> DataConfig:
        for name in HELD_OUT:
            if (percent := _percent(getattr(self, name))) is not None:
                raise ValueError(f"{name}: a share is written {percent / 100:g}, not {getattr(self, name)}")
        shares = shares_of(self)
        for name, share in shares.items():
            if not 0 < share < 1:
                raise ValueError(f"{name} is a share of the training data between 0 and 1, or files; it is {share}")
        if sum(shares.values()) >= 1:
            raise ValueError(f"eval and test hold out {sum(shares.values()):g} of the training data, which leaves none")
        return self

    @model_validator(mode="after")
    def _streams_have_no_end(self) -> DataConfig:
        if self.streaming and shares_of(self):
            raise ValueError("streaming: a share of a stream cannot be held out; give files as eval and test")
        if self.streaming and any(source.weight != 1 for source in sources_of(self.train)):
            raise ValueError("streaming: sources are read one after the other, as they are; leave weight out")
        if self.streaming and self.cache:
            raise ValueError("streaming: nothing of a stream is kept; leave cache out")
        return self

    @model_validator(mode="after")
    def _lengths_belong_together(self) -> DataConfig:
        if self.on_too_long == "drop" and self.truncation_side != "right":
            raise ValueError("truncation_side is used by on_too_long: truncate alone")
        if self.max_prompt_length is not None and self.max_prompt_length >= self.max_length:
            raise ValueError(
                f"max_prompt_length, {self.max_prompt_length}, leaves no room for an answer within max_length, "
                f"{self.max_length}"
            )
        if self.max_prompt_length is not None and self.loss_on == "everything":
            raise ValueError("max_prompt_length: with loss_on: everything no part of a row is its prompt")
        return self

    @model_validator(mode="after")
    def _weights_are_for_training(self) -> DataConfig:
        for name in HELD_OUT:
            if any(source.weight != 1 for source in sources_of(getattr(self, name))):
                raise ValueError(f"{name} has a source with a weight; every row is evaluated once. Leave weight out")
        return self


def _percent(value: object) -> float | None:
    text = value.strip().removesuffix("%").strip() if isinstance(value, str) and value.strip().endswith("%") else ""
    return float(text) if text.replace(".", "", 1).isdecimal() else None


def shares_of(config: DataConfig) -> dict[str, float]:
    """Return the shares of the training data that are held out, by split."""
    return {name: value for name in HELD_OUT if isinstance(value := getattr(config, name), float)}


def sources_of(given: object) -> list[SourceConfig]:
    """Return the sources that a split names; none for a share, or for rows."""
    items = given if isinstance(given, list) else [given]
    found = [SourceConfig(path=item) if isinstance(item, str) else item for item in items]
    return [item for item in found if isinstance(item, SourceConfig)]


class PeftConfig(Section):
    """A parameter-efficient method in place of full training. Keys are peft's own."""

    method: Literal["lora"] = "lora"
    """The method."""
    r: int = Field(16, ge=1, le=2**16)
    """Rank of the update."""
    lora_alpha: float = Field(32, gt=0)
    """The update is scaled by lora_alpha / r."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout in front of the update."""
    target_modules: str | list[str] = "all-linear"
    """Modules that get an adapter: `all-linear`, names, or a regular expression."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases are trained as well."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead (arXiv 2312.03732)."""
    use_dora: bool = False
    """Train magnitude and direction apart (arXiv 2402.09353)."""
    init_lora_weights: bool | str = True
    """How the first of an adapter's two matrices is drawn, the second being 0: `true`, uniformly, as in the paper; or
    `gaussian`, with a standard deviation of 1 / r."""
    modules_to_save: list[str] | None = None
    """Modules trained in full beside the adapter, and saved with it."""

    @model_validator(mode="after")
    def _begins_as_nothing(self) -> PeftConfig:
        if self.init_lora_weights is not True and self.init_lora_weights != "gaussian":
            raise ValueError(
                f"init_lora_weights is {self.init_lora_weights}: give true or gaussian. With peft's other ways a new "
                "adapter is not nothing (false, orthogonal), changes the weights that it stands on (pissa, olora, "
                "loftq, corda), or needs data (eva); here a model with its adapter off is the model as it came"
            )
        return self


class FsdpConfig(Section):
    """Shard the trained model over the ranks (PyTorch's FSDP2), in place of a copy of it on each."""

    cpu_offload: bool = False
    """Keep weights, gradients and optimizer state in the host's memory: less on the device, and slower."""
    reshard_after_forward: bool = True
    """Let go of a layer's weights after its forward pass, and gather them again for the backward pass."""


class DeepspeedConfig(Section):
    """Spread the trained model over the ranks by DeepSpeed's ZeRO, in place of a copy of it on each."""

    zero_stage: Literal[0, 1, 2, 3] = 2
    """What is spread: 1 optimizer state, 2 gradients too, 3 weights too. 0, nothing, is what there is without it."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """Where optimizer state is kept, besides the device."""
    offload_param: Literal["none", "cpu"] = "none"
    """Where weights are kept, besides the device (zero_stage: 3)."""

    @model_validator(mode="after")
    def _stages_that_offload(self) -> DeepspeedConfig:
        if self.offload_param != "none" and self.zero_stage != 3:
            raise ValueError(f"offload_param needs zero_stage: 3; it is {self.zero_stage}")
        if self.offload_optimizer != "none" and self.zero_stage < 1:
            raise ValueError("offload_optimizer needs zero_stage: 1, 2 or 3; it is 0")
        return self


class SamplesConfig(Section):
    """Generated samples, written to `samples.jsonl` at each evaluation."""

    count: int = Field(0, ge=0)
    """How many evaluation prompts are answered. 0: none."""
    max_new_tokens: int = Field(64, ge=1)
    """Length of an answer, at most."""
    temperature: float = Field(0.0, ge=0)
    """0: the likeliest token each time."""


class PredictConfig(Section):
    """Predictions of the finished model (train.do_predict)."""

    data: str | None = None
    """Rows to answer, of any kind that `llmtk predict` takes. By default those of data.test."""
    reference: str | None = None
    """The column that answers are measured against. By default `reference` or `answer`."""
    metrics: list[str] | dict[str, dict[str, Any]] | None = None
    """Metrics of text, or each with its options: {bleu: {tokenize: char}}. By default all installed ones that need no
    option."""
    n: int = Field(1, ge=1)
    """Answers to each row; the first is measured."""
    max_new_tokens: int = Field(64, ge=1)
    """Tokens of an answer, at most."""
    temperature: float = Field(1.0, ge=0)
    """Divides the logits. 0: the likeliest token each time."""
    top_k: int = Field(0, ge=0)
    """Keep the likeliest tokens, so many. 0: all."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Keep the fewest tokens that have this share."""
    min_p: float = Field(0.0, ge=0, le=1)
    """Keep tokens with this share of the likeliest one's probability."""
    repetition_penalty: float = Field(1.0, gt=0)
    """Over 1: says less again."""
    stop_strings: list[str] = Field(default_factory=list)
    """Texts that end an answer, and belong to it."""
    seed: int = 0
    """Decides what is drawn."""

    @property
    def sampling(self) -> dict[str, Any]:
        """The settings of `Sampling` among these."""
        settings = self.model_dump(exclude={"data", "reference", "metrics"})
        return {**settings, "stop_strings": tuple(self.stop_strings)}

    @model_validator(mode="after")
    def _stops_are_texts(self) -> PredictConfig:
        if not all(self.stop_strings):
            raise ValueError("stop_strings has an empty text, which would end every answer at once")
        return self


class GenerationConfig(Section):
    """How completions are written, wherever they are: in demos, samples and reinforcement stages."""

    engine: str = "builtin"
    """`builtin`, or an installed engine: a name of the entry points `llmtk.generators`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of an installed engine."""
    batch_size: int = Field(64, ge=1)
    """Sequences written side by side, at most."""
    cuda_graphs: bool = True
    """On CUDA the builtin engine records a step once, and launches it as a graph for each further token. It goes
    without where that is not proven right on the model, which it says, and where forwards are collective."""

    @model_validator(mode="after")
    def _options_are_for_engines(self) -> GenerationConfig:
        if self.options and self.engine == "builtin":
            raise ValueError("options are for installed engines; the builtin one has none")
        return self


Strategy = Literal["no", "steps", "epoch"]


def _pairs(value: Any) -> Any:
    """Take apart arguments that are written as in TrainingArguments: `momentum=0.9,nesterov=true`."""
    if not isinstance(value, str):
        return value
    from llmtk.config.reading import read_value

    pairs = [pair.partition("=") for pair in value.split(",") if pair.strip()]
    if not all(key.strip() and equals for key, equals, _ in pairs):
        raise ValueError(f"arguments are written name=value,name=value, or as keys and values; got {value!r}")
    return {key.strip(): read_value(text.strip()) for key, _, text in pairs}


def _trackers(value: Any) -> Any:
    """Return a single tracker as a list of one; `none`, as in TrainingArguments, is no tracker."""
    if not isinstance(value, str):
        return value
    return [] if value == "none" else [value]


class TrainConfig(Section):
    """The training loop. Keys mean what they mean in transformers' TrainingArguments."""

    do_train: bool = True
    """Train. false: evaluate the model as it is, write the results, and stop."""
    do_eval: bool = True
    """Evaluate as eval_strategy says. false: never, as under eval_strategy: no."""
    do_predict: bool = False
    """Answer rows with the finished model: those of data.test, or of predict.data. The answers stand in
    `predictions.jsonl`, and what they are worth among the results."""
    learning_rate: float = Field(5e-5, ge=0)
    """Peak learning rate."""
    num_train_epochs: float = Field(3.0, gt=0)
    """Passes over the training data. A fraction is allowed."""
    max_steps: int = Field(-1, ge=-1)
    """Optimizer steps; overrides num_train_epochs where it is over 0."""
    per_device_train_batch_size: int = Field(8, ge=1)
    """Rows of a micro-batch on each rank. The global batch is this x gradient_accumulation_steps x ranks rows."""
    per_device_eval_batch_size: int = Field(8, ge=1)
    """Rows of a micro-batch in evaluation."""
    gradient_accumulation_steps: int = Field(1, ge=1)
    """Micro-batches of an optimizer step on each rank."""
    micro_batch_tokens: int | None = Field(None, ge=1)
    """Cut micro-batches of at most this many tokens (a row over it stands alone), few and about equal,
    instead of per_device_train_batch_size rows. The global batch, and so the update, stays the same."""
    warmup_steps: int = Field(0, ge=0)
    """Steps in which the learning rate rises from 0."""
    warmup_ratio: float = Field(0.0, ge=0, le=1)
    """The same as a share of all steps; warmup_steps goes first."""
    lr_scheduler_type: str = "linear"
    """Any of transformers' schedulers: linear, cosine, cosine_with_min_lr, constant, ..."""
    lr_scheduler_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the scheduler, for example {min_lr: 1e-5}."""
    optim: str = "adamw_torch_fused"
    """The optimizer: adamw_torch_fused, adamw_torch, adafactor, sgd, paged_adamw_8bit, ... and torch's others, muon
    among them."""
    optim_args: Annotated[dict[str, Any], BeforeValidator(_pairs)] = Field(default_factory=dict)
    """Arguments of the optimizer beside those below, for example {momentum: 0.9}; or text, `momentum=0.9,...`."""
    weight_decay: float = Field(0.0, ge=0)
    """Weight decay on all weights but biases and norms."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of the first moment."""
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    """Decay of the second moment."""
    adam_epsilon: float = Field(1e-8, ge=0)
    """Added to the root of the second moment."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Gradients are scaled down to this norm. 0: no clipping."""
    bf16: bool | None = None
    """Compute in bfloat16 (autocast). By default where the device has it."""
    fp16: bool = False
    """Compute in float16 with loss scaling."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    torch_compile: bool = False
    """Compile the model's layers (torch.compile), where that is proven to give the same; the plan says whether, or why
    not. Saves time on GPUs; the first steps take longer."""
    torch_compile_backend: str | None = None
    """Backend of torch.compile: inductor by default. Switches torch_compile on."""
    torch_compile_mode: str | None = None
    """Mode of torch.compile: default, reduce-overhead, max-autotune, ... Switches torch_compile on."""
    scoring: Literal["auto", "padded"] = "auto"
    """How log-probs are computed. `auto`: packed, without padding, where that is proven right on the model, else
    padded; the plan says which, and why. `padded`: the plain way in any case."""
    label_smoothing_factor: float = Field(0.0, ge=0, lt=1)
    """Share of the target's weight that is spread over the vocabulary (stages that declare it)."""
    neftune_noise_alpha: float | None = Field(None, gt=0)
    """Noise on the embeddings in training (arXiv 2310.05914), uniform in +-alpha / sqrt(L d), L being the sequence's
    own length and d the width of the model (stages that declare it)."""
    precompute_reference: bool = False
    """Compute the reference's log-probs once, before training, and keep them on disk under a hash of model and data:
    no second model, no second forward (stages that declare it)."""
    disable_dropout: bool | None = None
    """Switch all dropout off. By default what the stage says."""
    seed: int = 42
    """Seed of everything that is drawn."""
    data_seed: int | None = None
    """Seed of the data order. By default `seed`."""
    group_by_length: bool = False
    """Draw batches of rows of about equal length: less padding where it is padded, micro-batches of about equal cost
    where they are cut by rows. The order is random still, but less so."""
    length_column_name: str = "length"
    """The column of the encoded rows that group_by_length goes by. `length`: a row's tokens."""
    dataloader_num_workers: int = Field(0, ge=0)
    """Threads that fetch the rows of coming batches while a step is computed. 0: rows are fetched when they are wanted.
    Rows are tokens in memory already, so this pays for data sets of a stage's own that do more."""
    dataloader_pin_memory: bool | None = None
    """Copy batches through pinned memory, beside the device's work. By default where there is a CUDA device."""
    logging_steps: int = Field(10, ge=1)
    """Steps between two lines of metrics."""
    eval_strategy: Strategy = "epoch"
    """When to evaluate, if there is evaluation data."""
    eval_steps: int | None = Field(None, ge=1)
    """Steps between evaluations under eval_strategy: steps. By default logging_steps."""
    save_strategy: Strategy = "steps"
    """When to write a checkpoint. One is always written at the end, and when a signal stops the run."""
    save_steps: int = Field(500, ge=1)
    """Steps between checkpoints under save_strategy: steps."""
    save_total_limit: int | None = Field(None, ge=1)
    """Checkpoints kept, newest first. The best and the last are kept in any case."""
    load_best_model_at_end: bool = False
    """Export the best checkpoint's model instead of the last step's."""
    metric_for_best_model: str = "loss"
    """The evaluation metric that decides which checkpoint is best."""
    greater_is_better: bool | None = None
    """By default false for a metric that is called a loss, nll, perplexity or kl, else true."""
    max_nonfinite_steps: int = Field(3, ge=1)
    """A step whose loss or gradient is not finite changes no weight; this many in a row stop the run."""
    ddp_backend: Literal["nccl", "gloo", "mpi", "xccl", "hccl"] | None = None
    """What gradients go through between ranks. By default nccl on CUDA, gloo on a CPU."""
    ddp_find_unused_parameters: bool = False
    """As in torch's DistributedDataParallel."""
    merge_and_save: bool = False
    """Merge the trained adapter into its base when the model is exported: a full model, which needs neither peft nor
    the base, in the dtype that the base is saved in. The adapter itself goes into a folder `adapter` within."""
    log_level: Literal["debug", "info", "warning", "error", "critical", "passive"] = "passive"
    """Lowest level of transformers', datasets', accelerate's and peft's messages, which `run.log` keeps beside all that
    the run says. `passive`: as these packages have it."""
    report_to: Annotated[list[str], BeforeValidator(_trackers)] = Field(default_factory=list)
    """Trackers of Accelerate's: tensorboard, wandb, mlflow, ... One may stand without a list; `none` is no tracker."""
    run_name: str | None = None
    """The run's name in trackers. By default the output folder's."""
    resume_from_checkpoint: str | None = None
    """A checkpoint's folder, or `auto` for the newest sound one. The same as --resume."""

    @property
    def compiles(self) -> bool:
        """Whether layers are compiled: a backend or a mode alone asks for it, as in TrainingArguments."""
        return self.torch_compile or bool(self.torch_compile_backend or self.torch_compile_mode)

    @property
    def evaluates(self) -> bool:
        """Whether evaluations are wanted, if there is data for them."""
        return self.do_eval and self.eval_strategy != "no"

    @model_validator(mode="after")
    def _belongs_together(self) -> TrainConfig:
        if self.bf16 and self.fp16:
            raise ValueError("bf16 and fp16 exclude each other")
        if self.max_steps == 0:
            raise ValueError("max_steps is 0: give a number of steps, or -1 to train for num_train_epochs")
        if not self.do_eval and self.eval_strategy != "no" and "eval_strategy" in self.model_fields_set:
            raise ValueError(f"do_eval: false and eval_strategy: {self.eval_strategy} exclude each other")
        if self.do_predict and not self.do_train:
            raise ValueError("do_train: false leaves no trained model to predict with; ask it as it is: llmtk predict")
        if not self.do_train and not self.evaluates:
            raise ValueError("do_train: false evaluates, and do_eval: false or eval_strategy: no forbid it: change one")
        if self.length_column_name != "length" and not self.group_by_length:
            raise ValueError("length_column_name is used by group_by_length: true alone; leave it out")
        if self.eval_steps is not None and self.eval_strategy != "steps":
            raise ValueError(f"eval_steps needs eval_strategy: steps; it is {self.eval_strategy}")
        if "save_steps" in self.model_fields_set and self.save_strategy != "steps":
            raise ValueError(f"save_steps needs save_strategy: steps; it is {self.save_strategy}")
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError("give warmup_steps or warmup_ratio, not both")
        return self
