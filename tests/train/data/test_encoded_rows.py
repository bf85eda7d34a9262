"""Rows as tokens: what is learned of them, where they end, and what is cut."""
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from letters import BOS, EOS, FIRST, SPECIAL, Letters

from minilora.errors import ConfigError, FormatError
from minilora.train.data import read

TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"},
        {"role": "user", "content": "why"}, {"role": "assistant", "content": "so"}]


def rows(tmp_path, *found, tokenizer=None, **options):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return read(path, tokenizer or Letters(), **options)


def all_of(data, tokenizer=None):
    """(row, what is learned of it) for each row."""
    tokenizer = tokenizer or Letters()
    return [(tokenizer.texts(data.train, i), tokenizer.texts(data.train, i, learned=True)) for i in range(len(data.train))]


def test_a_text_is_learned_whole_and_ends_once(tmp_path):
    data = rows(tmp_path, {"text": "ab"}, {"text": "c</s>"}, {"text": "d"})
    assert all_of(data) == [("<s>ab</s>",) * 2, ("<s>c</s>",) * 2, ("<s>d</s>",) * 2]
    assert "all tokens are learned" in data.report.header
    assert data.report.parts["train"].targets == 3 + 2 + 2  # the first token of a row has nothing before it


@pytest.mark.parametrize("around", [((), ()), ((BOS,), ()), ((BOS,), (EOS,)), ((), (EOS,)), ((BOS, BOS), (EOS,))])
def test_whatever_the_tokenizer_puts_around(tmp_path, around):
    tokenizer = Letters(around=around)
    data = rows(tmp_path, {"prompt": "ab", "completion": "c"}, {"prompt": "ab", "completion": "c</s>"}, tokenizer=tokenizer)
    assert all_of(data, tokenizer) == [("<s>" * len(around[0]) + "abc</s>", "c</s>")] * 2


def test_other_endings(tmp_path):
    bert = Letters(around=((4,), (5,)), eos=None)
    data = rows(tmp_path, {"prompt": "ab", "completion": "c"}, tokenizer=bert)
    assert all_of(data, bert) == [("<|user|>abc<|bot|>", "c<|bot|>")]
    own = Letters(eos=None, eos_ids=(6, 2))  # no eos_token, but ids that end texts: the first is taken, each counts as an end
    data = rows(tmp_path, {"text": "a"}, {"text": "a</s>"}, tokenizer=own)
    assert [one for one, _ in all_of(data, own)] == ["<s>a<|end|>", "<s>a</s>"]


def test_the_prompt_is_masked_and_that_is_said(tmp_path):
    row = {"prompt": "ab ", "completion": "cd"}
    data = rows(tmp_path, row)
    assert all_of(data) == [("<s>ab cd</s>", "cd</s>")]
    assert data.report.header == ("data: train 1 rows (3 of 7 tokens learned); rows of completion: the prompt is masked, the "
                                  "completion is learned")
    data = rows(tmp_path, row, train_on="all")
    assert all_of(data) == [("<s>ab cd</s>",) * 2] and "all tokens are learned" in data.report.header


def test_a_token_across_the_boundary_stays_on_neither_side(tmp_path):
    tokenizer = Letters(merges=["bc"])
    data = rows(tmp_path, {"prompt": "ab", "completion": "cd"}, {"prompt": "a", "completion": "bcd"}, tokenizer=tokenizer)
    assert all_of(data, tokenizer) == [("<s>abcd</s>", "cd</s>"), ("<s>abcd</s>", "bcd</s>")]
    assert data.train.row(0).tolist() == [BOS, FIRST + 10 + 97, FIRST + 10 + 98, FIRST + 10 + 99, FIRST + 10 + 100, EOS]
    assert FIRST in data.train.row(1) and data.report.parts["train"].shared == 1
    assert "train: in 1 rows prompt and completion would share a token" in data.report.notes[0]


