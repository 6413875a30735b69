"""Make the tiny model that llmtk carries: python core/scripts/make_builtin_model.py --output FOLDER

It trains a llama of 0.85 million parameters from scratch on two-digit addition (``llmtk.demo.addition``), the answers
alone, and stops when it answers about half of the held-out problems: a minute or two on one core. Half is the point:
every stage's demo has something to improve, and a sample of the model's own answers holds right and wrong ones.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from itertools import count
from random import Random

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llmtk.config.sections import TokenizerConfig
from llmtk.demo import addition
from llmtk.models.saving import save_model
from llmtk.models.tokenizers import stop_token_ids, train_tokenizer

BATCH, WARMUP, LEARNING_RATE = 64, 100, 2e-3
CHECK_FROM, CHECK_EVERY, CHECK_ROWS = 400, 20, 500
TRAIN_PROBLEMS, VOCABULARY = 11_000, 384
IGNORED = -100

Example = tuple[list[int], list[int]]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer to which a number's word is one token, and each digit is one."""
    texts = [problem.prompt for problem in addition.problems("train", TRAIN_PROBLEMS) if problem.words]
    return train_tokenizer(TokenizerConfig(kind="bpe", vocab_size=VOCABULARY), [*texts, "user", "assistant"])


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return a llama with random weights that speaks the tokenizer's tokens, 512 of them at most."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=stop_token_ids(tokenizer), pad_token_id=tokenizer.pad_token_id, max_new_tokens=48
    )
    return model


def encode(tokenizer: PreTrainedTokenizerFast, row: addition.Row) -> Example:
    """Return a dialogue's token ids, and its targets: the answer and its stop token, nothing else."""
    prompt = tokenizer.apply_chat_template(row["messages"][:1], add_generation_prompt=True, tokenize=False)
    prompt_ids = tokenizer.encode(prompt)
    answer_ids = tokenizer.encode(row["messages"][1]["content"] + "<|im_end|>")
    return prompt_ids + answer_ids, [IGNORED] * len(prompt_ids) + answer_ids


def collate(examples: list[Example], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and targets, each (rows, longest), padded on the right."""
    width = max(len(ids) for ids, _ in examples)
    ids = torch.tensor([ids + [pad_id] * (width - len(ids)) for ids, _ in examples])
    targets = torch.tensor([targets + [IGNORED] * (width - len(targets)) for _, targets in examples])
    return ids, targets


def batches(examples: list[Example], pad_id: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield shuffled batches without end."""
    random = Random(seed)
    while True:
        order = random.sample(examples, len(examples))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            yield collate(order[start : start + BATCH], pad_id)


@torch.no_grad()
def exact_match(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[addition.Row]) -> float:
    """Return the share of rows that the model answers right, each token the likeliest one."""
    model.eval()
    prompts = [
        tokenizer.apply_chat_template(row["messages"][:1], add_generation_prompt=True, tokenize=False) for row in rows
    ]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    answers = model.generate(**batch, do_sample=False)[:, batch["input_ids"].shape[1] :]
    model.train()
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return sum(map(addition.is_correct, rows, texts)) / len(rows)


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, target: float, seed: int) -> None:
    """Train on the answers until the held-out exact match reaches ``target``."""
    examples = [encode(tokenizer, row) for row in addition.rows("train", TRAIN_PROBLEMS, seed)]
    held_out = addition.rows("held-out", CHECK_ROWS, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP))
    started = time.perf_counter()
    for step, (ids, targets) in zip(count(1), batches(examples, tokenizer.pad_token_id, seed)):
        loss = model(input_ids=ids, labels=targets, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0 or (step >= CHECK_FROM and step % CHECK_EVERY == 0):
            reached = exact_match(model, tokenizer, held_out)
            seconds = time.perf_counter() - started
            print(f"step {step:5}  loss {loss.item():.4f}  held-out exact match {reached:.3f}  {seconds:.0f} s")
            if reached >= target:
                return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, help="folder to write the model to")
    parser.add_argument("--target", type=float, default=0.57, help="held-out exact match at which to stop")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    torch.set_num_threads(1)  # one order of summation: the same machine makes the same weights again
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    print(f"{model.num_parameters():,} parameters")
    train(model, tokenizer, arguments.target, arguments.seed)
    save_model(model.to(torch.bfloat16), tokenizer, arguments.output)


if __name__ == "__main__":
    main()
