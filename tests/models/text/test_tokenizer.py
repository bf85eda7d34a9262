"""Tokenizers: ids and text, padding and what is cut, special tokens of every file, older files, and refusals."""
import json
import sys

import numpy as np
import pytest

from minilora.errors import ConfigError, DTypeError, FileError, FormatError
from minilora.models import Tokenizer

tokenizers = pytest.importorskip("tokenizers")

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "a", "b", "c", "d", "e"]


def write(folder, files):
    for name, value in files.items():
        (folder / name).write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def word_file(folder, ends=True):
    """A tokenizer.json of single words, with <s> and </s> around a text; and with settings that would cut and pad."""
    own = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    own.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    own.add_special_tokens(WORDS[:4])
    if ends:
        own.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)])
    own.enable_truncation(3)
    own.enable_padding(length=12)
    own.save(str(folder / "tokenizer.json"))


@pytest.fixture
def folder(tmp_path):
    word_file(tmp_path)
    write(tmp_path, {"tokenizer_config.json": {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False},
                                               "pad_token": "<pad>"}})
    return tmp_path


def test_nothing_is_cut_or_padded_unless_it_is_asked_for(folder):
    for path in (folder, str(folder), folder / "tokenizer.json"):
        made = Tokenizer(path).encode("a b c d e")
        assert made == ([[1, 4, 5, 6, 7, 8, 2]], [[1] * 7], [[0] * 7], [0])


def test_a_batch(folder):
    tokenizer = Tokenizer(folder)
    made = tokenizer.encode(["a", "b c d", ("a b", "c")])
    assert made.ids == [[1, 4, 2], [1, 5, 6, 7, 2], [1, 4, 5, 2, 6, 2]]
    assert made.token_type_ids == [[0] * 3, [0] * 5, [0, 0, 0, 0, 1, 1]]
    right = tokenizer.encode(["a", "b c d"], padding="right")
    assert right.ids.tolist() == [[1, 4, 2, 0, 0], [1, 5, 6, 7, 2]] and right.ids.dtype == "int64"
    assert right.attention_mask.tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    left = tokenizer.encode(["a", "b c d"], padding="left")
    assert left.ids.tolist() == [[0, 0, 1, 4, 2], [1, 5, 6, 7, 2]]
    assert left.attention_mask.tolist() == [[0, 0, 1, 1, 1], [1] * 5] and not left.token_type_ids.any()
    assert tokenizer.encode(["a", "b"], special_tokens=False).ids == [[4], [5]]
    with pytest.raises(DTypeError, match=r"give a list, \[\(first, second\)\]"):
        tokenizer.encode(("a", "b"))
    assert tokenizer.encode([]) == ([], [], [], []) and tokenizer.encode("").ids == [[1, 2]]
    assert tokenizer.encode([], padding="left").ids.shape == (0, 0)


def test_what_is_cut_is_counted(folder):
    tokenizer = Tokenizer(folder)
    made = tokenizer.encode(["a b c d e", "a", ("a b c d", "e b")], max_length=5)
    assert made.ids == [[1, 4, 5, 6, 2], [1, 4, 2], [1, 4, 2, 8, 2]] and made.cut == [2, 0, 4]
    assert tokenizer.encode("a b c d e", max_length=4, cut_side="left").ids == [[1, 7, 8, 2]]
    assert tokenizer.encode("a b c d e", max_length=2).ids == [[1, 2]]
    assert tokenizer.encode("a b c d e", max_length=4, special_tokens=False) == ([[4, 5, 6, 7]], [[1] * 4], [[0] * 4], [1])
    with pytest.raises(ConfigError, match="max_length=1 has no room for the special tokens: give 2 or more"):
        tokenizer.encode("a b", max_length=1)


