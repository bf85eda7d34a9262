"""The five forms of rows: which one a file has, and what is wrong with a row of it."""
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from letters import Letters

from minilora.errors import ConfigError, FileError, FormatError
from minilora.train.data import read

ROWS = {
    "text": {"text": "abc"},
    "completion": {"prompt": "ab", "completion": "c"},
    "messages": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    "label": {"text": "abc", "label": "good"},
    "score": {"text": "abc", "score": 1.5},
}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def said(tmp_path, rows, **options):
    """The message that a file of these rows is refused with."""
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(FormatError) as caught:
        read(path, Letters(), **options)
    return str(caught.value).replace(f"{path}:", "")


@pytest.mark.parametrize("form", ROWS)
def test_each_form_is_recognised(tmp_path, form):
    data = read(write(tmp_path / "rows.jsonl", [ROWS[form]] * 3), Letters())
    assert data.report.form == form and len(data.train) == 3 and data.valid is data.test is None


@pytest.mark.parametrize("form", ROWS)
@pytest.mark.parametrize("other", ROWS)
def test_the_form_is_that_of_most_rows_wherever_they_stand(tmp_path, form, other):
    if form != other:
        message = said(tmp_path, [ROWS[other], ROWS[form], ROWS[form]])
        assert message.startswith("1: expected ") and "as 2 of 3 rows have it: " in message


@pytest.mark.parametrize(("row", "words"), [
    ({"txt": "a"}, "'text' missing, the key 'txt' is not known (did you mean 'text'?)"),
    ({}, "'text' missing"),
    ({"text": "a", "id": 1}, "the key 'id' is not known. To pass over it: ignore=['id']"),
    ({"text": "a", "source": 1, "id": 1}, "To pass over it: ignore=['id', 'source']"),
    ({"text": "a", **{str(i): 1 for i in range(9)}}, "and 4 more keys"),
    ({"text": None}, "'text' must be a text, got None"),
    ({"text": 5}, "'text' must be a text, got 5"),
    ({"text": ["a"]}, "'text' must be a text, got list"),
    ({"text": ""}, "'text' is empty"),
    ({"tokens": ["a"], "ner_tags": [1]}, "rows of tokens with a label each are not read here"),
    ({"words": ["a"], "labels": [1], "id": 3}, "rows of tokens with a label each are not read here"),
])
def test_faulty_texts(tmp_path, row, words):
    message = said(tmp_path, [ROWS["text"], ROWS["text"], row])
    assert message.startswith("3: ") and words in message


@pytest.mark.parametrize(("row", "words"), [
    ({"prompt": "a", "completion": ""}, "'completion' is empty"),
    ({"prompt": "", "completion": "a"}, "'prompt' is empty"),
    ({"prompt": "a", "completions": "a"},
     "'completion' missing, the key 'completions' is not known (did you mean 'completion'?)"),
    ({"prompt": [{"role": "user"}], "completion": "a"}, "'prompt' must be a text, got list"),
])
def test_faulty_completions(tmp_path, row, words):
    assert words in said(tmp_path, [ROWS["completion"], ROWS["completion"], row])


@pytest.mark.parametrize(("messages", "words"), [
    ([], "'messages' must be a list with a message in it, got list"),
    ("hello", "'messages' must be a list with a message in it, got 'hello'"),
    (["hello"], "message 1 must be an object with a 'role' and a 'content'"),
    ([{"content": "a"}], "message 1 must be an object"),
    ([{"role": 1, "content": "a"}], "message 1 must be an object"),
    ([{"role": "assistant"}], "message 1: 'content' must be a text, got None"),
    ([{"role": "assistant", "content": [{"type": "image"}]}], "message 1: 'content' must be a text, got list"),
    ([{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}],
     "the last message has the role 'user', and what is learned is the last one of the assistant. train_on='all' learns all"),
])
def test_faulty_messages(tmp_path, messages, words):
    assert words in said(tmp_path, [ROWS["messages"], ROWS["messages"], {"messages": messages}])


def test_the_advice_to_learn_all_is_right(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"messages": [{"role": "user", "content": "b"}]}])
    with pytest.raises(FormatError, match="no message of the assistant, and only those are learned: train_on='all'"):
        read(path, Letters(), train_on="assistant")
    assert len(read(path, Letters(), train_on="all").train) == 1


