"""One training step of a small BERT, random weights: LoRA in minilora against transformers + peft on the CPU.

The shape of MiniLM-L6: 6 layers, width 384, 12 heads, vocabulary 30522; 32 texts of 32 tokens, two classes behind the pooler,
float32; LoRA of rank 8 on query and value, Adam with its defaults, no dropout. A step: forward, cross-entropy, backward, Adam.
minilora does it with the whole batch at once, and with its rows in parts, one a core (`minilora.parallel`). Besides: the matrix
products of the step alone, which nothing can go below.

Loaded from a checkpoint the weights are views of the mapped file: that side trains the same model as it comes from one. And
1,000 texts of 4 to 128 tokens become sentence embeddings, forward only: sorted by length, 32 at a time, on both sides.

How the sides alternate, and why in processes of their own: alternate.py. On a machine with other work the ratio of the minima
and that of the CPU times say most; with --threads 1 they should agree.
"""

import atexit
import resource
import shutil
import tempfile

import alternate
import numpy
from alternate import compare, comparison_table, median, quartiles, run, table, timed

SIZES = {"layers": 6, "width": 384, "heads": 12, "rows": 32, "tokens": 32, "rank": 8}
VOCABULARY, CLASSES, ALPHA, EPS = 30522, 2, 16, 1e-12
alternate.WARM_UP = 2


def data():
    rng = numpy.random.default_rng(0)
    return rng.integers(0, VOCABULARY, (SIZES["rows"], SIZES["tokens"])), rng.integers(0, CLASSES, SIZES["rows"])


def many_texts():
    rng = numpy.random.default_rng(1)
    lengths = numpy.clip(rng.lognormal(3.2, 0.6, 1000).astype(int), 4, 128)  # as of sentences: 24 tokens in the middle
    return [rng.integers(1, VOCABULARY, length).tolist() for length in lengths]


