"""What `hollow.rehearse` predicts of a step's memory against what a process takes: full fine-tuning, LoRA, QLoRA, blocks again.

Two shapes with random weights: GPT-2 small (12 x 768, vocabulary 50257) and the encoder of the film reviews (MiniLM, 6 x 384).
Each side is a process of its own. Measured is the largest private memory while two steps run (a thread reads
/proc/self/smaps_rollup every 2 ms), less what the process held before it made the model, after a small product that lets
BLAS take its buffers. Run with OPENBLAS_NUM_THREADS=1; --small takes 2 x 128 tokens.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy

ROOT = Path(__file__).resolve().parent.parent.parent
# What is freed goes back to the system at once: else the process keeps it, and one that made a float32 model first, or another
# model, shows that and not the step.
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
WAYS = ("full fine-tuning", "LoRA", "LoRA, blocks again", "QLoRA, nf4")
MODELS = ("GPT-2 small", "encoder")


def shaped(name, rng):
    import minilora
    if name == "encoder":
        config = minilora.nn.BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
        return minilora.models.SentenceClassifier(minilora.nn.Bert(config, rng=rng), minilora.models.Labels(2), rng=rng)
    return minilora.nn.GPT2(minilora.nn.GPT2Config(), rng=rng)


def made(name, way, rng):
    """The model as it is trained, for real or without numbers."""
    from minilora import lora, nn, quant
    model = shaped(name, rng)
    if way.startswith("QLoRA"):
        model.requires_grad(False)
        quant.quantize(model, "nf4")
    if not way.startswith("full"):
        targets = ["query", "value"] if name == "encoder" else ["c_attn"]
        lora.inject(model, lora.Config(r=8, lora_alpha=16, target_modules=targets), rng=rng)
    if way.endswith("blocks again"):
        nn.grad_checkpoint(model)
    return model


def private():
    """Bytes that belong to this process alone."""
    with open("/proc/self/smaps_rollup") as file:
        return 1024 * sum(int(line.split()[1]) for line in file if line.startswith("Private"))


class Peak(threading.Thread):
    """The largest private memory from start to stop."""

    def __init__(self):
        super().__init__(daemon=True)
        self.most, self.going = 0, True

    def run(self):
        while self.going:
            self.most = max(self.most, private())
            time.sleep(0.002)

    def stop(self):
        self.going = False
        self.join()
        return self.most


def side(name, way, rows, length):
    """In a process of its own: the prediction, then the measurement."""
    import minilora
    from minilora import optim
    from minilora.hollow import rehearse
    numpy.dot(numpy.ones((512, 512), "float32"), numpy.ones((512, 512), "float32"))
    # Imports, and what kernels make once: with a tiny model, since memory that is freed stays in the process, to be used again.
    tiny = minilora.nn.GPT2(minilora.nn.GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2), rng=0)
    rehearse(tiny, tiny.example(2, 8))
    before = private()
    model = made(name, way, 0).train()
    held = private() - before
    example = model.example(rows, length)
    step = rehearse(model, example)
    optimizer = optim.Adam(model.parameters())
    watch = Peak()
    watch.start()
    for _ in range(2):
        loss = model(**example)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {"predicted": step.peak, "measured": watch.stop() - before, "held": held, **dict(zip(step._fields[:5], step[:5]))}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--one", nargs=2)
    args = parser.parse_args()
    rows, length = (2, 128) if args.small else (4, 256)
    if args.one:
        print(json.dumps(side(*args.one, rows, length)))
        return
    print(f"| model, {rows} x {length} | way to train | predicted MB | measured MB | predicted / measured |")
    print("|---|---|---|---|---|")
    for name in MODELS:
        for way in WAYS:
            words = [sys.executable, __file__, "--one", name, way, *["--small"] * args.small]
            environment = {"OPENBLAS_NUM_THREADS": "1", **os.environ, **RETURNED, "PYTHONPATH": str(ROOT)}
            done = subprocess.run(words, capture_output=True, text=True, env=environment)
            if done.returncode:
                sys.exit(done.stderr)
            found = json.loads(done.stdout.splitlines()[-1])
            predicted, measured = found["predicted"] / 1e6, found["measured"] / 1e6
            print(f"| {name} | {way} | {predicted:.1f} | {measured:.1f} | {predicted / measured:.3f} |", flush=True)


if __name__ == "__main__":
    main()
