"""A model without a run: what it answers, how it is asked, and what is refused before anything large is loaded."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from llmtk import ConfigurationError, DatasetError, ModelLoadError, Run
from llmtk.demo import addition
from llmtk.inference import LanguageModel
from llmtk.models.checks import resolve

QUESTIONS = [problem.prompt for problem in addition.problems("held-out", 5)]


def test_answers_are_those_of_transformers(model: LanguageModel) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs: Any = AutoModelForCausalLM.from_pretrained(resolve("builtin"))
    tokenizer: Any = AutoTokenizer.from_pretrained(resolve("builtin"))
    expected = []
    for question in QUESTIONS:
        turn = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        written = theirs.generate(ids, do_sample=False, max_new_tokens=8)[0, ids.shape[1] :]
        expected.append(tokenizer.decode(written, skip_special_tokens=True))
    assert model.answer(QUESTIONS, temperature=0.0, max_new_tokens=8) == expected
    dialogues = [[{"role": "user", "content": question}] for question in QUESTIONS]
    assert model.answer(dialogues, temperature=0.0, max_new_tokens=8) == expected


def test_it_says_whether_it_writes_packed(model: LanguageModel) -> None:
    assert model.why_plain is None


def test_listeners_hear_every_token_and_can_end_it(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    (prompt,) = model.tokens([model.row("37+48=", "a")])
    for why_plain in (None, "for the test"):
        monkeypatch.setitem(vars(model), "why_plain", why_plain)
        heard: list[list[int]] = []

        def hear(number: int, tokens: list[int], heard: list[list[int]] = heard) -> None:
            heard.append(list(tokens))

        ((answer,),) = model.generate([prompt], model.sampling(temperature=0.0), hear=hear)
        assert heard == [answer.tokens[: n + 1] for n in range(len(answer.tokens))]

    def enough(number: int, tokens: list[int]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.generate([prompt], model.sampling(), hear=enough)


def test_a_finished_run_is_asked_with_its_adapter_and_its_template(tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}|{% endfor %}")
    run = Run(
        stage="sft",
        model="builtin",
        data={"train": addition.rows("train", 8), "template": str(template)},
        peft={"method": "lora", "r": 4},
        train={"max_steps": 2, "learning_rate": 0.05, "bf16": False, "scoring": "padded"},
        output_dir=str(tmp_path / "run"),
    )
    run.train()
    run = Run.open(tmp_path / "run")
    asked = LanguageModel(tmp_path / "run")
    assert {str(parameter.dtype) for parameter in asked.model.parameters()} == {"torch.float32"}, "as the run computed"
    assert not asked._half
    vars(asked)["why_plain"] = "as the run: what it writes is so unlikely that rounding decides"
    settings = {"temperature": 0.0, "max_new_tokens": 6}
    assert asked.answer(QUESTIONS, **settings) == run.predict(QUESTIONS, **settings)
    assert type(asked.model).__name__ == "PeftModelForCausalLM"
    assert asked.tokenizer.decode(asked.tokens([asked.row("1?", "a")])[0]) == "1?|"

    both = run.predict(QUESTIONS[:2], n=3, max_new_tokens=4)
    assert [len(answers) for answers in both] == [3, 3]
    assert (
        run.predict(QUESTIONS[0], n=2, max_new_tokens=4, temperature=0.0)
        == [run.predict(QUESTIONS[0], max_new_tokens=4, temperature=0.0)] * 2
    )
    dialogue = [{"role": "user", "content": QUESTIONS[0]}]
    assert run.predict([dialogue], **settings) == [run.predict(QUESTIONS[0], **settings)]

    (tmp_path / "run" / "results.json").unlink()
    with pytest.raises(ConfigurationError, match=r"is not finished: there is no results\.json\. Go on with --resume"):
        LanguageModel(tmp_path / "run")


def test_python_blocks_of_the_page_run(monkeypatch: pytest.MonkeyPatch, model: LanguageModel, install: Any) -> None:
    install("same")
    monkeypatch.setattr("llmtk.inference.LanguageModel", lambda folder: model)
    page = (Path(__file__).parents[3] / "docs" / "inference.md").read_text()
    use, own = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(use, {})
    names: dict[str, Any] = {}
    exec(own, names)
    assert names["shared_words"](["a cat sat"], ["A cat ran off"]) == 0.5


def test_a_template_may_be_given(tmp_path: Path) -> None:
    (tmp_path / "loud.jinja").write_text("{% for m in messages %}{{ m.content }}!{% endfor %}")
    model = LanguageModel("builtin", template=str(tmp_path / "loud.jinja"))
    assert model.tokenizer.decode(model.tokens([model.row("hm", "a")])[0]) == "hm!"


def test_prompts_that_cannot_be_answered_are_named(model: LanguageModel) -> None:
    room = int(model.positions)
    with pytest.raises(DatasetError, match=rf"1 of 2 prompts leave no room to answer.* {room:,} tokens .*\(prompt 2: "):
        model.answer(["1+1=", "word " * room])
    with pytest.raises(DatasetError, match="prompt 2: prompt ends with a turn of the assistant"):
        model.answer(["1+1=", [{"role": "assistant", "content": "2"}]])
    with pytest.raises(DatasetError, match=r"prompt 1: message 1 of prompt \(user\) has no content"):
        model.answer([[{"role": "user"}]])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(resolve("builtin"), tmp_path / "model"))


def test_a_reward_model_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelLoadError, match=r"has a head of one value .*writes no text"):
        LanguageModel(folder)


def test_an_adapter_whose_base_is_gone_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/gone"}')
    with pytest.raises(ModelLoadError, match=r"is an adapter on /gone, which is not there any more"):
        LanguageModel(folder)


@pytest.mark.parametrize(
    ("name", "said"), [("sub/frst", "Did you mean 'first'?"), ("runs/first", "A relative path starts at")]
)
def test_a_run_that_is_not_there_is_not_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub" / "first").mkdir(parents=True)
    with pytest.raises(ModelLoadError, match="there is no run and no model in") as caught:
        LanguageModel(name)
    assert said in str(caught.value)


def test_a_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigurationError, match="one process: start it without a launcher"):
        LanguageModel("builtin")


def test_an_unknown_setting_is_refused(model: LanguageModel) -> None:
    with pytest.raises(ConfigurationError, match=r"sampling settings: .*temprature"):
        model.answer(["a"], temprature=1)


def test_computing_in_bfloat16_is_another_computation(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the device has it, weights in float32 are used under autocast, as a run uses them."""
    (prompt,) = model.tokens([model.row("37+48=", "a")])
    saved, found = model.model.dtype, {}
    model.model.float()
    for half in (False, True):
        monkeypatch.setattr(model, "_half", half)
        ((answer,),) = model.generate([prompt], model.sampling(temperature=0.0, max_new_tokens=1))
        found[half] = answer.logps[0]
    model.model.to(saved)
    assert found[True] != found[False]
    assert found[True] == pytest.approx(found[False], abs=0.1)