@pytest.mark.parametrize(("value", "words"), [
    ("1.5", "got '1.5'"), (None, "got None"), (True, "got True"), ([1.0], "got list"), (1e39, "got 1e+39"),
    (10 ** 400, "got 1000"),
])
def test_scores_are_finite_numbers(tmp_path, value, words):
    assert words in said(tmp_path, [ROWS["score"], ROWS["score"], {"text": "a", "score": value}])
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "score": 1e999}\n')
    with pytest.raises(FormatError, match="'score' must be a finite number, got inf"):
        read(path, Letters())


def test_scores_and_their_type(tmp_path):
    data = read(write(tmp_path / "rows.jsonl", [{"text": "a", "score": 1}, {"text": "b", "score": -0.25}]), Letters()).train
    labels = data.batch([0, 1]).inputs["labels"]
    assert labels.dtype == np.float32 and labels.tolist() == [1.0, -0.25]


@pytest.mark.parametrize(("value", "words"), [
    ("", "not empty"), (None, "got None"), (True, "got True"), (1.0, "got 1.0"), (["a"], "got list"),
    (3, "the label 3 is a number, where most are texts"),
])
def test_faulty_labels(tmp_path, value, words):
    assert words in said(tmp_path, [ROWS["label"], ROWS["label"], {"text": "a", "label": value}])


def test_labels_that_are_numbers(tmp_path):
    rows = [{"text": "a", "label": n} for n in (2, 0, 2)]
    data = read(write(tmp_path / "rows.jsonl", rows), Letters())
    assert data.report.labels == ("0", "1", "2") and data.train.batch([0, 1, 2]).inputs["labels"].tolist() == [2, 0, 2]
    assert "no training row has the label '1'" in data.report.notes
    message = said(tmp_path, [*rows, {"text": "a", "label": -1}, {"text": "a", "label": "x"}, {"text": "a", "label": 1 << 40}])
    assert "4: 'label' must be the number of a class, from 0, got -1" in message and "6: 'label' must be the number" in message
    assert "5: the label 'x' is a text, where most are numbers" in message


def test_labels_that_are_texts_are_sorted(tmp_path):
    data = read(write(tmp_path / "rows.jsonl", [{"text": "a", "label": n} for n in ("no", "yes", "maybe", "no")]), Letters())
    assert data.report.labels == ("maybe", "no", "yes") and data.train.batch(range(4)).inputs["labels"].tolist() == [1, 2, 0, 1]
    assert data.train.batch([2]).inputs["labels"].dtype == np.int64


def test_a_model_knows_its_labels(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"text": "a", "label": "POS"}, {"text": "b", "label": "NEG"}])
    data = read(path, Letters(), labels=("NEG", "NEUTRAL", "POS"))
    assert data.report.labels == ("NEG", "NEUTRAL", "POS") and data.train.batch([0, 1]).inputs["labels"].tolist() == [2, 0]
    with pytest.raises(FormatError, match=":1: the label 'POS' is not one of those that .* have: 'NEG', 'NEUTRAL'"):
        read(path, Letters(), labels=("NEG", "NEUTRAL"))
    numbered = write(tmp_path / "numbers.jsonl", [{"text": "a", "label": 1}])
    assert read(numbered, Letters(), labels=("NEG", "POS")).train.batch([0]).inputs["labels"].tolist() == [1]
    with pytest.raises(FormatError, match=":1: the label 1 is not one"):
        read(numbered, Letters(), labels=("NEG",))


@pytest.mark.parametrize("part", ["valid", "test"])
@pytest.mark.parametrize(("known", "unseen"), [(("a", "b"), "c"), ((0, 2), 1), ((0, 2), 3)])
def test_a_label_that_training_has_not(tmp_path, part, known, unseen):
    write(tmp_path / "train.jsonl", [{"text": "x", "label": label} for label in known])
    write(tmp_path / f"{part}.jsonl", [{"text": "x", "label": label} for label in (known[0], unseen)])
    with pytest.raises(FormatError, match=rf"{part}.jsonl:2: the label {unseen!r} is not one of those that the training"):
        read(tmp_path, Letters())


def test_all_files_have_the_form_of_most(tmp_path):
    write(tmp_path / "train.jsonl", [ROWS["label"]] * 3)
    write(tmp_path / "valid.jsonl", [ROWS["score"]])
    with pytest.raises(FormatError, match="valid.jsonl:1: expected 'text' and 'label', as 3 of 4 rows have it: 'label' mis"):
        read(tmp_path, Letters())


