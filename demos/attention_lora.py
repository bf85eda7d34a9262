"""LoRA on the keys and values of attention: behind the projection W or beside it, and where the two differ.

    python demos/attention_lora.py                  12 tokens of 64 numbers
    python demos/attention_lora.py --quick          8 tokens of 32
    python demos/attention_lora.py --device gpu     the same code on the GPU

Tokens have a place, a tag and a content. A request asks one of them for its content, so that attention must find it: what
is learned can be seen in the attention map. The base is trained on requests for a place. Then keys and values are adapted:

    beside W    K = W x + s B (A x)      the usual placement: lora.inject
    behind W    K = W x + s B (A W x)    lora.ProjectedAttention: the update reads what W has left of x

First to requests for the place before, which both learn. Then to requests for a tag, on a base whose W_k and W_v do not read
tags. Behind W the merged update is s B (A W): its rows are combinations of rows of W, 0 wherever all of those are. So K and V
stay blind to tags, whatever A and B are. Then any of the T tokens may be the one, given all that the output depends on, and
the mean of their contents is the best answer: its expected error, with contents from N(0, 1), is 1 - 1/T.

Writes report.json and report.png. Exit codes: 0 done, 2 wrong usage, 4 diverged, 130 interrupted.
"""

import math
import sys
from typing import NamedTuple

from showing import console, attention_lora as pages  # first: it says how to install minilora
from showing.divergence import Watch
from showing.progress import Progress

import minilora
import numpy

SETTINGS = {  # name: (full size, --quick, meaning)
    "tokens": (12, 8, "tokens of a sample, and its requests"),
    "content": (48, 16, "numbers in a content"),
    "n": (2000, 500, "samples"),
    "r": (8, 8, "rank of the updates"),
    "lora_alpha": (16.0, 16.0, "the updates are scaled by lora_alpha / r"),
    "steps": (500, 250, "steps of each training"),
    "batch_size": (16, 16, "samples in a batch"),
    "lr": (0.01, 0.01, "learning rate of Adam"),
}
CODE = 8  # numbers that a place or a tag is written in
PLACE, TAG = slice(0, CODE), slice(CODE, 2 * CODE)  # where in a token; its content is the rest
KEPT = (1.0, 0.5, 0.2, 0.1)  # what W_k and W_v keep of their columns that read tags
FRESH = 500  # samples to measure the loss on


class Samples(NamedTuple):
    """Tokens and requests (n, T, 2 CODE + content), the contents asked for (n, T, content), and whose they are (n, T)."""

    tokens: object
    requests: object
    answers: object
    found: numpy.ndarray


class Task:
    """A relation between requests and tokens, one of pages.RELATIONS: samples to learn it from, and fresh ones."""

    def __init__(self, relation, config):
        rng = numpy.random.default_rng((config.seed, pages.RELATIONS.index(relation)))
        self.training, self.fresh = (draw_samples(relation, n, config, rng) for n in (config.n, FRESH))
        rows = [rng.choice(config.n, config.batch_size, replace=False) for _ in range(config.steps)]
        self.batches = minilora.to_device(numpy.stack(rows))  # the same for all who learn this task


def draw_samples(relation, n, config, rng):
    """Tokens stand at their places in order. Tags, where there are any, are dealt out anew in every sample."""
    places = numpy.broadcast_to(numpy.arange(config.tokens), (n, config.tokens))
    tokens, requests = numpy.zeros((2, n, config.tokens, 2 * CODE + config.content), "float32")
    tokens[..., PLACE] = code(places, config.tokens)
    tokens[..., TAG.stop:] = content = rng.standard_normal((n, config.tokens, config.content))
    if relation == "tag":
        tags, asked = rng.permuted(places, axis=1), rng.permuted(places, axis=1)
        tokens[..., TAG], requests[..., TAG] = code(tags, config.tokens), code(asked, config.tokens)
        found = numpy.take_along_axis(numpy.argsort(tags, axis=1), asked, axis=1)
    else:
        requests[..., PLACE] = code(places, config.tokens)
        found = (places - (relation == "before")) % config.tokens  # before the first comes the last
    answers = numpy.take_along_axis(content, found[..., None], axis=1).astype("float32")
    return Samples(*map(minilora.to_device, (tokens, requests, answers)), found)


