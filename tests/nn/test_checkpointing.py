"""A model whose blocks are computed again in backward: the same bits, in less memory."""

import copy
import pickle
import tracemalloc

import numpy
import pytest
from hypothesis import given, settings, strategies as st

import minilora
from minilora import engine, lora, nn, ops, parallel
from minilora.errors import ConfigError, DTypeError, GraphError

FAMILIES = {
    "gpt2": lambda p: nn.GPT2(nn.GPT2Config(vocab_size=31, n_positions=16, n_embd=8, n_layer=2, n_head=2, resid_pdrop=p,
                                            embd_pdrop=p), rng=0),
    "llama": lambda p: nn.Llama(nn.LlamaConfig(vocab_size=31, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
                                               num_attention_heads=2, num_key_value_heads=1,
                                               max_position_embeddings=16), rng=0),
    "bert": lambda p: minilora.models.BertMaskedLM(
        minilora.models.BertConfig(vocab_size=31, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
                                   intermediate_size=12, max_position_embeddings=16, hidden_dropout_prob=p), rng=0),
    "roberta": lambda p: minilora.models.RobertaMaskedLM(
        minilora.models.RobertaConfig(vocab_size=31, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
                                      intermediate_size=12, max_position_embeddings=20, hidden_dropout_prob=p), rng=0),
    "distilbert": lambda p: minilora.models.DistilBertMaskedLM(
        minilora.models.DistilBertConfig(vocab_size=31, dim=8, n_layers=2, n_heads=2, hidden_dim=12, max_position_embeddings=16,
                                         dropout=p), rng=0),
    "deberta": lambda p: minilora.models.DebertaV2MaskedLM(
        minilora.models.DebertaV2Config(vocab_size=31, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
                                        intermediate_size=12, max_position_embeddings=16, hidden_dropout_prob=p,
                                        relative_attention=True, pos_att_type=("c2p", "p2c")), rng=0),
}


def adapted(family, p, **fields):
    model = FAMILIES[family](p)
    fields = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear", "lora_dropout": p, **fields}
    lora.inject(model, lora.Config(**fields), rng=1)
    for i, parameter in enumerate(model.parameters()):
        if parameter.trainable:
            parameter.data[...] += 0.1 * numpy.random.default_rng(i).normal(size=parameter.shape).astype(parameter.dtype)
    return model.train()


def after_steps(model, threads, steps=3):
    """The bits of a short training: losses, parameters, counters."""
    batch = {"ids": numpy.random.default_rng(5).integers(5, 31, (4, 9))}
    batch["labels"] = numpy.where(numpy.random.default_rng(6).random(batch["ids"].shape) < 0.4, -100, batch["ids"])
    batch["key_padding"] = numpy.arange(9) < numpy.array([[9], [7], [9], [4]])
    optimizer = minilora.optim.AdamW(model.parameters(), lr=1e-2)
    bits = []
    for _ in range(steps):
        loss = parallel.backward(lambda part: model(**part), batch, threads, lambda part: float((part["labels"] != -100).sum()))
        bits.append(loss.numpy())
        optimizer.step()
        optimizer.zero_grad()
    return bits + [p.numpy() for p in model.parameters() if p.trainable] + [numpy.asarray(v) for _, v in model.named_state()]


def equal(one, other):
    return len(one) == len(other) and all(a.dtype == b.dtype and numpy.array_equal(a, b) for a, b in zip(one, other))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_bits(family, threads):
    plain, again = adapted(family, 0.2), adapted(family, 0.2)
    assert len(nn.grad_checkpoint(again)) == 2
    assert equal(after_steps(plain, threads), after_steps(again, threads))


@pytest.mark.parametrize("fields", [{"use_dora": True}, {"bias": "all"}, {"use_rslora": True, "init_lora_weights": "gaussian"}])
def test_other_adapters(fields):
    plain, again = adapted("gpt2", 0.1, **fields), adapted("gpt2", 0.1, **fields)
    nn.grad_checkpoint(again)
    assert equal(after_steps(plain, 1), after_steps(again, 1))


