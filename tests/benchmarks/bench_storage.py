"""A LoRA step of the GPT-2-small shape beside frozen weights in 16 bits: bytes held, time, and what the loss differs by.

12 layers, width 768, vocabulary 50257, batch 4 x 128 (--layers, --batch, --length), LoRA of rank 8 on queries, keys and
values. Each side reads the same checkpoint of its kind from a temporary folder, and adds in float32. Expected: half the bytes,
and the time of decoding each weight twice a step, 0.4 ms for a million numbers, beside products of 512 rows with it.
"""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import alternate
from alternate import compare, comparison_table, median, quartiles, run, table, timed

alternate.WARM_UP = 1
SIZES = {"layers": 12, "batch": 4, "length": 128}
R, ALPHA = 8, 16


def lora_step(kind):
    import minilora
    import numpy
    from minilora import models, quant
    from minilora.stored import Stored

    folder = Path(tempfile.mkdtemp())
    atexit.register(functools.partial(shutil.rmtree, folder, ignore_errors=True))
    model = models.GPT2(models.GPT2Config(n_layer=SIZES["layers"]), rng=0).requires_grad(False)
    if kind != "float32":
        quant.quantize(model, kind)
    models.save(model, folder)
    model = models.load(folder, dtype="keep")
    minilora.lora.inject(model, minilora.lora.Config(r=R, lora_alpha=ALPHA, target_modules=["c_attn"]), rng=0)
    model.train()
    held = sum(p.data.nbytes for p in model.parameters() if not p.trainable)
    assert kind == "float32" or all(isinstance(p.data, Stored) for p in model.parameters() if not p.trainable and p.ndim > 1)
    ids = numpy.random.default_rng(0).integers(0, 50257, (SIZES["batch"], SIZES["length"]))
    optimizer = minilora.optim.Adam(model.parameters(), lr=1e-3)
    losses = []

    def step():
        loss = model.loss(ids, ids)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    measure = timed(step)
    return lambda n: {**measure(n), "held": held / 1e6, "first": losses[0]}


def float32():
    return lora_step("float32")


def bfloat16():
    return lora_step("bfloat16")


def float16():
    return lora_step("float16")


SIDES = {"float32": float32, "bfloat16": bfloat16, "float16": float16}


def report(results):
    exact = median(results["float32"], "first")
    rows = []
    for name, rounds in results.items():
        low, high = quartiles(rounds)
        rows.append([name, f"{median(rounds, 'held'):.1f}", f"{median(rounds):.3f}", f"{low:.3f} to {high:.3f}",
                     f"{median(rounds, 'first') - exact:+.1e}"])
    print(table(["base", "MB held", "s a step", "quartiles", "first loss, against float32"], rows) + "\n")
    comparisons = compare(results, [("time", "bfloat16", "float32", 1.25), ("time", "float16", "float32", 1.35),
                                    ("bytes held", "bfloat16", "float32", 0.51, "held")])
    print(comparison_table(comparisons))
    return comparisons


if __name__ == "__main__":
    run(__file__, __doc__.split("\n")[0], SIDES, report, rounds=5, steps=2, sizes=SIZES)