def test_decode(folder):
    tokenizer = Tokenizer(folder)
    for ids in ([1, 4, 5, 2], np.array([1, 4, 5, 2]), (1, np.int64(4), 5, 2)):
        assert tokenizer.decode(ids) == "a b"
    assert tokenizer.decode([1, 4, 2], skip_special_tokens=False) == "<s> a </s>"
    assert tokenizer.decode([]) == "" and tokenizer.decode_batch([[4], [5, 6]]) == ["a", "b c"]
    assert (tokenizer.id_of("c"), tokenizer.id_of("zz"), tokenizer.token_of(6), len(tokenizer)) == (6, None, "c", 9)
    for wrong in ([[1, 2]], [-1], [1.5], ["a"]):
        with pytest.raises(DTypeError, match="one row of ids"):
            tokenizer.decode(wrong)


def test_special_tokens_of_every_file(folder):
    assert repr(Tokenizer(folder)) == "Tokenizer(9 tokens, bos_id=1, eos_ids=(2,), pad_id=0)"
    write(folder, {"config.json": {"eos_token_id": 5, "bos_token_id": 6, "pad_token_id": -1}})
    assert Tokenizer(folder).eos_ids == (5, 2) and Tokenizer(folder).bos_id == 1
    write(folder, {"generation_config.json": {"eos_token_id": [4, 2], "pad_token_id": 7}})
    assert Tokenizer(folder).eos_ids == (4, 2) and Tokenizer(folder).pad_id == 0
    write(folder, {"tokenizer_config.json": {}})
    assert (Tokenizer(folder).bos_id, Tokenizer(folder).eos_ids, Tokenizer(folder).pad_id) == (6, (4, 2), 7)
    write(folder, {"special_tokens_map.json": {"eos_token": "e", "pad_token": None}})
    assert Tokenizer(folder).eos_ids == (4, 2, 8) and Tokenizer(folder).special_tokens == {"eos_token": "e"}
    write(folder, {"generation_config.json": {}, "config.json": {"pad_token_id": -1}, "special_tokens_map.json": {}})
    tokenizer = Tokenizer(folder)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (None, (), None)
    assert tokenizer.encode(["a", "b c"], padding="left").ids.tolist() == [[0, 1, 4, 2], [1, 5, 6, 2]]
    for wrong in (9, -2, "2", True, [2, 99]):
        write(folder, {"generation_config.json": {"eos_token_id": wrong}})
        with pytest.raises(FormatError, match=r"generation_config.json: eos_token_id is .*another model's tokenizer"):
            Tokenizer(folder)


def test_the_stream_writes_whole_characters(tmp_path):
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    write(tmp_path, {"vocab.json": {letter: i for i, letter in enumerate([*alphabet, "<|endoftext|>"])},
                     "merges.txt": "#version: 0.2\n", "config.json": {"model_type": "gpt2"}})
    tokenizer, pieces = Tokenizer(tmp_path), []
    ids = tokenizer.encode("aé日").ids[0]
    assert len(ids) == 6
    step = tokenizer.streaming(pieces.append)
    for i in ids:
        step(np.array([i]))
    assert pieces == ["a", "é", "日"]
    with pytest.raises(ConfigError, match="give generate one prompt"):
        step(np.array([1, 2]))


# -- older files -----------------------------------------------------------------------------------------------------------