def test_keys_that_are_passed_over(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"text": "a", "id": 1}, {"text": "b", "id": "x", "label": "y"}])
    assert len(read(path, Letters(), ignore=["id", "label"]).train) == 2
    with pytest.raises(FormatError):
        read(path, Letters(), ignore="id")
    path = write(tmp_path / "rows.jsonl", [{"text": "a", "id": 1}])
    assert len(read(path, Letters(), ignore="id").train) == 1


def test_one_file_and_a_fraction(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"text": f"{n:03}"} for n in range(100)])
    parts = [read(path, Letters(), valid_fraction=0.2, seed=seed) for seed in (0, 0, 1)]
    tokenizer = Letters()
    found = [{part: [tokenizer.texts(getattr(one, part), i)[3:6] for i in range(len(getattr(one, part)))]
              for part in ("train", "valid")} for one in parts]
    assert found[0] == found[1] != found[2] and len(found[0]["valid"]) == 20
    assert sorted(found[0]["train"] + found[0]["valid"]) == [f"{n:03}" for n in range(100)]
    assert found[0]["train"] == sorted(found[0]["train"])  # in the order of the file


@given(counts=st.lists(st.integers(1, 9), min_size=1, max_size=5), share=st.floats(0.01, 0.99), seed=st.integers(0, 99))
def test_a_fraction_leaves_a_row_of_each_class(tmp_path_factory, counts, share, seed):
    rows = [{"text": "x", "label": chr(97 + i)} for i, count in enumerate(counts) for _ in range(count)]
    path = write(tmp_path_factory.mktemp("rows") / "rows.jsonl", rows)
    if len(rows) == len(counts):
        with pytest.raises(ConfigError, match="none can be put aside"):
            read(path, Letters(), valid_fraction=share, seed=seed)
        return
    data = read(path, Letters(), valid_fraction=share, seed=seed)
    assert set(data.train.answers.tolist()) == set(range(len(counts))) and len(data.valid) >= 1
    assert len(data.train) + len(data.valid) == len(rows)


def test_a_fraction_beside_a_file(tmp_path):
    write(tmp_path / "train.jsonl", [ROWS["text"]] * 9)
    write(tmp_path / "test.jsonl", [ROWS["text"]])
    data = read(tmp_path, Letters(), valid_fraction=0.3)
    assert [len(part) for part in (data.train, data.valid, data.test)] == [6, 3, 1]
    write(tmp_path / "valid.jsonl", [ROWS["text"]])
    with pytest.raises(ConfigError, match="there is .*valid.jsonl: leave out one of the two"):
        read(tmp_path, Letters(), valid_fraction=0.3)


@pytest.mark.parametrize(("options", "words"), [
    ({"valid_fraction": 0.0}, "valid_fraction"), ({"valid_fraction": 1.0}, "valid_fraction"),
    ({"train_on": "last"}, "train_on"), ({"valid_fraction": float("nan")}, "valid_fraction"), ({"max_length": 0}, "max_length"),
    ({"max_length": True}, "max_length"),
    ({"valid_fraction": 0.5, "seed": -1}, "seed"), ({"max_length": 1}, "room for the special tokens only: give 2 or more"),
])
def test_settings_out_of_range(tmp_path, options, words):
    path = write(tmp_path / "rows.jsonl", [ROWS["text"]] * 9)
    with pytest.raises(ConfigError, match=words):
        read(path, Letters(), **options)


def test_notes(tmp_path):
    write(tmp_path / "train.jsonl", [{"text": "same", "label": "x"}] * 3)
    write(tmp_path / "valid.jsonl", [{"text": "same", "label": "x"}, {"text": "other", "label": "x"}])
    report = read(tmp_path, Letters()).report
    assert report.notes == ["valid: 1 of 2 rows are in train too",
                            "every training row has the same label: there is nothing to learn from it"]
    assert report.header == "data: train 3 rows, valid 2 rows; rows of label: a text's class is learned; 1 classes"
    assert json.loads(json.dumps(report.as_dict()))["parts"]["valid"]["rows"] == 2
    write(tmp_path / "other.jsonl", [ROWS["text"]])
    assert read(tmp_path / "other.jsonl", Letters(eos=None)).report.notes == [
        "the tokenizer has no token that ends texts: the model does not learn where to stop"]


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(FileError):
        read(tmp_path / "none" / "train.jsonl", Letters())
