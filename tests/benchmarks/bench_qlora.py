"""One training step of a GPT-2-small shape beside frozen weights in low precision: float32, bfloat16, int8, NF4.

12 layers, width 768, 12 heads, vocabulary 50257, batch 4 x 128, random weights; LoRA of rank 8 on every linear layer but the
head, Adam with its defaults, no dropout. A step: forward, cross-entropy, backward, Adam. The weights of the linear layers are
held as each side says, and decoded some rows at a time in forward and again for dx; embeddings, norms, head and adapters are
float32. Besides: what decoding all of them once costs.

Bits a weight and bytes held are counted. How the sides alternate, and why in processes of their own: alternate.py. The peak is
that of each side's process, which made the float32 model first.
"""

import resource

import alternate
import numpy
from alternate import compare, comparison_table, median, quartiles, run, table, timed

SIZES = {"layers": 12, "heads": 12, "width": 768, "vocabulary": 50257, "batch": 4, "time": 128, "r": 8}
alternate.WARM_UP = 1  # a step takes a second


def prepared(kind):
    import minilora
    from minilora import lora, quant
    config = minilora.nn.GPT2Config(vocab_size=SIZES["vocabulary"], n_positions=max(16, SIZES["time"]), n_layer=SIZES["layers"],
                                    n_embd=SIZES["width"], n_head=SIZES["heads"])
    model = minilora.nn.GPT2(config, rng=0).requires_grad(False)
    if kind != "float32":
        quant.quantize(model, kind)
    lora.inject(model, lora.Config(r=SIZES["r"], lora_alpha=16, target_modules=["c_attn", "c_proj", "c_fc"]), rng=1)
    return model


def weights(model):
    from minilora import nn
    return [m.weight.data for path, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in path]


def facts_of(model):
    held = weights(model)
    return {"bits": 8 * sum(W.nbytes for W in held) / sum(W.size for W in held), "weights": sum(W.size for W in held),
            "held": sum(p.data.nbytes for p in model.parameters()) / 2**20}


def step_of(kind):
    def setup():
        import minilora
        model = prepared(kind)
        ids = numpy.random.default_rng(0).integers(0, SIZES["vocabulary"], (SIZES["batch"], SIZES["time"]))
        optimizer = minilora.optim.Adam([p for p in model.parameters() if p.trainable])

        def step():
            loss = model.loss(ids, ids)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        measured, more = timed(step), facts_of(model)
        return lambda n: {**measured(n), **more, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    return setup


def decoding_of(kind):
    """Every weight once, as a step does twice."""
    def setup():
        model = prepared(kind)
        held, more = weights(model), facts_of(model)

        def decode():
            for W in held:
                for low, high in W.tiles():
                    W.rows(low, high)

        measured = timed(decode)
        return lambda n: {**measured(n), **more, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    return setup


KINDS = ("float32", "bfloat16", "int8", "nf4")
SIDES = {**{f"step, {kind}": step_of(kind) for kind in KINDS},
         **{f"decoding, {kind}": decoding_of(kind) for kind in KINDS[1:]}}


def report(results):
    rows = []
    for name, rounds in results.items():
        low, high = quartiles(rounds)
        rows.append([name, f"{1000 * median(rounds):.1f}", f"{1000 * low:.1f} to {1000 * high:.1f}",
                     f"{1e9 * median(rounds) / rounds[0]['weights']:.2f}", f"{rounds[0]['bits']:.3f}",
                     f"{rounds[0]['held']:,.0f}", f"{median(rounds, 'peak'):,.0f}"])
    print(table(["", "ms", "quartiles", "ns a weight", "bits a weight", "model, MB", "peak, MB"], rows))
    goals = {"nf4": 1.6}
    comparisons = compare(results, [(f"{kind} / float32", f"step, {kind}", "step, float32", goals.get(kind), "seconds")
                                    for kind in KINDS[1:]])
    comparisons += compare(results, [(f"{kind} / float32, CPU", f"step, {kind}", "step, float32", None, "cpu")
                                     for kind in KINDS[1:]])
    print(f"\n{comparison_table(comparisons)}")
    return comparisons


if __name__ == "__main__":
    run(__file__, __doc__, SIDES, report, rounds=5, steps=2, sizes=SIZES)