def with_peak(run):
    def measured(n):
        return {**run(n), "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}  # KB on Linux
    return measured


# -- minilora ---------------------------------------------------------------------------------------------------------


def small_bert():
    from minilora import models
    d = SIZES["width"]
    config = models.BertConfig(vocab_size=VOCABULARY, hidden_size=d, num_hidden_layers=SIZES["layers"],
                               num_attention_heads=SIZES["heads"], intermediate_size=4 * d, layer_norm_eps=EPS)
    return models.Bert(config, rng=0)


def loaded():
    """The same model out of a file."""
    from minilora import models
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    models.save(small_bert(), folder)
    return models.load(folder)


def minilora_model(make=small_bert):
    import minilora
    from minilora import lora, nn
    bert, head = make().requires_grad(False).train(), nn.Linear(SIZES["width"], CLASSES, rng=1).requires_grad(False)
    for layer in bert.encoder.layer:
        inputs = layer.attention.self
        for name in ("query", "value"):
            setattr(inputs, name, lora.adapt(getattr(inputs, name), r=SIZES["rank"], lora_alpha=ALPHA))

    def loss_of(part):
        ids, labels = part
        return minilora.ops.cross_entropy(head(bert.pool(bert(ids))), labels)

    return bert, loss_of


def minilora_steps(threads, make=small_bert):
    import minilora
    bert, loss_of = minilora_model(make)
    batch, optimizer = data(), minilora.optim.Adam(bert.parameters())
    number = threads(bert)

    def step():
        optimizer.zero_grad()
        minilora.parallel.backward(loss_of, batch, number)
        optimizer.step()

    return with_peak(timed(step))


def minilora_whole():
    return minilora_steps(lambda model: 1)


def minilora_parts():
    from minilora import parallel
    return minilora_steps(lambda model: parallel.cores())


def minilora_loaded():
    from minilora import parallel
    return minilora_steps(lambda model: parallel.cores(), loaded)


def minilora_embedding():
    from minilora import models
    encoder, texts = models.SentenceEncoder(loaded()).eval(), many_texts()
    return with_peak(timed(lambda: encoder.embed(texts, batch_size=32)))


# -- transformers and peft --------------------------------------------------------------------------------------------


def peft_lora():
    import peft
    import torch
    import transformers
    torch.manual_seed(0)
    d = SIZES["width"]
    config = transformers.BertConfig(vocab_size=VOCABULARY, hidden_size=d, num_hidden_layers=SIZES["layers"],
                                     num_attention_heads=SIZES["heads"], intermediate_size=4 * d, layer_norm_eps=EPS,
                                     hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=CLASSES)
    model = transformers.BertForSequenceClassification(config)
    model = peft.get_peft_model(model, peft.LoraConfig(r=SIZES["rank"], lora_alpha=ALPHA, target_modules=["query", "value"]))
    ids, labels = map(torch.from_numpy, data())
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    model.train()

    def step():
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return with_peak(timed(step))


def transformers_embedding():
    import torch
    import transformers
    torch.manual_seed(0)
    d = SIZES["width"]
    config = transformers.BertConfig(vocab_size=VOCABULARY, hidden_size=d, num_hidden_layers=SIZES["layers"],
                                     num_attention_heads=SIZES["heads"], intermediate_size=4 * d, layer_norm_eps=EPS)
    model, texts = transformers.BertModel(config).eval(), sorted(many_texts(), key=len, reverse=True)

    def step():
        with torch.inference_mode():
            for start in range(0, len(texts), 32):
                chosen = texts[start:start + 32]
                ids = torch.zeros((len(chosen), len(chosen[0])), dtype=torch.long)
                mask = torch.zeros_like(ids)
                for i, text in enumerate(chosen):
                    ids[i, :len(text)], mask[i, :len(text)] = torch.tensor(text), 1
                h = model(input_ids=ids, attention_mask=mask).last_hidden_state
                m = mask[..., None].to(h.dtype)
                torch.nn.functional.normalize((h * m).sum(1) / m.sum(1), dim=1)

    return with_peak(timed(step))


# -- floor ------------------------------------------------------------------------------------------------------------


def products():
    """The big products of the step as (m, k, n, times): forward, and dx where a gradient goes down."""
    d, layers, N = SIZES["width"], SIZES["layers"], SIZES["rows"] * SIZES["tokens"]
    inner = [(d, d, layers), (d, 4 * d, layers), (4 * d, d, layers)]
    forward = [(N, i, o, times) for i, o, times in [(d, d, 3 * layers), *inner]]
    down = [(N, o, i, times) for i, o, times in [(d, d, 3 * (layers - 1)), *inner]]  # nothing is trained below the first layer
    return forward + down


def products_alone():
    rng = numpy.random.default_rng(0)
    operands = [(rng.standard_normal((m, k), dtype="float32"), rng.standard_normal((k, n), dtype="float32"),
                 numpy.empty((m, n), "float32"), times) for m, k, n, times in products()]

    def step():
        for a, b, out, times in operands:
            for _ in range(times):
                numpy.dot(a, b, out=out)

    return with_peak(timed(step))


SIDES = {
    "minilora": minilora_whole,
    "minilora, rows in parts": minilora_parts,
    "minilora, loaded, in parts": minilora_loaded,
    "transformers + peft": peft_lora,
    "minilora, 1,000 embeddings": minilora_embedding,
    "transformers, 1,000 embeddings": transformers_embedding,
    "NumPy, the big products alone": products_alone,
}


def report(results):
    rows = []
    for name, rounds in results.items():
        low, high = quartiles(rounds)
        rows.append([name, f"{median(rounds):.3f}", f"{low:.3f} to {high:.3f}", f"{min(r['seconds'] for r in rounds):.3f}",
                     f"{median(rounds, 'cpu'):.3f}", f"{median(rounds, 'faults'):.0f}", f"{median(rounds, 'peak'):.0f}"])
    print(table(["side", "s a step", "quartiles", "least", "CPU s", "page faults", "peak MB"], rows) + "\n")
    gflop = sum(2e-9 * m * k * n * times for m, k, n, times in products())
    print(f"{SIZES}; the big products of a step: {gflop:.1f} GFLOP\n")
    peer = "transformers + peft"
    comparisons = compare(results, [
        ("rows in parts / transformers + peft", "minilora, rows in parts", peer, 1.0),
        ("loaded, rows in parts / transformers + peft", "minilora, loaded, in parts", peer, 1.0),
        ("loaded / made here, rows in parts", "minilora, loaded, in parts", "minilora, rows in parts", None),
        ("1,000 embeddings / transformers", "minilora, 1,000 embeddings", "transformers, 1,000 embeddings", 0.8),
        ("whole batch / transformers + peft", "minilora", peer, None),
        ("rows in parts / whole batch", "minilora, rows in parts", "minilora", None),
        ("big products / whole batch", "NumPy, the big products alone", "minilora", None),
        ("CPU time, rows in parts / peer", "minilora, rows in parts", peer, None, "cpu"),
        ("CPU time, whole batch / peer", "minilora", peer, None, "cpu"),
        ("peak memory, rows in parts / peer", "minilora, rows in parts", peer, None, "peak"),
    ])
    print(comparison_table(comparisons))
    return comparisons


if __name__ == "__main__":
    run(__file__, __doc__, SIDES, report, rounds=10, steps=3, sizes=SIZES)
