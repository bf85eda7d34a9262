"""A step rehearsed without numbers, against the step itself: kept bytes exactly, the peak as tracemalloc sees it."""
import dataclasses
import gc
import tracemalloc

import numpy as np
import pytest

from minilora import Parameter, Tensor, engine, lora, nn, ops, optim, quant
from minilora.errors import ConfigError, ShapeError
from minilora.hollow import rehearse
from minilora.hollow.step import loss_of

GPT2 = nn.GPT2Config(vocab_size=499, n_positions=64, n_embd=48, n_layer=2, n_head=4)
BERT = nn.BertConfig(vocab_size=499, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=192,
                     max_position_embeddings=64)
LLAMA = nn.LlamaConfig(vocab_size=499, hidden_size=48, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                       num_key_value_heads=2)
IDS = np.random.default_rng(0).integers(2, 499, (8, 64))
PADDED = np.ones((8, 64), bool)
PADDED[3:, 40:] = False
LABELS = np.where(PADDED, IDS, -100)
TEXT = dict(ids=IDS, labels=IDS)


def adapted(make, **more):
    def made():
        model = make()
        options = dict(r=4, target_modules="all-linear")
        lora.inject(model, lora.Config(**{**options, **more}), rng=0)
        return model
    return made


def gpt2(**more):
    dtype = more.pop("dtype", "float32")
    return lambda: nn.GPT2(dataclasses.replace(GPT2, **more), rng=0, dtype=dtype)


def bert(**more):
    return lambda: nn.Bert(dataclasses.replace(BERT, **more), rng=0)


def again(make):
    def made():
        model = make()
        nn.grad_checkpoint(model)
        return model
    return made


def several():
    model = adapted(gpt2())()
    lora.inject(model, lora.Config(r=8, target_modules=["c_attn"]), "other", rng=1)
    return model


def embedding_alone():
    model = gpt2()().requires_grad(False)
    model.wte.weight.trainable = True
    return model


def images():
    rng = np.random.default_rng(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, rng=rng), nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 16, 3, rng=rng),
                         nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16 * 7 * 7, 10, rng=rng))


def adapted_images():
    model = images()
    lora.inject(model, lora.Config(r=2, target_modules=["0", "3"]), rng=0)
    return model


def in_sixteen():
    model = gpt2()().requires_grad(False)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.weight.data = quant.Sixteen(module.weight.data.astype("float16"))
    lora.inject(model, lora.Config(r=4, target_modules="all-linear"), rng=0)
    return model


IMAGES = np.zeros((16, 3, 16, 16), "float32")
CASES = {
    "whole": (gpt2(), TEXT), "adapters": (adapted(gpt2()), TEXT), "own head": (gpt2(tie_word_embeddings=False), TEXT),
    "blocks again": (again(adapted(gpt2())), TEXT), "whole again": (again(gpt2()), TEXT),
    "dora": (adapted(gpt2(), use_dora=True), TEXT), "dropout": (adapted(gpt2(resid_pdrop=0.1), lora_dropout=0.1), TEXT),
    "modules saved": (adapted(gpt2(), target_modules=["c_attn"], modules_to_save=["ln_f", "wpe"]), TEXT),
    "several": (several, TEXT),
    "embedding alone": (embedding_alone, TEXT), "table": (adapted(gpt2(), target_modules=["wte", "c_fc"]), TEXT),
    "double": (adapted(gpt2(dtype="float64")), TEXT), "half": (adapted(gpt2(dtype="float16")), TEXT),
    "padding": (adapted(gpt2()), dict(ids=IDS, labels=LABELS, key_padding=PADDED)),
    "encoder": (adapted(bert()), dict(ids=IDS, key_padding=PADDED)),
    "encoder, whole": (bert(hidden_dropout_prob=0.1), dict(ids=IDS)),
    "llama": (adapted(lambda: nn.Llama(LLAMA, rng=0)), TEXT), "images": (images, IMAGES),
    "adapted images": (adapted_images, IMAGES),
    "sixteen bits": (in_sixteen, TEXT),
}


