"""Tokenizers of older folders, which have a vocabulary and merges, and no tokenizer.json.

Only those are built of which it is known how their texts are cut before merging: GPT-2's, RoBERTa's and BERT's. Others that
come in files of the same names cut otherwise (Qwen2), and would give other ids without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import FileError, FormatError

__all__ = ["from_file", "from_older_files", "library"]

CURE = ("write a tokenizer.json where transformers is installed: AutoTokenizer.from_pretrained(folder, "
        "use_fast=True).save_pretrained(folder)")
CLASSES = {  # by the name of the class, and where none is given by the kind of model
    "GPT2": "gpt2", "gpt2": "gpt2", "Roberta": "roberta", "roberta": "roberta",
    "Bert": "bert", "bert": "bert", "DistilBert": "bert", "distilbert": "bert",
}


def library() -> Any:
    """The tokenizers library; `FileError` with the line to type where it is missing."""
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.normalizers
        import tokenizers.pre_tokenizers
        import tokenizers.processors
    except ImportError as error:
        raise FileError("reading a tokenizer needs the tokenizers library, which is not installed: pip install "
                        "'minilora[models]'") from error
    return tokenizers


def from_file(file: Path) -> Any:
    """A tokenizer.json through the library; its complaints as `FormatError`."""
    try:
        return library().Tokenizer.from_file(str(file))
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError, FileError)):
            raise
        # The library's own panics derive from BaseException.
        raise FormatError(f"{file}: no tokenizer that the tokenizers library can read: {error}. Was it made by a newer "
                          "version? pip install --upgrade tokenizers") from error


def from_older_files(folder: Path, settings: Mapping[str, Any], config: Mapping[str, Any]) -> Any:
    """A tokenizer from vocab.json and merges.txt, or from vocab.txt.

    Raises
    ------
    FileError
        If none of the files is there, or the library is missing.
    FormatError
        If the files are of a kind that is not known, or cannot be read.
    """
    pair, words = (folder / "vocab.json", folder / "merges.txt"), folder / "vocab.txt"
    named = settings.get("tokenizer_class") or config.get("model_type") or ""
    kind = CLASSES.get(str(named).removesuffix("Fast").removesuffix("Tokenizer"))
    if not (all(file.is_file() for file in pair) or words.is_file()):
        if (folder / "tokenizer.model").is_file():
            raise FileError(f"{folder}: has a SentencePiece tokenizer.model and no tokenizer.json, and only that is read: "
                            f"{CURE}")
        raise FileError(f"{folder}: has no tokenizer.json, nor vocab.json and merges.txt, nor vocab.txt: copy them there from "
                        "where the model came")
    if kind is None or (kind == "bert") != words.is_file():
        files = "vocab.txt" if words.is_file() else "vocab.json and merges.txt"
        raise FormatError(f"{folder}: has {files}, no tokenizer.json, and is of the kind {named or 'unknown'!r}; those of "
                          f"GPT-2, RoBERTa and BERT are known: {CURE}. If it is one of them, say so in its "
                          "tokenizer_config.json, such as {\"tokenizer_class\": \"GPT2Tokenizer\"}")
    made = bert(library(), words, settings) if kind == "bert" else byte_pairs(library(), pair, settings, kind == "roberta")
    added = [name.get("content") if isinstance(name, Mapping) else name for name in map(settings.get, SPECIAL)]
    known = [name for name in added if isinstance(name, str) and made.token_to_id(name) is not None]
    known += [name for name in DEFAULTS[kind] if made.token_to_id(name) is not None]
    token = library().AddedToken  # RoBERTa's mask takes in the space before it
    made.add_special_tokens([token(name, lstrip=name == "<mask>", special=True) for name in dict.fromkeys(known)])
    return made


SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
DEFAULTS = {"gpt2": ("<|endoftext|>",), "roberta": ("<s>", "<pad>", "</s>", "<unk>", "<mask>"),
            "bert": ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")}


def byte_pairs(tokenizers: Any, files: tuple[Path, Path], settings: Mapping[str, Any], roberta: bool) -> Any:
    """Byte-level byte-pair encoding: GPT-2's, and RoBERTa's with its tokens around a text."""
    try:
        made = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(*map(str, files)))
    except Exception as error:
        raise FormatError(f"{files[0]} and {files[1].name}: cannot be read: {error}") from error
    space = settings.get("add_prefix_space") is True
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=space)
    made.decoder = tokenizers.decoders.ByteLevel()
    if roberta:
        ends = [(name, token_id(made, name, files[0])) for name in ("</s>", "<s>")]
        made.post_processor = tokenizers.processors.RobertaProcessing(*ends, trim_offsets=True, add_prefix_space=space)
    elif settings.get("add_bos_token") is True:
        name = settings.get("bos_token")
        name = str(name.get("content") if isinstance(name, Mapping) else name or "<|endoftext|>")
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{name} $A", pair=f"{name} $A {name}:1 $B:1", special_tokens=[(name, token_id(made, name, files[0]))])
    return made


def bert(tokenizers: Any, file: Path, settings: Mapping[str, Any]) -> Any:
    """WordPiece with [CLS] and [SEP] around a text."""
    try:
        vocabulary = tokenizers.models.WordPiece.read_file(str(file))
    except Exception as error:
        raise FormatError(f"{file}: cannot be read: {error}") from error
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    made.normalizer = tokenizers.normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=settings.get("tokenize_chinese_chars", True) is True,
        strip_accents=settings.get("strip_accents"), lowercase=settings.get("do_lower_case", True) is True)
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    made.decoder = tokenizers.decoders.WordPiece(prefix="##")
    ends = [(name, token_id(made, name, file)) for name in ("[SEP]", "[CLS]")]
    made.post_processor = tokenizers.processors.BertProcessing(*ends)
    return made


def token_id(made: Any, name: str, file: Path) -> int:
    """The id of a token that must be there."""
    found = made.token_to_id(name)
    if found is None:
        raise FormatError(f"{file}: has no token {name!r}, which texts of this kind begin or end with")
    return int(found)
