"""The folder in which the examples of the verbs run, and the tests of verbs that need small files. Made without any package
but NumPy; what reads texts with a tokenizer needs tokenizers.

    base        a decoder of the Llama family with a tokenizer of words
    adapter     an adapter of base on all its linear layers (PEFT's folder), as after a training
    other       another one, of another rank, on two kinds of layers
    tuned       base with adapter in its weights
    encoder     a small BERT with a pooling, as of sentence-transformers
    data        train.jsonl and valid.jsonl of {"prompt", "completion"}
    reviews     train.jsonl and valid.jsonl of {"text", "label"}
    texts.txt   one text a line
"""
import json

import numpy as np

from minilora import lora, models
from minilora.formats import save_adapter

WORDS = ("<pad> <s> </s> <unk> [CLS] [SEP] a the cat dog bird film sat ran sang was is on in and good bad long short dull fine "
         "mat tree house we saw it liked hated . ? !").split()
ADAPTED = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama():
    config = models.LlamaConfig(vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                num_key_value_heads=1, intermediate_size=24, max_position_embeddings=64)
    return models.Llama(config, rng=0)


def bert():
    config = models.BertConfig(vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                               intermediate_size=24, max_position_embeddings=64)
    return models.SentenceEncoder(models.Bert(config, rng=0), "mean", True, 32)


def adapt(model, r, targets, seed):
    lora.inject(model, lora.Config(r=r, lora_alpha=2 * r, target_modules=targets, task_type="CAUSAL_LM"), rng=seed)
    rng = np.random.default_rng(seed)
    for path, parameter in model.named_parameters():
        if parameter.trainable:
            parameter.data[...] += rng.normal(0.0, 0.05, parameter.shape)
    return model


def write_tokenizer(folder, first="<s>", last=None):
    ends = [{"SpecialToken": {"id": last, "type_id": 0}}] if last else []
    one = [{"SpecialToken": {"id": first, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}, *ends]
    special = {word: {"id": word, "ids": [WORDS.index(word)], "tokens": [word]} for word in (first, last) if word}
    file = {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": {"type": "Lowercase"},
        "added_tokens": [{"id": i, "content": word, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
                          "special": True} for i, word in enumerate(WORDS[:6])],
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": {"type": "TemplateProcessing", "single": one, "special_tokens": special,
                           "pair": [*one, {"Sequence": {"id": "B", "type_id": 1}}, *ends]},
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(WORDS)}, "unk_token": "<unk>"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(file))
    settings = {"bos_token": "<s>", "eos_token": last or "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def sentences(count, seed):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        thing, did = rng.choice(["cat", "dog", "bird", "film"]), rng.choice(["sat", "ran", "sang", "was long", "was short"])
        place, good = rng.choice(["mat", "tree", "house"]), bool(rng.integers(2))
        yield f"the {thing} {did}", f"on the {place} .", f"we {'liked' if good else 'hated'} it . it was " \
            f"{'fine and good' if good else 'dull and bad'}", "good" if good else "bad"


def write_rows(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make(folder):
    """Make all of it in a folder."""
    models.save(llama(), folder / "base")
    write_tokenizer(folder / "base")
    save_adapter(adapt(llama(), 4, ADAPTED, 1), folder / "adapter")
    save_adapter(adapt(llama(), 2, ["q_proj", "v_proj"], 2), folder / "other")
    tuned = adapt(llama(), 4, ADAPTED, 1)
    lora.bake(tuned)
    models.save(tuned, folder / "tuned")
    write_tokenizer(folder / "tuned")
    models.save(bert(), folder / "encoder")
    write_tokenizer(folder / "encoder", "[CLS]", "[SEP]")
    for name, count, seed in (("train", 40, 1), ("valid", 8, 2)):
        made = list(sentences(count, seed))
        write_rows(folder / "data" / f"{name}.jsonl", [{"prompt": a, "completion": " " + b} for a, b, *_ in made])
        write_rows(folder / "reviews" / f"{name}.jsonl", [{"text": text, "label": label} for *_, text, label in made])
    (folder / "texts.txt").write_text("".join(f"{a} {b}\n" for a, b, *_ in sentences(6, 3)))
