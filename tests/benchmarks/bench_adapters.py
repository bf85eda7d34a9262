"""The forward pass of one model in every state that adapters can be in, and what a swap costs.

A GPT-2 of 4 layers, width 512, batch 4 x 128, float32, no gradients; LoRA of rank 8 on all linear layers. Sides: the base;
one adapter beside the weights; the same adapter merged; switched off; and a batch whose four rows have three different
adapters and none. A merged model runs the base's operations, so its time is the base's up to noise. Besides: the seconds of
one `lora.activate`.
"""

import numpy
from alternate import compare, comparison_table, median, quartiles, run, table, timed

NAMES = ("one", "two", "three")


def model_and_ids():
    import minilora
    from minilora import lora

    config = minilora.nn.GPT2Config(vocab_size=1000, n_positions=128, n_embd=512, n_layer=4, n_head=8)
    model = minilora.nn.GPT2(config, rng=0)
    ids = numpy.random.default_rng(0).integers(0, config.vocab_size, (4, 128))
    return minilora, lora, model, ids


def with_adapters():
    minilora, lora, model, ids = model_and_ids()
    rng = numpy.random.default_rng(1)
    for name in NAMES:
        lora.inject(model, lora.Config(r=8, lora_alpha=16, target_modules="all-linear"), name, rng=rng)
        for path, p in model.named_parameters():
            if path.endswith(f"{name}.lora_B"):
                p.data[...] = 0.01 * rng.standard_normal(p.shape)
    lora.activate(model, "one", trainable=False)
    return minilora, lora, model, ids


def forward(minilora, model, ids):
    def step():
        with minilora.no_grad():
            model(ids)
    return timed(step)


def base():
    minilora, _, model, ids = model_and_ids()
    return forward(minilora, model, ids)


def adapter():
    minilora, _, model, ids = with_adapters()
    return forward(minilora, model, ids)


def merged():
    minilora, lora, model, ids = with_adapters()
    lora.merge(model)
    return forward(minilora, model, ids)


def switched_off():
    minilora, lora, model, ids = with_adapters()
    lora.activate(model)
    return forward(minilora, model, ids)


def mixed():
    minilora, lora, model, ids = with_adapters()

    def step():
        with minilora.no_grad(), lora.mixed(model, adapter_names=[*NAMES, "__base__"]):
            model(ids)
    return timed(step)


def swap():
    _, lora, model, _ = with_adapters()
    names = list(NAMES)

    def step():
        names.append(names.pop(0))
        lora.activate(model, names[0], trainable=False)
    return timed(step)


SIDES = {"base": base, "one adapter": adapter, "merged": merged, "switched off": switched_off, "mixed batch": mixed,
         "swap": swap}


def report(results):
    rows = []
    for name, rounds in results.items():
        low, high = quartiles(rounds)
        rows.append([name, f"{1e3 * median(rounds):.2f}", f"{1e3 * low:.2f} to {1e3 * high:.2f}"])
    print(table(["side", "ms", "quartiles"], rows) + "\n")
    comparisons = compare(results, [
        ("merged / base", "merged", "base", 1.03),
        ("switched off / base", "switched off", "base", 1.03),
        ("one adapter / base", "one adapter", "base", None),
        ("mixed batch / base", "mixed batch", "base", None),
    ])
    print(comparison_table(comparisons))
    return comparisons


if __name__ == "__main__":
    run(__file__, __doc__.split("\n")[0], SIDES, report, rounds=8, steps=10)
