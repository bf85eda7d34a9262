"""What the training loop costs against the bare step, on the GPT-2-small shape: an update of `train.fit`, with files and lines.

The model of bench_gpt2.py: 12 layers, width 768, batch 4 x 128, LoRA of rank 8 on c_attn. The bare step: forward, backward,
clipping, AdamW. The loop draws and pads its batch besides, keeps the last good weights, looks whether all is finite, and writes
metrics and progress, a report every 10 steps. Take `--one-process`: then the turns follow each other more closely.
"""

import io
import sys
import tempfile
from pathlib import Path

import alternate
from alternate import compare, comparison_table, median, quartiles, run, table, timed
from bench_gpt2 import ALPHA, R, minilora_model, tokens

alternate.WARM_UP = 1  # a step takes a second
RATE, NORM = 2e-4, 1.0


def adapted():
    from minilora import lora

    model = minilora_model("cpu")
    lora.inject(model, lora.Config(r=R, lora_alpha=ALPHA, target_modules=["c_attn"]), rng=0)
    return model


def bare():
    from minilora import optim

    model, ids = adapted().train(), tokens()
    optimizer = optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)

    def step():
        loss = model.loss(ids, ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.clip_grad_norm(NORM)
        optimizer.step()
        return loss.item()

    return timed(step)


def loop():
    from minilora.train import Settings
    from minilora.train.data import Tokens
    from minilora.train.distributed.comm import Serial
    from minilora.train.metrics import Metrics
    from minilora.train.progress import Progress
    from minilora.train.run import Run, loss_of_model

    ids = tokens()
    settings = Settings(steps=10 ** 6, batch_size=len(ids), learning_rate=RATE, max_grad_norm=NORM, steps_per_eval=10 ** 6)
    model = adapted().train()
    made = Run(model, Tokens(ids.tolist()), settings, loss_of_model, Serial())
    objects = [Metrics(Path(tempfile.mkdtemp())), Progress()]
    for one in objects:
        one.begin(made)

    def step():
        said, sys.stderr = sys.stderr, io.StringIO()
        try:
            update = made.update()
            for one in objects:
                one.after_step(made, update)
        finally:
            sys.stderr = said

    return timed(step)


SIDES = {"the loop": loop, "the bare step": bare}


def report(results):
    rows = []
    for name, rounds in results.items():
        low, high = quartiles(rounds)
        rows.append([name, f"{median(rounds):.3f}", f"{low:.3f} to {high:.3f}", f"{median(rounds, 'cpu'):.3f}"])
    print(table(["side", "s a step", "quartiles", "CPU s"], rows) + "\n")
    comparisons = compare(results, [("the loop / the bare step", *SIDES, 1.03),
                                    ("the loop / the bare step, CPU time", *SIDES, 1.03, "cpu")])
    print(comparison_table(comparisons))
    return comparisons


if __name__ == "__main__":
    run(__file__, __doc__.split("\n")[0], SIDES, report, rounds=8, steps=2)