def code(numbers, period):
    """Numbers (...) as points on CODE / 2 circles, (..., CODE): 1 to CODE / 2 times around."""
    angles = 2.0 * math.pi / period * numbers[..., None] * numpy.arange(1, CODE // 2 + 1)
    return numpy.concatenate([numpy.cos(angles), numpy.sin(angles)], axis=-1)


def answer(model, tokens, requests):
    """What the model takes for the contents asked for: the last numbers of its outputs."""
    return model(tokens, tokens, requests)[..., TAG.stop:]


def train(label, model, task, config):
    """Adam on the task's batches. Gives what the report says of a training."""
    loss_of = minilora.nn.MSELoss()
    optimizer = minilora.optim.Adam(model.parameters(), lr=config.lr)
    measured = {round(config.steps * k / 10) for k in range(1, 11)}
    tokens, requests, answers, _ = task.training
    curve, record = [], {"trained": minilora.summary(model).trained, "steps": [0], "losses": [fresh_loss(model, task)]}
    watch = Watch(*console.gentler(config, SETTINGS, "lr", "lora_alpha"), f"{label}: the loss")
    with Progress(label, config.steps, interval=math.inf) as progress:  # elsewhere than on a terminal: its end
        for step, rows in enumerate(task.batches, start=1):
            loss = loss_of(answer(model, tokens[rows], requests[rows]), answers[rows])
            curve.append(loss.data)  # on the device: nothing waits for a number between the measurements
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step in measured:
                record["steps"].append(step)
                record["losses"].append(watch.check(fresh_loss(model, task), step))
            progress.advance(text=f"loss {record['losses'][-1]:<9.4g}")
    return {**record, **measure(model, task), "curve": [float(minilora.to_host(loss)) for loss in curve]}


@minilora.no_grad()
def fresh_loss(model, task):
    """The mean squared error on samples that no training has seen. On a GPU a sync point."""
    tokens, requests, answers, _ = task.fresh
    return minilora.nn.MSELoss()(answer(model, tokens, requests), answers).item()


@minilora.no_grad()
def measure(model, task):
    """What is looked at when a training is over, on the fresh samples."""
    tokens, requests, _, found = task.fresh
    maps, output = attention_maps(model, tokens, requests), minilora.to_host(model(tokens, tokens, requests).data)
    mixed = maps @ minilora.to_host(model.values(tokens).data)
    error = mixed @ model.fc_out.weight.numpy().T + model.fc_out.bias.numpy() - output
    said, contents = output[..., TAG.stop:], minilora.to_host(tokens)[..., TAG.stop:]
    closeness = said @ contents.swapaxes(-1, -2) - 0.5 * numpy.square(contents).sum(-1)[:, None]
    return {
        "loss": fresh_loss(model, task),
        "right": float((closeness.argmax(-1) == found).mean()),  # answers that are closest to the content asked for
        "attention": float(numpy.take_along_axis(maps, found[..., None], axis=-1).mean()),  # on the token that has it
        "map_error": float(abs(error).max()),  # whether the maps are those that the model computes with
        "map": maps[0].tolist(),
    }


@minilora.no_grad()
def attention_maps(model, tokens, requests):
    """softmax(Q K^T / sqrt(d)), (n, requests, tokens), in plain NumPy from the model's own queries and keys."""
    Q, K = (minilora.to_host(part.data).astype("float64") for part in (model.queries(requests), model.keys(tokens)))
    scores = Q @ K.swapaxes(-1, -2) / math.sqrt(Q.shape[-1])
    weights = numpy.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def copy_of(base, kept=1.0):
    """A copy of the base whose keys and values read `kept` times as much of a tag."""
    state = base.state_dict()
    for name in ("keys.weight", "values.weight"):
        state[name][:, TAG] *= kept
    model = minilora.nn.SimpleAttention(len(state["keys.weight"]))
    model.load_state_dict(state)
    return model


def adapted(base, way, config, r=None):
    """A model that starts as `base` and is trained in one of three ways; `base` stays as it is."""
    rng = numpy.random.default_rng((config.seed, len(pages.RELATIONS)))
    r = r or config.r
    if way == "behind":
        return minilora.lora.ProjectedAttention.of(base, r=r, lora_alpha=config.lora_alpha, rng=rng)
    model = copy_of(base)
    if way == "beside":
        settings = minilora.lora.Config(r=r, lora_alpha=config.lora_alpha, target_modules=["keys", "values"])
        minilora.lora.inject(model, settings, rng=rng)
    return model


def adapt(base, task, label, config, record):
    """Train all three ways on a task; `record` grows with each. Gives the models."""
    models, weights = {}, base.state_dict()  # copied: the update behind W shares the base's arrays
    record["found"], record["base"] = task.fresh.found[0].tolist(), measure(base, task)
    for way, name in pages.WAYS.items():
        model = models[way] = adapted(base, way, config)
        record[way] = train(f"{label}, {name}", model, task, config)
        if way != "full":
            record[way]["merge"] = merge_and_unmerge(model, weights, task)
    return models


def merge_and_unmerge(model, weights, task):
    """The loss with the updates in the weights, and whether the base's weights are there before and after."""
    unchanged, loss = holds(model, weights), fresh_loss(model, task)
    minilora.lora.merge(model)
    merged_loss = fresh_loss(model, task)
    minilora.lora.unmerge(model)
    return {"adapter_loss": loss, "merged_loss": merged_loss, "relative_difference": abs(merged_loss - loss) / (loss or 1.0),
            "base_unchanged": unchanged, "base_restored_bit_for_bit": holds(model, weights)}


def holds(model, weights):
    """Whether a model holds these weights, bit for bit."""
    state = model.state_dict()
    return all(state[name].tobytes() == weight.tobytes() for name, weight in weights.items())


def largest_tag_entry(model):
    """Of the merged updates of W_k and W_v: the largest in the columns that read tags."""
    return max(float(abs(minilora.to_host(layer.delta())[:, TAG]).max()) for layer in (model.keys, model.values))


def run(config, report):
    """The whole job. All random numbers are drawn on the host: one seed gives one run on every device."""
    place, before, tag = (Task(relation, config) for relation in pages.RELATIONS)

    console.heading("1. The task: a request asks one of the tokens for its content")
    print(pages.task_text(report))

    console.heading("2. Pre-training: a request names a place. Every weight is trained")
    base = minilora.nn.SimpleAttention(2 * CODE + config.content, rng=numpy.random.default_rng(config.seed))
    report["pretraining"] = train("pre-training", base, place, config)
    print(pages.pretraining_text(report))

    console.heading("3. LoRA on keys and values: the place before the one that is named")
    adapt(base, before, "before", config, report.setdefault("before", {}))
    print(pages.before_text(report))

    console.heading("4. A lost direction: a request names a tag, and W_k and W_v do not read tags")
    blind = copy_of(base, kept=0.0)
    record = report["tag"] = {"first_task_loss": {"base": fresh_loss(base, place), "blind": fresh_loss(blind, place)},
                              "mean_of_contents_loss": float(numpy.var(minilora.to_host(tag.fresh.answers), axis=1).mean())}
    models = adapt(blind, tag, "tag", config, record)
    record["largest_tag_entry"] = {way: largest_tag_entry(models[way]) for way in pages.LORA_WAYS}
    model = adapted(blind, "behind", config, r=blind.keys.in_features)
    record["largest_rank"] = {"r": model.keys.r, **train("tag, behind W, largest r", model, tag, config)}
    print(pages.tag_text(report))

    console.heading("5. Nearly lost: how much of the direction must be left?")
    for kept in KEPT:
        part, record = copy_of(base, kept), {"kept": kept}
        for way in pages.LORA_WAYS:
            record[way] = train(f"tag, {kept:g} kept, {pages.WAYS[way]}", adapted(part, way, config), tag, config)
            del record[way]["curve"], record[way]["map"]  # drawn for the comparisons above only
        report.setdefault("kept", []).append(record)
    print(pages.kept_text(report))

    console.heading("6. Merge and unmerge")
    print(pages.merge_text(report))


def parse():
    """The configuration, or exit code 2 with every problem on one line."""
    parser, config = console.configuration("attention_lora", __doc__.split("\n")[0], SETTINGS)
    problems = [f"--{name.replace('_', '-')} must be at least {least}, got {getattr(config, name)}"
                for name, least in (("tokens", 2), ("content", 1), ("n", 1), ("r", 1), ("steps", 1), ("batch_size", 1))
                if getattr(config, name) < least]
    if 1 <= config.content < config.r - 2 * CODE:
        problems.append(f"--r {config.r} is more than the {2 * CODE} + --content = {2 * CODE + config.content} numbers of a "
                        "token: no update of that rank exists")
    if 1 <= config.n < config.batch_size:
        problems.append(f"--batch-size {config.batch_size} is more than the {config.n} samples of --n")
    console.refuse(parser, config, problems, positive=("lora_alpha", "lr"))
    return config


def main():
    config = parse()
    report = console.begun(config, width=2 * CODE + config.content, code=CODE, fresh_samples=FRESH)
    with console.reporting(report):
        print(console.title(pages.title(report)))
        with numpy.errstate(over="ignore", invalid="ignore"):  # the check of the loss says it better
            run(config, report)
    print("\n" + pages.draw(report))
    return 0


if __name__ == "__main__":
    sys.exit(console.run(main, "attention_lora.py"))