def test_byte_pairs(tmp_path):
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = [*alphabet, "he", "ll", "hell", "Ġw", "<|endoftext|>", "<s>", "</s>", "<pad>", "<mask>"]
    write(tmp_path, {"vocab.json": {token: i for i, token in enumerate(vocabulary)},
                     "merges.txt": "#version: 0.2\nh e\nl l\nhe ll\nĠ w\n"})
    with pytest.raises(FormatError, match=r"of the kind 'unknown'.*say so in its tokenizer_config.json.*GPT2Tokenizer"):
        Tokenizer(tmp_path)
    write(tmp_path, {"config.json": {"model_type": "qwen2"}})
    with pytest.raises(FormatError, match=r"kind 'qwen2'.*AutoTokenizer"):
        Tokenizer(tmp_path)
    write(tmp_path, {"tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}})
    tokenizer = Tokenizer(tmp_path)
    made = tokenizer.encode("hello w<|endoftext|>").ids[0]
    assert [tokenizer.token_of(i) for i in made] == ["hell", "o", "Ġw", "<|endoftext|>"]
    assert tokenizer.decode(made) == "hello w" and tokenizer.eos_ids == (made[-1],)
    begun = {"tokenizer_class": "GPT2TokenizerFast", "bos_token": "<s>", "add_bos_token": True}
    write(tmp_path, {"tokenizer_config.json": begun})
    assert [Tokenizer(tmp_path).token_of(i) for i in Tokenizer(tmp_path).encode("he").ids[0]] == ["<s>", "he"]
    write(tmp_path, {"tokenizer_config.json": {"tokenizer_class": "RobertaTokenizer"}})
    made = Tokenizer(tmp_path).encode([("he", " <mask> w")]).ids[0]
    assert [Tokenizer(tmp_path).token_of(i) for i in made] == ["<s>", "he", "</s>", "</s>", "<mask>", "Ġw", "</s>"]
    write(tmp_path, {"merges.txt": "h\n"})
    with pytest.raises(FormatError, match=r"merges\.txt: cannot be read"):
        Tokenizer(tmp_path)


def test_word_pieces(tmp_path):
    write(tmp_path, {"vocab.txt": "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "dog", "##s", "Dog"]),
                     "config.json": {"model_type": "bert"}})
    made = Tokenizer(tmp_path).encode(["The dögs", ("dog", "[MASK] cat")])
    assert made.ids == [[2, 5, 6, 7, 3], [2, 6, 3, 4, 1, 3]] and made.token_type_ids[1] == [0, 0, 0, 1, 1, 1]
    assert Tokenizer(tmp_path).decode(made.ids[0]) == "the dogs"
    write(tmp_path, {"tokenizer_config.json": {"do_lower_case": False, "tokenizer_class": "DistilBertTokenizer"}})
    assert Tokenizer(tmp_path).encode("Dog The").ids == [[2, 8, 1, 3]]
    write(tmp_path, {"vocab.txt": "a\nb\n[UNK]\n"})
    with pytest.raises(FormatError, match=r"vocab\.txt: has no token '\[SEP\]'"):
        Tokenizer(tmp_path)


# -- refusals ----------------------------------------------------------------------------------------------------------------


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(FileError, match="no such file or folder"):
        Tokenizer(tmp_path / "nothing")
    with pytest.raises(FileError, match="has no tokenizer.json, nor vocab.json and merges.txt, nor vocab.txt"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e")
    with pytest.raises(FileError, match=r"SentencePiece.*AutoTokenizer"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "<html>", '{"model": {"type": "BPE"}}',
                                  "version https://git-lfs.github.com"])
def test_a_file_that_is_none(tmp_path, text):
    write(tmp_path, {"tokenizer.json": text})
    with pytest.raises(FormatError, match=r"tokenizer\.json: no tokenizer that the tokenizers library can read"):
        Tokenizer(tmp_path)


def test_settings_that_are_none(folder):
    write(folder, {"tokenizer_config.json": "[1]"})
    with pytest.raises(FormatError, match="expected a JSON object"):
        Tokenizer(folder)


@pytest.mark.parametrize("wrong", [3, [3], ("a", "b", "c"), [("a",), ()], [None], {"a": 1}.values()])
def test_texts_that_are_none(folder, wrong):
    with pytest.raises((DTypeError, TypeError)):
        Tokenizer(folder).encode(wrong if not isinstance(wrong, tuple) else [wrong])


def test_sides(folder):
    for name in ("padding", "cut_side"):
        with pytest.raises(ConfigError, match=f"{name} must be 'left' or 'right', got 'up'"):
            Tokenizer(folder).encode("a", **{name: "up"})


def test_without_the_library(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(FileError, match=r"pip install 'minilora\[models\]'"):
        Tokenizer(folder)
