"""`minilora generate`: prompts, chats, adapters by weight, streaming."""
import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from example_folder import WORDS

from minilora import lora, models
from minilora.cli import generate as verb
from minilora.cli.main import main
from minilora.formats import load_adapter

pytest.importorskip("tokenizers")
TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}the{% endif %}"


def said(capsys, *words, code=0):
    assert main(["generate", *map(str, words)]) == code, capsys.readouterr()
    return capsys.readouterr()


def reported(capsys, *words):
    return json.loads(said(capsys, *words, "--json", "--quiet").out)


def by_hand(prompt, n, adapters=(), **options):
    """The text of a prompt by the library's own calls."""
    model, tokenizer = models.load("base"), models.Tokenizer("base")
    for i, (path, _) in enumerate(adapters):
        load_adapter(model, path, f"a{i}")
    if adapters:
        lora.activate(model, *(f"a{i}" for i in range(len(adapters))), weights=[weight for _, weight in adapters])
    made = models.generate(model, tokenizer.encode(prompt).ids, n, stop_ids=tokenizer.eos_ids, **options)
    return tokenizer.decode_batch(made.texts())[0]


def test_text_on_stdout_and_figures_on_stderr(there, capsys):
    out, err = said(capsys, "base", "-p", "the cat", "-m", 8)
    assert out == by_hand("the cat", 8) + "\n" and "3 tokens read, " in err
    assert said(capsys, "base", "-p", "the cat", "-m", 8, "--quiet") == (out, "")


def test_the_text_comes_piece_by_piece(there, capsys, monkeypatch):
    events = []
    monkeypatch.setattr(sys, "stdout", type("Out", (io.StringIO,), {
        "write": lambda self, text: events.append(text), "flush": lambda self: events.append("flush")})())
    assert main(["generate", "base", "-p", "the cat", "-m", "6", "--quiet"]) == 0
    pieces = [event for event in events if event != "flush"]
    assert len(pieces) > 3 and events[1] == "flush"
    assert "".join(pieces).strip() == by_hand("the cat", 6)


@pytest.mark.parametrize("adapters", [
    ["adapter"], ["adapter=1.0"], ["adapter=0.25"], ["adapter=0.7", "other=0.3"], ["other=2", "adapter=-1"], ["adapter=0"]])
def test_adapters_are_mixed_by_weight(adapters, there, capsys):
    parts = [(path, float(weight or 1)) for path, _, weight in (one.partition("=") for one in adapters)]
    report = reported(capsys, "base", *adapters, "-p", "the cat", "-m", 12, "--temp", 0.02, "--seed", 4)
    assert report["made"][0]["text"] == by_hand("the cat", 12, parts, temperature=0.02, seed=4)
    assert report["adapters"] == [{"path": path, "weight": weight} for path, weight in parts]
    if adapters == ["adapter=0"]:
        assert report["made"][0]["text"] == by_hand("the cat", 12, temperature=0.02, seed=4)


def test_an_adapter_changes_the_text(there, capsys):
    texts = {tuple(words): reported(capsys, "base", *words, "-p", "the cat", "-m", 20, "--temp", 0.02)["made"][0]["text"]
             for words in ([], ["adapter=30"], ["other=30"], ["adapter=30", "other=30"])}
    assert len(set(texts.values())) == 4


def test_sampling(there, capsys):
    def drawn(*words):
        return reported(capsys, "base", "-p", "the cat", "-m", 12, *words)["made"][0]["text"]
    warm = ("--temp", 1.5)
    assert drawn(*warm, "--seed", 1) == drawn(*warm, "--seed", 1) != drawn(*warm, "--seed", 2)
    assert drawn(*warm) == drawn(*warm, "--seed", 0) != drawn()
    assert drawn(*warm, "--top-p", 0.3) == by_hand("the cat", 12, temperature=1.5, top_p=0.3, seed=0)
    assert drawn(*warm, "--top-k", 2) == by_hand("the cat", 12, temperature=1.5, top_k=2, seed=0)
    assert drawn("--repetition-penalty", 5.0) == by_hand("the cat", 12, repetition_penalty=5.0)


def test_several_prompts_in_one_batch(there, capsys):
    words = ("base", "-p", "the cat", "-p", "we", "-m", 5)
    report = reported(capsys, *words)
    assert [made["prompt"] for made in report["made"]] == ["the cat", "we"]
    assert [made["text"] for made in report["made"]] == [by_hand("the cat", 5), by_hand("we", 5)]
    out = said(capsys, *words).out
    assert out.splitlines()[:2] == ["'the cat'", by_hand("the cat", 5)] and "'we'" in out


