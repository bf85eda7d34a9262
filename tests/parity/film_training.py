"""The training of demos/film_reviews.py on both sides: minilora, and torch + transformers + peft, on the same batches.

    python tests/parity/film_training.py --model FOLDER_OR_WHEEL --data ARCHIVE [--side query_value] [--steps N] [--out DIR]

needs torch, transformers and peft, and takes some minutes; --help of the demo says where model and data come from. Both start
from the same A, B and linear layer, which peft reads from an adapter's folder that minilora wrote, without dropout; both have
AdamW, the same rates in every step, and the same clipping. Printed are the losses of the steps, what both say of the held-out
sentences, with minilora's adapter also in peft, and what each took.
"""
import argparse
import contextlib
import math
import sys
import tempfile
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from minilora import formats, lora, models, nn, no_grad, train
from minilora.train.beside import Beside
from minilora.train.made import made_schedule

DEMOS = Path(__file__).resolve().parents[2] / "demos"
LABELS = ("negative", "positive")
TARGETS = {"query_value": ["query", "value"], "all_linear": ["query", "key", "value", "dense"]}
RATES = {"query_value": 1e-3, "all_linear": 5e-4}


def demo_pieces():
    """The demo's sentences and its encoder: showing.film_data."""
    sys.path.insert(0, str(DEMOS))
    try:
        from showing import film_data
    finally:
        sys.path.remove(str(DEMOS))
    return film_data


def start(folder, side, r=8, lora_alpha=16.0, dtype=None):
    """Our classifier with a new adapter, without dropout."""
    model = models.load(folder, head="sentence_classification", labels=LABELS, rng=0, dtype=dtype)
    for _, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    config = lora.Config(r=r, lora_alpha=lora_alpha, target_modules=TARGETS[side], modules_to_save=["classifier"])
    lora.inject(model, config, rng=0)
    return model


class Losses(Beside):
    """The loss of every step, and the norm of its gradient."""

    def __init__(self):
        self.found = []

    def after_step(self, run, made):
        self.found.append((made.loss, made.norm))


def ours(model, data, settings):
    """Train; (loss, norm) of every step."""
    losses = Losses()
    train.fit(model, data, settings, beside=[losses], quiet=True)
    return losses.found


def peft_model(folder, adapter, dtype, trainable=False):
    """transformers' BertModel with the linear layer beside it, and an adapter's folder in peft: what a user of peft writes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of their imports
        import peft
        import torch
        import transformers
    transformers.logging.set_verbosity_error()
    base = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False, dtype=getattr(torch, dtype))
    base.classifier = torch.nn.Linear(base.config.hidden_size, len(LABELS), dtype=getattr(torch, dtype))
    return peft.PeftModel.from_pretrained(base, str(adapter), is_trainable=trainable)


def logits_in_torch(model, inputs):
    """Mean over the tokens, and the linear layer."""
    import torch

    mask = torch.from_numpy(np.asarray(inputs["key_padding"], "int64"))
    h = model(input_ids=torch.from_numpy(np.asarray(inputs["ids"])), attention_mask=mask).last_hidden_state
    m = mask[..., None].to(h.dtype)
    return model.base_model.model.classifier((h * m).sum(1) / m.sum(1))


def theirs(model, data, settings):
    """The same training in torch; (loss, norm) of every step."""
    import torch

    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, made_schedule(settings, settings.steps))
    found = []
    for rows in batches(data, settings):
        inputs = data.batch(rows).inputs
        loss = torch.nn.functional.cross_entropy(logits_in_torch(model, inputs), torch.from_numpy(inputs["labels"]))
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm or math.inf)
        optimizer.step()
        rates.step()
        found.append((float(loss.detach()), float(norm)))
    model.eval()
    return found


def batches(data, settings):
    """The batches of a run, in its order."""
    made, epoch = 0, 0
    while made < settings.steps:
        for rows in data.order(settings.seed, epoch, settings.batch_size)[:settings.steps - made]:
            made += 1
            yield rows
        epoch += 1


def answers(logits_of, data):
    """Logits (n, 2) of all rows."""
    found = np.empty((len(data), len(LABELS)))
    for rows in data.in_order(32):
        found[rows] = logits_of(data.batch(rows).inputs)
    return found


def our_answers(model, data):
    with no_grad():
        return answers(lambda inputs: model(inputs["ids"], key_padding=inputs["key_padding"]).numpy(), data)


def their_answers(model, data):
    import torch

    with torch.inference_mode():
        return answers(lambda inputs: logits_in_torch(model, inputs).numpy(), data)


# -- the real one -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def timed(times, name):
    began, cpu = time.perf_counter(), time.process_time()
    yield
    times[name] = time.perf_counter() - began, time.process_time() - cpu


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--side", choices=list(TARGETS), default="all_linear")
    parser.add_argument("--steps", type=int, default=188, help="of 32 sentences; 94 are an epoch (default 188)")
    parser.add_argument("--out", help="folder for the model and the two adapters (default: one that is removed)")
    given = parser.parse_args()
    with contextlib.ExitStack() as stack:
        out = Path(given.out or stack.enter_context(tempfile.TemporaryDirectory()))
        compare(given, out)


def compare(given, out):
    film_data = demo_pieces()
    reviews = film_data.read_reviews(given.data)
    folder, name = film_data.read_encoder(given.model, str(out / "model"))
    films = film_data.Films(reviews, models.Tokenizer(folder), name)
    data, test = films.parts["train"], films.parts["test"]
    settings = train.Settings(steps=given.steps, batch_size=32, learning_rate=RATES[given.side], schedule="linear", warmup=0.06)
    times, right = {}, {}
    model = start(folder, given.side)
    formats.save_adapter(model, out / "first")
    other = peft_model(folder, out / "first", "float32", trainable=True)
    with timed(times, "minilora"):
        one = ours(model, data, settings)
    formats.save_adapter(model, out / "trained")
    with timed(times, "torch + peft"):
        two = theirs(other, data, settings)
    labels = films.labels["test"]
    found = SimpleNamespace(ours=our_answers(model, test), theirs=their_answers(other, test),
                            moved=their_answers(peft_model(folder, out / "trained", "float32"), test))
    for who, logits in (("minilora", found.ours), ("torch + peft", found.theirs), ("minilora's adapter in peft", found.moved)):
        right[who] = (logits.argmax(1) == labels).mean()
    for step in sorted({*range(0, given.steps, max(1, given.steps // 20)), given.steps - 1}):
        print(f"step {step + 1:>4}  loss {one[step][0]:.6f}  {two[step][0]:.6f}  difference {one[step][0] - two[step][0]:+.1e}")
    for who, share in right.items():
        seconds, cpu = times.get(who, (0.0, 0.0))
        error = math.sqrt(share * (1 - share) / len(labels))
        print(f"{who:<28} {100 * share:.1f} % of {len(labels):,}, standard error {100 * error:.1f}"
              + (f"; {seconds:.0f} s, CPU {cpu:.0f} s" if cpu else ""))
    alike = (found.ours.argmax(1) == found.theirs.argmax(1)).mean()
    print(f"both say the same of {100 * alike:.1f} %; the moved adapter's logits differ by "
          f"{abs(found.ours - found.moved).max():.1e} at most, where the largest is {abs(found.ours).max():.1f}")


if __name__ == "__main__":
    main()