def test_a_tokenizer_that_writes_a_blank_in_front_of_a_text(tmp_path):
    tokenizer = Letters(blank=True)
    data = rows(tmp_path, {"prompt": "ab", "completion": "cd"}, {"prompt": "ab", "completion": " cd"}, tokenizer=tokenizer)
    assert all_of(data, tokenizer) == [("<s> abcd</s>", "cd</s>"), ("<s> ab cd</s>", " cd</s>")]
    tokenizer.merges = ["bc"]  # and a shared token: alone, the completion would have a blank that is not in the text
    data = rows(tmp_path, {"prompt": "ab", "completion": "cd"}, tokenizer=tokenizer)
    assert all_of(data, tokenizer) == [("<s> abcd</s>", "bcd</s>")] and data.report.parts["train"].shared == 1


@given(prompt=st.text(st.sampled_from("abc "), min_size=1, max_size=6), completion=st.text(st.sampled_from("abc "), min_size=1,
       max_size=6), merges=st.lists(st.sampled_from(["ab", "bc", "ca", "a ", " b"]), unique=True), blank=st.booleans(),
       around=st.sampled_from([((), ()), ((BOS,), ()), ((BOS,), (EOS,))]))
def test_no_letter_is_lost_or_doubled(tmp_path_factory, prompt, completion, merges, blank, around):
    tokenizer = Letters(around=around, merges=merges, blank=blank)
    data = rows(tmp_path_factory.mktemp("x"), {"prompt": prompt, "completion": completion}, tokenizer=tokenizer)
    ((text, learned),) = all_of(data, tokenizer)
    text = text.removeprefix("<s>")
    assert text in (prompt + completion + "</s>", " " + prompt + completion + "</s>")
    assert learned.endswith(completion + "</s>") and text.endswith(learned)
    if not blank:
        assert learned == completion + "</s>"


def test_a_chat_teaches_the_last_answer(tmp_path):
    row = {"messages": TALK}
    whole = "<s><|user|>hi<|end|><|bot|>ho<|end|><|user|>why<|end|><|bot|>so<|end|>"
    data = rows(tmp_path, row)
    assert all_of(data) == [(whole, "so<|end|>")]
    assert "the prompt is masked, the last answer is learned" in data.report.header
    data = rows(tmp_path, row, train_on="assistant")
    assert all_of(data) == [(whole, "ho<|end|>so<|end|>")]
    assert "all messages of the assistant are learned, the others are masked" in data.report.header
    assert all_of(rows(tmp_path, row, train_on="all")) == [(whole, whole)]


def test_a_chat_that_the_user_ends_can_teach_answers_before(tmp_path):
    assert [part for _, part in all_of(rows(tmp_path, {"messages": TALK[:3]}, train_on="assistant"))] == ["ho<|end|>"]


def test_tools_go_to_the_template(tmp_path):
    data = rows(tmp_path, {"messages": TALK, "tools": [{}, {}]}, {"messages": TALK})
    assert [text[:10] for text, _ in all_of(data)] == ["<s>2 tools", "<s><|user|"]


class Thinking(Letters):
    """A template that writes thoughts into the last answer only, and none behind the question."""

    def chat(self, messages, *, add_generation_prompt=True, tools=None):
        if messages and messages[-1]["role"] == "assistant":
            messages = [*messages[:-1], {"role": "assistant", "content": "hm " + messages[-1]["content"]}]
        return super().chat(messages, add_generation_prompt=add_generation_prompt)


class Counting(Letters):
    """A template that says how many messages there are before the first one."""

    def chat(self, messages, *, add_generation_prompt=True, tools=None):
        return str(len(messages)) + super().chat(messages, add_generation_prompt=add_generation_prompt)


class Other(Letters):
    """A generation prompt that is not how answers begin."""

    def chat(self, messages, *, add_generation_prompt=True, tools=None):
        return super().chat(messages, add_generation_prompt=False) + ("<unk>" if add_generation_prompt else "")