@pytest.mark.parametrize("family", FAMILIES)
def test_only_inputs_are_kept(family):
    model = adapted(family, 0.0)
    ids = numpy.arange(9) + 5
    nn.grad_checkpoint(model)
    rows = [row for row in engine.ledger(model(ids, labels=ids)).rows if row.op == "Recompute"]
    assert len(rows) == 2
    assert {row.kept[0] for row in rows} == {((9, 8), "float32")}
    model.eval()
    assert "Recompute" not in {row.op for row in engine.ledger(model(ids, labels=ids)).rows}
    nn.grad_checkpoint(model.train(), False)
    assert "Recompute" not in {row.op for row in engine.ledger(model(ids, labels=ids)).rows}


class Blocks(nn.Module):
    """A tower of blocks that share nothing, each of several layers and dropouts."""

    def __init__(self, depth, d=6, p=0.3, layers=2):
        rng = numpy.random.default_rng(0)

        def layer():
            return [nn.Linear(d, d, rng=rng), nn.Tanh(), nn.Dropout(p, rng=rng)]
        self.blocks = [nn.Sequential(*(part for _ in range(layers) for part in layer())) for _ in range(depth)]

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


@settings(deadline=None, max_examples=40)
@given(flags=st.lists(st.booleans(), min_size=1, max_size=5), outer=st.booleans(), frozen=st.sets(st.integers(0, 4)),
       steps=st.integers(1, 3))
def test_any_choice_of_blocks_one_inside_another(flags, outer, frozen, steps):
    def bits(use):
        model = Blocks(len(flags))
        model.grad_checkpoint = use and outer
        for i, block in enumerate(model.blocks):
            block.grad_checkpoint = use and flags[i]
            block.requires_grad(i not in frozen)
        if not any(p.trainable for p in model.parameters()):
            return []
        x = minilora.tensor(numpy.random.default_rng(1).normal(size=(5, 6)), dtype="float32")
        for _ in range(steps):
            minilora.ops.mse(model(x), x).backward()
        return [p.grad for p in model.parameters() if p.trainable] + [numpy.asarray(v) for _, v in model.named_state()]

    assert equal(bits(False), bits(True))


def test_memory_is_that_of_one_block():
    def peak(use):
        model = Blocks(12, d=64, p=0.0, layers=4)
        if use:
            nn.grad_checkpoint(model)
        x = minilora.tensor(numpy.ones((2000, 64)), dtype="float32")
        tracemalloc.start()
        model(x).sum().backward()
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    before, after = peak(False), peak(True)
    # Of 12 blocks with an input and 4 pairs of arrays each, 12 inputs stay and one block: (12 + 9) / (12 x 9) = 0.19.
    assert after < 0.3 * before, (before, after)


def test_contexts_are_those_of_the_forward_pass():
    plain, again = adapted("gpt2", 0.0), adapted("gpt2", 0.0)
    nn.grad_checkpoint(again)
    ids, gradients = numpy.arange(18).reshape(2, 9), []
    for model in (plain, again):
        lora.inject(model, lora.Config(r=3, lora_alpha=3, target_modules=["c_fc"]), "other", rng=2)
        lora.activate(model, "default", "other")
        with lora.mixed(model, ["other", "other"]):
            loss = model(ids, labels=ids)
        loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.trainable])
    assert all((a is None) == (b is None) and (a is None or numpy.array_equal(a, b)) for a, b in zip(*gradients))
    assert any(g is None for g in gradients[0])  # that which no row used: no gradient, and not zeros


