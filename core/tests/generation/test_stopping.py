"""Stop strings: within a token, over several, of characters that are split over tokens; and what a completion says."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from llmtk.generation import Completion, Sampling, Segment, generate
from llmtk.generation.sampling import Stopping

from .kit import build, flat, patched


class Scripted(torch.nn.Module):
    """Writes a text behind a prompt of one token, whatever it is asked, then padding."""

    def __init__(self, script, vocabulary):
        super().__init__()
        self.config = SimpleNamespace()
        self.script, self.vocabulary = script, vocabulary
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, position_ids, **_):
        logits = torch.zeros(len(position_ids), 1, self.vocabulary)
        for row, position in zip(logits, position_ids[:, -1].tolist(), strict=True):
            row[0, self.script[position] if position < len(self.script) else 0] = 50
        return SimpleNamespace(logits=logits, past_key_values=None)


def written(tokenizer, text, *strings, **settings):
    script = tokenizer(text, add_special_tokens=False)["input_ids"]
    sampling = Sampling(max_new_tokens=len(script) + 3, temperature=0, stop_strings=strings, **settings)
    model = Scripted(script, len(tokenizer))
    ((answer,),) = generate(model, [[5]], sampling, decode=lambda tokens: str(tokenizer.decode(tokens)))
    return tokenizer.decode(answer.tokens), answer


@pytest.mark.parametrize(
    ("text", "strings", "ended"),
    [
        ("one\n\ntwo", ("\n\n",), "one\n\n"),
        ("Answer: 7. Question: what", ("Question:",), "Answer: 7. Question:"),
        ("aaab aab aaaab", ("aaaab",), "aaab aab aaaab"),
        ("one two three", ("three", "two"), "one two"),
        ("x", ("x",), "x"),
        ("héé été", ("té",), "héé été"),
        ("so 🙂🙃 then", ("🙃",), "so 🙂🙃"),
        ("🙂🙃🙂 then", ("🙃🙂",), "🙂🙃🙂"),
        ("日本語。日本", ("。",), "日本語。"),
    ],
)
def test_a_stop_string_ends_a_completion_with_the_token_that_completes_it(tokenizer, text, strings, ended):
    """The tokenizer's tokens are bytes: every string spans several, and so does every character beyond ASCII."""
    found, answer = written(tokenizer, text, *strings)
    assert found == ended
    assert answer.stopped == "stop"
    assert len(answer.logps) == len(answer.tokens)


def test_a_string_that_is_never_produced_stops_nothing(tokenizer):
    """Its parts are, and its bytes within other characters."""
    found, answer = written(tokenizer, "one \n two \n", "\n\n", "ONE", "é", "\N{REPLACEMENT CHARACTER}x")
    assert found.startswith("one \n two \n")
    assert answer.stopped == "length"


def byte_fallback():
    """Return a tokenizer as sentencepiece's with byte tokens, whose neighbours are lost where one is cut."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "a": 257, "b": 258} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}
    built = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    built.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=built, unk_token="<unk>")


@pytest.mark.parametrize("text", ["a🙂b", "a🙃🙂b", "日本語🙂b", "🙃🙃🙃🙃🙂"])
def test_a_character_cut_at_the_windows_beginning_hides_no_string(text):
    """A window of the last few tokens is looked at; it may begin within a character."""
    found, answer = written(byte_fallback(), text, "🙂")
    assert found == text.removesuffix("b")
    assert answer.stopped == "stop"


def test_a_long_token_holds_a_whole_string_and_more():
    words = {1: "the end", 2: ". And more"}
    stopping = Stopping(Sampling(stop_strings=("end.",)), lambda tokens: "".join(words[token] for token in tokens))
    assert not stopping.ends([1])
    assert stopping.ends([1, 2])
    assert not stopping.ends([2, 2, 2])


def test_stop_strings_without_a_tokenizer_are_refused():
    model = Scripted([1], 5)
    with pytest.raises(ValueError, match="stop_strings need a tokenizer"):
        generate(model, [[1]], Sampling(stop_strings=("a",)))
    for wrong in ({"stop_strings": "abc"}, {"stop_strings": ("a", "")}):
        with pytest.raises(ValueError, match="texts, none of them empty"):
            Sampling(**wrong)


@pytest.mark.parametrize("packed", [True, False])
def test_both_ways_end_each_completion_at_its_own_string(packed):
    """Of letters that stand for tokens: sequences side by side end at different places, or not at all."""
    root = patched(build("llama"))

    def decode(tokens):
        return "".join(chr(200 + token) for token in tokens)

    settings = {"n": 8, "max_new_tokens": 16, "seed": 3}
    free = generate(root, [[5, 6], [7]], Sampling(**settings))
    strings = tuple({decode(copies[0].tokens[3:5]) for copies in free} | {decode(free[0][1].tokens[:1])})
    cut = generate(root, [[5, 6], [7]], Sampling(stop_strings=strings, **settings), packed=packed, decode=decode)
    reasons = set()
    for whole, answer in zip(flat(free), flat(cut), strict=True):
        ends = [k for k in range(1, 17) if any(string in decode(whole.tokens[:k]) for string in strings)]
        assert answer.tokens == whole.tokens[: min(ends, default=16)]
        assert answer.stopped == ("stop" if ends else "length")
        reasons.add(answer.stopped)
    assert reasons == {"stop", "length"}


def test_a_completion_tells_sampled_tokens_from_those_put_in():
    completion = Completion(
        (Segment([1, 2], [-0.5, -1.5], version=3), Segment([7], sampled=False), Segment([4], [-2.0])), "stop"
    )
    assert completion.tokens == [1, 2, 7, 4]
    assert completion.mask == [True, True, False, True]
    assert completion.logps == [-0.5, -1.5, -2.0]