def test_templates_that_do_not_write_chats_from_left_to_right(tmp_path):
    data = rows(tmp_path, {"messages": TALK}, tokenizer=Thinking())
    assert [part for _, part in all_of(data)] == ["hm so<|end|>"]
    with pytest.raises(FormatError, match=r":1: the chat template writes what comes before message 2 otherwise once there is "
                                          r"more.*train_on='completion' learns the last answer only"):
        rows(tmp_path, {"messages": TALK}, tokenizer=Thinking(), train_on="assistant")
    with pytest.raises(FormatError, match=r":1: .*before message 4 otherwise.*train_on='all' learns all"):
        rows(tmp_path, {"messages": TALK}, tokenizer=Counting())
    assert len(rows(tmp_path, {"messages": TALK}, tokenizer=Counting(), train_on="all").train) == 1
    data = rows(tmp_path, {"messages": TALK}, tokenizer=Other())
    assert [part for _, part in all_of(data)] == ["<|bot|>so<|end|>"]


def test_messages_that_a_template_refuses_and_a_template_that_is_wrong(tmp_path):
    class Refusing(Letters):
        error = ConfigError("the chat template refuses these messages: no system")

        def chat(self, messages, **options):
            if messages[0]["content"] != "fine":
                raise self.error
            return super().chat(messages, **options)
    fine = {"messages": [{"role": "user", "content": "fine"}, TALK[1]]}
    with pytest.raises(FormatError, match=r"2 problems:\n.*:2: the chat template refuses.*\n.*:3: the chat template refuses"):
        rows(tmp_path, fine, {"messages": TALK}, {"messages": TALK}, tokenizer=Refusing())
    Refusing.error = FormatError("chat template 'default', line 3: unexpected end")
    with pytest.raises(FormatError, match=r"^[^\n]*rows.jsonl:2: chat template 'default', line 3: unexpected end$"):
        rows(tmp_path, fine, {"messages": TALK}, {"messages": TALK}, tokenizer=Refusing())


def test_what_is_too_long_is_cut_and_counted(tmp_path):
    found = [{"prompt": "ab", "completion": "c" * n} for n in (1, 2, 5)]
    data = rows(tmp_path, *found, {"prompt": "a" * 9, "completion": "b"}, max_length=6)
    assert all_of(data) == [("<s>abc</s>", "c</s>"), ("<s>abcc</s>", "cc</s>"), ("<s>abccc", "ccc")]
    part = data.report.parts["train"]
    assert (part.rows, part.cut, part.lost, part.left_out, part.longest, part.tokens, part.targets) == (3, 1, 3, 1, 6, 17, 8)
    assert data.report.notes == [
        "train: 1 rows were cut to 6 tokens, 3 tokens in all",
        "train: 1 rows were left out: nothing would be learned of them, since they have a single token, or 6 tokens have no "
        "room for their completion"]
    with pytest.raises(FormatError, match="max_length=3 leaves nothing to learn of any row in train: .* Give a larger"):
        rows(tmp_path, *found, max_length=3)


def test_a_classifier_s_text_keeps_its_ends_when_it_is_cut(tmp_path):
    bert = Letters(around=((4,), (5,)), eos=None)
    data = rows(tmp_path, {"text": "abcdef", "label": "x"}, {"text": "a", "label": "y"}, max_length=5, tokenizer=bert)
    assert [text for text, _ in [(bert.texts(data.train, i), 0) for i in (0, 1)]] == ["<|user|>abc<|bot|>", "<|user|>a<|bot|>"]
    assert data.report.parts["train"].cut == 1 and data.report.parts["train"].lost == 3
    with pytest.raises(ConfigError, match="max_length=2 has room for the special tokens only: give 3 or more"):
        rows(tmp_path, {"text": "abcdef", "label": "x"}, max_length=2, tokenizer=bert)