def test_what_does_not_fit_is_said():
    layer = nn.Linear(3, 3, rng=0)
    x = minilora.tensor(numpy.ones((2, 3)), dtype="float32")

    def used(function, owned=layer):
        return ops.recompute(function, owned.parameters(), x)

    y = used(lambda x: layer(x))
    layer.weight.data[...] *= 2.0
    layer.weight.version += 1
    with pytest.raises(GraphError, match="written in place"):
        y.sum().backward()
    y = used(lambda x: layer(x))
    layer.load_state_dict(layer.state_dict())
    with pytest.raises(GraphError, match="was replaced after the forward"):
        y.sum().backward()
    assert layer.weight.grad is None
    outside = layer(x)
    with pytest.raises(GraphError, match=r"goes back to Linear with output \(2, 3\).*as an argument"):
        used(lambda x: layer(x) + outside).sum().backward()
    other = nn.Linear(3, 3, rng=1)
    with pytest.raises(GraphError, match=r"parameters of shape .*\(3, 3\).* belong to another module"):
        used(lambda x: other(layer(x))).sum().backward()
    with pytest.raises(DTypeError, match="one Tensor, got tuple"):
        used(lambda x: (layer(x), x))
    turns = iter([2, 3])
    with pytest.raises(GraphError, match="the second pass gave"):
        used(lambda x: layer(x)[:next(turns) - 1]).sum().backward()
    y = used(lambda x: layer(x))
    y.sum().backward()
    with pytest.raises(GraphError, match="earlier backward"):
        y.sum().backward()
    with pytest.raises(ConfigError, match="no list of modules of one class.*grad_checkpoint = True"):
        nn.grad_checkpoint(layer)


@pytest.mark.parametrize("later", ["eval", "train"])
def test_a_mode_that_changed_in_between_is_found(later):
    model = Blocks(1)
    nn.grad_checkpoint(model)
    if later == "train":
        dict(model.named_modules())['blocks.0.2'].eval()
    loss = model(minilora.tensor(numpy.ones((2, 6)), dtype="float32")).sum()
    getattr(model, later)()
    with pytest.raises(GraphError, match="masks of dropout"):
        loss.backward()
    assert all(p.grad is None for p in model.parameters())


def test_arguments_of_every_kind():
    class Takes(nn.Module):
        def __init__(self):
            self.w = minilora.Parameter(numpy.array([2.0, 3.0], "float32"))

        def forward(self, x, pair, *, more, mask, scale):
            return (x * self.w + pair[0] * pair[1]["k"]) * minilora.Tensor(mask) + more * scale

    given = [minilora.Parameter(numpy.array([i, 1.0], "float32")) for i in range(4)]
    gradients = []
    for use in (False, True):
        module = Takes()
        module.grad_checkpoint = use
        x, a, b, c = (p * 1.0 for p in given[:3]), None, None, None
        x, a, b = x
        c = given[3]  # a parameter that is no attribute
        for p in given:
            p.grad = None
        module(x, (a, {"k": b}), more=c, mask=numpy.array([1.0, 0.5], "float32"), scale=2.0).sum().backward()
        gradients.append([p.grad for p in (*given, module.w)])
    assert equal(*gradients)


def test_copies_keep_the_choice():
    model = adapted("gpt2", 0.1)
    nn.grad_checkpoint(model)
    expected = after_steps(copy.deepcopy(model), 1, 1)
    assert equal(after_steps(pickle.loads(pickle.dumps(model)), 1, 1), expected)


def test_backward_within_no_grad():
    layer = nn.Linear(3, 2, rng=0)
    y = ops.recompute(layer, layer.parameters(), minilora.tensor(numpy.ones((2, 3)), dtype="float32")).sum()
    with minilora.no_grad():
        y.backward()
        assert not engine.is_recording()
    assert engine.is_recording() and numpy.array_equal(layer.bias.grad, [2.0, 2.0])


def test_on_every_device(device):
    def bits(use):
        model = Blocks(2).to(device)
        if use:
            nn.grad_checkpoint(model)
        x = minilora.Tensor(minilora.to_device(numpy.random.default_rng(1).normal(size=(5, 6)).astype("float32")))
        for _ in range(2):
            minilora.ops.mse(model(x), x).backward()
        return [minilora.to_host(p.grad) for p in model.parameters()]

    assert equal(bits(False), bits(True))