def measured(make, example, optimizer):
    """What the second step of a real model takes: bytes kept for backward, and the peak."""
    gc.collect()
    tracemalloc.start()
    try:
        model = make().train()
        made = optimizer([{"params": [p for p in model.parameters() if p.trainable]}])
        given = Tensor(example) if isinstance(example, np.ndarray) else example
        for _ in range(2):
            tracemalloc.reset_peak()
            loss = loss_of(model, given)
            kept = engine.ledger(loss).nbytes
            made.zero_grad()
            loss.backward()
            made.step()
            del loss
        return kept, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", CASES)
def test_a_step_takes_what_was_told(name):
    make, example = CASES[name]
    step = rehearse(make(), example)
    kept, peak = measured(make, example, optim.Adam)
    assert step.activations == kept
    assert step.peak == pytest.approx(peak, rel=0.05)
    assert min(step[:5]) >= 0 and step.peak == sum(step[:5])


def test_a_rehearsal_changes_nothing_and_reads_nothing():
    model = adapted(gpt2(resid_pdrop=0.1))()
    before = {name: array.copy() for name, array in model.state_dict().items()}
    modes = [(module.training, p.data) for module in [model] for p in model.parameters()]
    step = rehearse(model.eval(), TEXT)
    assert all((model.state_dict()[name] == array).all() for name, array in before.items()) and not model.training
    assert all(p.data is data and p.room is None for p, (_, data) in zip(model.parameters(), modes))
    with nn.undrawn():
        empty = nn.GPT2(dataclasses.replace(GPT2, resid_pdrop=0.1))
    lora_step = rehearse(empty, TEXT)
    assert lora_step.activations == rehearse(gpt2(resid_pdrop=0.1)(), TEXT).activations and step.peak > 0


def test_flops_by_hand():
    layer = nn.Linear(20, 30, rng=0)
    step = rehearse(layer, np.zeros((7, 20), "float32"))
    assert step.forward == (2 * 7 * 20 * 30, 0, 0) and step.backward == (2 * 7 * 20 * 30, 0, 0)

    def loss(model, x):
        y = model(x)
        return ops.matmul(y, y.T).mean()

    step = rehearse(layer, np.zeros((7, 20), "float32"), loss=loss)
    assert step.forward.activations == 2 * 7 * 7 * 30 and step.backward.activations == 2 * 2 * 7 * 7 * 30


def test_optimizers_and_clipping():
    model, x = nn.Linear(100, 50, rng=0), np.zeros((7, 100), "float32")
    adam = rehearse(model, x)
    plain = rehearse(model, x, optimizer=lambda groups: optim.SGD(groups, lr=0.1))
    moment = rehearse(model, x, optimizer=lambda groups: optim.SGD(groups, lr=0.1, momentum=0.9))
    assert adam.weights == adam.gradients == moment.moments == adam.moments // 2 == 4 * 5050
    assert plain[:4] == moment[:4] and moment.peak < adam.peak  # SGD has a place for m, also where it is not used
    assert rehearse(model, x, max_norm=1.0).peak >= adam.peak


def test_parameters_of_two_dtypes_and_a_tied_one():
    class Model(nn.Module):
        def __init__(self):
            self.a = Parameter(np.zeros((8, 8), "float32"))
            self.b = self.a
            self.c = Parameter(np.zeros(3))

        def forward(self, x):
            return ops.matmul(ops.matmul(x, self.a), self.b).mean() + self.c.sum().astype("float32")

    step = rehearse(Model(), (np.zeros((4, 8), "float32"),))
    assert step.weights == step.gradients == 4 * 64 + 8 * 3


def test_what_cannot_be_rehearsed():
    with pytest.raises(ConfigError, match="no trainable parameter"):
        rehearse(gpt2()().requires_grad(False), TEXT)
    with pytest.raises(ShapeError, match="expected a loss"):
        rehearse(nn.Linear(3, 2), np.zeros((4, 3), "float32"), loss=lambda model, x: model(x))