def test_a_single_token_is_left_out(tmp_path):
    silent = Letters(around=((), ()), eos=None)
    data = rows(tmp_path, {"text": "a"}, {"text": "ab"}, tokenizer=silent)
    assert len(data.train) == 1 and data.report.parts["train"].left_out == 1


def test_a_text_without_tokens_is_told_with_its_line(tmp_path):
    class Stripping(Letters):
        def _bare(self, text):
            return super()._bare(text.strip())
    for row in ({"text": "  "}, {"text": "  ", "label": "x"}):
        with pytest.raises(FormatError, match=":2: 'text' has no tokens"):
            rows(tmp_path, {**row, "text": "a"}, row, tokenizer=Stripping())
    with pytest.raises(FormatError, match=":1: 'completion' has no tokens"):
        rows(tmp_path, {"prompt": "a", "completion": " "}, tokenizer=Stripping())


def test_a_tokenizer_that_does_not_put_tokens_around(tmp_path):
    class Strange(Letters):
        def encode(self, texts, *, special_tokens=True):
            texts = [text.upper() for text in texts] if special_tokens else texts
            return super().encode(texts, special_tokens=special_tokens)
    with pytest.raises(FormatError, match="does not put them around the text"):
        rows(tmp_path, {"text": "a"}, tokenizer=Strange())


def test_many_rows_are_given_to_the_tokenizer_together(tmp_path):
    tokenizer = Letters()
    data = rows(tmp_path, *[{"prompt": "a", "completion": str(n)} for n in range(1300)], tokenizer=tokenizer)
    assert tokenizer.calls == 2 + 2 * 3 and len(data.train) == 1300
    assert tokenizer.texts(data.train, 1299, learned=True) == "1299</s>"


def test_with_the_real_library(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("jinja2")
    from minilora.models import Tokenizer

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    names = ["<s>", "</s>", "<|user|>", "<|bot|>", *alphabet, "Ġc", "Ġca", "ab"]
    own = tokenizers.Tokenizer(tokenizers.models.BPE({name: i for i, name in enumerate(names)},
                                                     [("Ġ", "c"), ("Ġc", "a"), ("a", "b")]))
    own.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    own.decoder = tokenizers.decoders.ByteLevel()
    own.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    own.add_special_tokens(["<s>", "</s>", "<|user|>", "<|bot|>"])
    own.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({
        "bos_token": "<s>", "eos_token": "</s>",
        "chat_template": "{{ bos_token }}{% for m in messages %}{{ '<|user|>' if m.role == 'user' else '<|bot|>' }}"
                         "{{ m.content }}"
                         "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
                         "{% if add_generation_prompt %}<|bot|>{% endif %}"}))
    tokenizer = Tokenizer(tmp_path)

    def learned(data, i):
        labels = data.train.batch([i]).inputs["labels"][0]
        return tokenizer.decode(data.train.row(i), skip_special_tokens=False), tokenizer.decode(labels[labels >= 0], False)
    data = rows(tmp_path, {"prompt": "x:", "completion": " cat 😀"}, {"prompt": "x: ", "completion": "cat"},
                {"prompt": "xa", "completion": "b</s>"}, tokenizer=tokenizer)
    assert [learned(data, i) for i in range(3)] == [
        ("<s>x: cat 😀</s>", " cat 😀</s>"), ("<s>x: cat</s>", "cat</s>"), ("<s>xab</s>", "b</s>")]
    assert data.report.parts["train"].shared == 2 and tokenizer.pad_id is None and data.train.pad_id == 1
    data = rows(tmp_path, {"messages": TALK}, tokenizer=tokenizer)
    assert learned(data, 0) == ("<s><|user|>hi<|bot|>ho</s><|user|>why<|bot|>so</s>", "so</s>")
    data = rows(tmp_path, {"messages": TALK}, tokenizer=tokenizer, train_on="assistant")
    assert learned(data, 0)[1] == "ho</s>so</s>"
    assert np.count_nonzero(data.train.batch([0]).inputs["ids"] == SPECIAL["<s>"] - 1) == 1
