"""Pretraining, from scratch or continued: next-token prediction over packed blocks of text.

Documents are joined to one stream of tokens, an end-of-text token behind each, and the stream is cut into blocks of
`data.max_length`. Over the N tokens of the whole optimizer window, on all ranks:

    loss  -1/N  sum_t  log pi(x_t | the tokens before it in its block)

Each block begins with the last token of the one before it, so that every token of the stream is a target once.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import numpy as np
from numpy.typing import NDArray

from llmtk import Batch, Demo, Group, LossOutput, Mean, Round, RunView, Sequence, Stage, Term
from llmtk.contract import Dataset, Row
from llmtk.data import Row as DataRow
from llmtk.demo import addition


class Blocks:
    """A stream of tokens (tokens,) as blocks of `length` inputs, each with the token that follows its last.

    `starts` (documents,) are the positions at which documents begin, `places` where they come from.
    """

    def __init__(
        self, stream: NDArray[np.int32], length: int, starts: SequenceOf[int], places: SequenceOf[str]
    ) -> None:
        self.stream = stream
        self.length = length
        self._starts = np.asarray(starts)
        self._places = places

    def __len__(self) -> int:
        return -(-(len(self.stream) - 1) // self.length)

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = index * self.length
        document = int(np.searchsorted(self._starts, start, side="right")) - 1
        place = f"{self._places[document]} from token {start - self._starts[document]}"
        return {"input_ids": self.stream[start : start + self.length + 1], "place": place}


class Pretraining(Stage):
    """Every token is a target. Attention does not stop at a document's end, as is usual in pretraining."""

    summary = "Pretraining, from scratch or continued: next-token prediction over packed blocks of text"
    paper = "arXiv 2005.14165, section 2"
    citation = """
        @misc{brown2020language,
            title = {{Language Models are Few-Shot Learners}},
            author = {Tom B. Brown and Benjamin Mann and Nick Ryder and Melanie Subbiah and Jared Kaplan and
                      Prafulla Dhariwal and Arvind Neelakantan and Pranav Shyam and Girish Sastry and Amanda
                      Askell and Sandhini Agarwal and Ariel Herbert-Voss and Gretchen Krueger and Tom
                      Henighan and Rewon Child and Aditya Ramesh and Daniel M. Ziegler and Jeffrey Wu and
                      Clemens Winter and Christopher Hesse and Mark Chen and Eric Sigler and Mateusz Litwin
                      and Scott Gray and Benjamin Chess and Jack Clark and Christopher Berner and Sam
                      McCandlish and Alec Radford and Ilya Sutskever and Dario Amodei},
            year = {2020},
            eprint = {2005.14165},
            archivePrefix = {arXiv},
            primaryClass = {cs.CL},
        }
    """
    row_types = ("text",)
    honours = frozenset({"label_smoothing_factor", "neftune_noise_alpha"})
    dropout = True
    defaults = {"train": {"learning_rate": 5e-4, "lr_scheduler_type": "cosine"}}

    def encode_rows(self, run: RunView, rows: SequenceOf[DataRow]) -> Dataset:
        """Join the documents to one stream, and cut it into blocks."""
        documents = super().encode_rows(run, rows)
        end = run.tokenizer.eos_token_id
        if end is None and len(documents) > 1:
            run.notify("The tokenizer has no end-of-text token: documents follow each other without one")
        pieces, starts, places, at = [], [], [], 0
        for index in range(len(documents)):
            document = documents[index]
            ids = document["input_ids"] if end is None else [*document["input_ids"], end]
            pieces.append(np.asarray(ids, dtype=np.int32))
            starts.append(at)
            places.append(document["place"])
            at += len(ids)
        return Blocks(np.concatenate(pieces), run.max_length, starts, places)

    def prepare_batch(self, run: RunView, rows: list[Row]) -> Round:
        return Round.of([self._group(row) for row in rows])

    def compute_loss(self, run: RunView, batch: Batch) -> LossOutput:
        smoothing = run.setting("label_smoothing_factor")
        scores = run.score(batch, also=["vocab_mean"] if smoothing else [])
        logps = scores.logps
        smoothed = logps if scores.vocab_mean is None else (1 - smoothing) * logps + smoothing * scores.vocab_mean
        perplexity = Mean(-logps.detach().sum(), len(logps), then="exp")
        return LossOutput({"loss": Term(-smoothed.sum(), per="tokens")}, {"perplexity": perplexity}, scores)

    def _group(self, row: Row) -> Group:
        targets = np.ones(len(row["input_ids"]), dtype=bool)
        targets[0] = False
        sequence = Sequence(row["input_ids"], targets)
        return Group([sequence], {"tokens": len(targets) - 1}, place=row["place"])

    def demo(self) -> Demo:
        train = {"max_steps": 60, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "warmup_steps": 10}
        return Demo(
            train=addition.texts("train", 1000),
            eval=addition.texts("held-out", 100),
            config={"data": {"max_length": 128}, "train": {**train, "logging_steps": 10, "bf16": False}},
            figure="loss",
            measure=lambda run: run.evaluate()["loss"],
            higher_is_better=False,
        )