def test_a_prompt_from_stdin(there, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat"))
    assert said(capsys, "base", "-p", "-", "-m", 5).out == by_hand("the cat", 5) + "\n"


def test_chats(there, capsys):
    pytest.importorskip("jinja2")
    (there / "base" / "chat_template.jinja").write_text(TEMPLATE)
    expected = reported(capsys, "base", "-p", "x", "-m", 5, "--chat")["made"][0]
    assert expected["prompt_tokens"] == 2  # without <s>, which a template writes itself
    made = reported(capsys, "base", "-p", "the cat a dog", "-m", 5, "--chat")["made"][0]
    assert made["prompt_tokens"] == 5
    messages = [{"role": "system", "content": "the cat"}, {"role": "user", "content": "a dog"}]
    for content in (messages, {"messages": messages}):
        (there / "talk.json").write_text("\ufeff" + json.dumps(content))
        assert reported(capsys, "base", "--messages", "talk.json", "-m", 5)["made"][0] == {**made, "prompt": None}


@pytest.mark.parametrize(("content", "words"), [
    ("[", "no JSON"), ("[]", "expected a list of messages"), ("{}", "expected a list"), ('["a"]', "expected a list"),
    ('[{"content": "a"}]', "expected a list"), ("[" * 100_000, "no JSON"), (b"\xff\xff", "no JSON")])
def test_messages_that_are_none(content, words, there, capsys):
    (there / "talk.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    err = said(capsys, "base", "--messages", "talk.json", code=1).err
    assert "talk.json" in err and words in err


@pytest.mark.parametrize(("words", "expected"), [
    ((), "say where to begin"), (("-p", "a", "--messages", "x"), "not both"),
    (("-p", "-", "-p", "-"), "it can be given once"), (("-p", "a", "--top-p", "0.5"), "give a temperature, such as --temp 1.0"),
    (("-p", "a", "--top-k", "5"), "give a temperature"), (("-p", "a", "--tempo", "1"), "did you mean '--temp'?")])
def test_wrong_usage(words, expected, there, capsys):
    assert expected in said(capsys, "base", *words, code=2).err


def short_one(there):
    """A GPT-2 of 8 positions, which never ends a text."""
    config = models.GPT2Config(vocab_size=len(WORDS), n_positions=8, n_embd=8, n_layer=1, n_head=2)
    model = models.GPT2(config, rng=0)
    model.embedding.weight.data[2] = 0.0
    models.save(model, there / "short")
    copy_tokenizer("base", "short")


def copy_tokenizer(source, target):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(source) / file, target)


@pytest.mark.parametrize(("words", "expected"), [
    (("nowhere", "-p", "a"), "nowhere"), (("base", "nowhere", "-p", "a"), "nowhere"),
    (("base", "-p", "a", "-m", "0"), "max_new_tokens"), (("base", "-p", "a", "--temp", "-1"), "temperature"),
    (("base", "-p", "a", "--temp", "1", "--top-p", "2"), "top_p"), (("base", "-p", "a", "--tokenizer", "data"), "tokenizer"),
    (("short", "-p", "the " * 9), "the model has 8"), (("encoder", "-p", "a"), "a model that predicts the next token")])
def test_what_cannot_be_done(words, expected, there, capsys):
    short_one(there)
    err = said(capsys, *words, code=1).err
    assert expected in err and "Traceback" not in err


def test_a_long_prompt_leaves_room_for_less(there, capsys):
    short_one(there)
    out, err = said(capsys, "short", "-p", "the cat")  # with <s> 3 tokens; the last new one is not read
    assert "the model has 8 positions: at most 6 new tokens" in err and "3 tokens read, 6 written" in err
    assert "1 written" in said(capsys, "short", "-p", "the cat " * 3 + "the").err


def test_an_adapter_of_another_base(there, capsys):
    model = models.load("base")
    model.model.layers[0].mlp.up_proj.weight.data = model.model.layers[0].mlp.up_proj.weight.data + 1.0
    models.save(model, there / "changed")
    copy_tokenizer("base", "changed")
    err = said(capsys, "changed", "adapter", "-p", "the cat", code=1).err
    assert err.startswith("minilora generate: adapter: ") and "another base" in err and "give --force" in err
    assert said(capsys, "changed", "adapter", "-p", "the cat", "-m", 3, "--force").out.strip()


def test_a_tokenizer_from_elsewhere(there, capsys):
    words = ("base", "-p", "the cat", "-m", 5)
    before = said(capsys, *words).out
    (there / "words").mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (there / "base" / file).rename(there / "words" / file)
    assert said(capsys, *words, "--tokenizer", "words").out == before


def test_a_text_that_ends(there, capsys):
    model = models.load("base", dtype="float64")
    head = model.lm_head.weight if model.lm_head is not None else model.embedding.weight
    head.data = np.where(np.arange(len(head.data))[:, None] == 2, head.data * 0.0, head.data)
    ids = models.Tokenizer("base").encode("the cat").ids
    hidden = model.hidden(ids).numpy()[0, -1]
    head.data[2] = hidden * 100.0  # </s> now is the most probable token
    models.save(model, there / "ending")
    copy_tokenizer("base", "ending")
    report = reported(capsys, "ending", "-p", "the cat")
    assert report["made"][0]["ended"] and report["made"][0]["tokens"] < 100
    assert "had not ended" not in said(capsys, "ending", "-p", "the cat").err


def test_escape_sequences_of_a_model_reach_no_terminal(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    verb.writer()("a\x1b[2J\n")
    monkeypatch.setattr(out, "isatty", lambda: True)
    verb.writer()("a\x1b[2J\tb\n")
    assert out.getvalue() == "a\x1b[2J\n" + "a\\x1b[2J\tb\n"
