"""One token of greedy generation with a cache, GPT-2-small shape, random weights: minilora against transformers on the CPU.

12 layers, width 768, 12 heads, vocabulary 50257, float32; a prompt of --prompt tokens, --batch texts. A step is one new token
for each text: the time of a call with N + 1 new tokens less that of a call with 1, which also reads the prompt, over N.

Besides: the products of a step alone (NumPy), which read 124 million weights once, and what reading as many bytes takes: a
sum over one array of their size. Neither can be gone below. How the sides alternate: alternate.py.
"""
import time

import alternate
import numpy
from alternate import compare, comparison_table, median, quartiles, run, table

LAYERS, D, HEADS, VOCABULARY, POSITIONS = 12, 768, 12, 50257, 1024
SIZES = {"batch": 1, "prompt": 32}
alternate.WARM_UP = 1


def prompts():
    return numpy.random.default_rng(0).integers(0, VOCABULARY, (SIZES["batch"], SIZES["prompt"]))


def steps_of(generate):
    """The time of a step, from `generate(n)`, a call with n new tokens."""
    def measured(n):
        start = time.perf_counter()
        generate(1)
        first = time.perf_counter()
        generate(n + 1)
        both = time.perf_counter()
        return {"seconds": max(1e-9, (both - first) - (first - start)) / n, "first": first - start}
    return measured


def minilora_model():
    from minilora import models
    config = models.GPT2Config(vocab_size=VOCABULARY, n_positions=POSITIONS, n_embd=D, n_layer=LAYERS, n_head=HEADS)
    return models.GPT2(config, rng=0)


def minilora_cache():
    from minilora import models
    model, ids = minilora_model(), prompts()
    return steps_of(lambda n: models.generate(model, ids, n))


def transformers_cache():
    import torch
    import transformers
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_positions=POSITIONS, n_embd=D, n_layer=LAYERS, n_head=HEADS)
    model, ids = transformers.GPT2LMHeadModel(config).eval(), torch.from_numpy(prompts())
    mask = torch.ones_like(ids)
    return steps_of(lambda n: model.generate(ids, attention_mask=mask, max_new_tokens=n, do_sample=False, pad_token_id=0,
                                             eos_token_id=None))


def matrices():
    rng = numpy.random.default_rng(0)
    shapes = [(3 * D, D), (D, D), (4 * D, D), (D, 4 * D)] * LAYERS + [(VOCABULARY, D)]
    return [rng.standard_normal(shape, dtype="float32") for shape in shapes]


def products_alone():
    from minilora import ops
    from minilora.engine import no_grad
    weights = matrices()
    inputs = {n: numpy.ones((SIZES["batch"], n), "float32") for n in (D, 4 * D)}

    def measured(n):
        start = time.perf_counter()
        with no_grad():
            for _ in range(n):
                for W in weights:
                    ops.linear(inputs[W.shape[1]], W)
        return {"seconds": (time.perf_counter() - start) / n, "first": 0.0}
    return measured


def bytes_alone():
    weights = numpy.ones(sum(W.size for W in matrices()), "float32")

    def measured(n):
        start = time.perf_counter()
        for _ in range(n):
            weights.dot(weights)
        return {"seconds": (time.perf_counter() - start) / n, "first": 0.0}
    return measured


SIDES = {
    "minilora": minilora_cache,
    "transformers": transformers_cache,
    "the products alone": products_alone,
    "reading the weights": bytes_alone,
}


def report(results):
    rows = []
    for name, rounds in results.items():
        low, high = quartiles(rounds)
        rows.append([name, f"{1e3 * median(rounds):.1f}", f"{1e3 * low:.1f} to {1e3 * high:.1f}",
                     f"{SIZES['batch'] / median(rounds):.1f}", f"{1e3 * median(rounds, 'first'):.0f}"])
    print(table(["side", "ms a step", "quartiles", "tokens/s", "ms for the prompt"], rows) + "\n")
    comparisons = compare(results, [
        ("a step / transformers", "minilora", "transformers", 1.0),
        ("prompt / transformers", "minilora", "transformers", None, "first"),
        ("products alone / a step", "the products alone", "minilora", None),
        ("reading the weights / a step", "reading the weights", "minilora", None),
    ])
    print(comparison_table(comparisons))
    return comparisons


if __name__ == "__main__":
    run(__file__, __doc__, SIDES, report, rounds=6, steps=10, sizes=SIZES)
