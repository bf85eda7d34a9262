"""Prefixes and prompts of whole models: against tokens that stand in the text itself, in mixed batches, caches and copies."""
import copy
import pickle

import numpy as np
import pytest
from conftest import PROOF

import minilora
from minilora import backend, lora, models, nn, parallel, testing, tuners
from minilora.errors import ConfigError, DTypeError, ShapeError, StateError

IDS = np.random.default_rng(0).integers(2, 19, (3, 6))
TEXT = [3, 5, 4]


one = dict(num_virtual_tokens=2)


def gpt2(dtype="float64", **more):
    return nn.GPT2(nn.GPT2Config(vocab_size=19, n_positions=24, n_embd=8, n_layer=2, n_head=2, **more), rng=0, dtype=dtype)


def llama(dtype="float64", config=models.LlamaConfig, **more):
    return nn.Llama(config(vocab_size=19, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
                           num_key_value_heads=2, **more), rng=0, dtype=dtype)


def mistral(dtype="float64"):
    return llama(dtype, models.MistralConfig, sliding_window=4)


def bert(dtype="float64", kind=nn.Bert, config=nn.BertConfig):
    return kind(config(vocab_size=19, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
                       max_position_embeddings=24), rng=0, dtype=dtype)


def roberta(dtype="float64"):
    return bert(dtype, models.Roberta, models.RobertaConfig)


CAUSAL, ALL = [gpt2, llama, mistral], [gpt2, llama, mistral, bert, roberta]


def with_tokens_before(model):
    """Logits of IDS behind TEXT, and what a prefix must hold to be as that text: its keys and values."""
    cache = models.Cache()
    with minilora.no_grad():
        full = model(np.concatenate([np.tile(TEXT, (len(IDS), 1)), IDS], axis=1)).numpy()[:, len(TEXT):]
        model([TEXT], cache=cache)
    layers = [cache.layer(i) for i in range(2)]
    kv = np.stack([backend.to_host(a)[0, :, :len(TEXT)] for layer in layers for a in (layer.k, layer.v)])
    return full, kv.transpose(2, 0, 1, 3).reshape(len(TEXT), -1)


def as_text(model, name="text"):
    """A prefix that is as TEXT before the tokens, and the logits there."""
    full, P = with_tokens_before(model)
    own = tuners.inject(model, tuners.PrefixConfig(num_virtual_tokens=len(TEXT)), name, rng=0)
    own.embedding.data[...] = backend.to_device(P)
    return full


def near(got, expected, tol=1e-14):
    got = got.numpy() if hasattr(got, "numpy") else got
    np.testing.assert_allclose(got, expected, rtol=0, atol=tol)


@pytest.mark.parametrize("make", CAUSAL)
def test_keys_and_values_of_a_text_are_that_text(make, device):
    """So positions, masks, rotary and the window are right: nothing else is told of them."""
    model = make()
    full = as_text(model)
    near(model(IDS), full)
    padding = np.ones(IDS.shape, bool)
    padding[1, 4:] = False
    near(model(IDS, key_padding=padding).numpy()[:, :4], full[:, :4])
    with minilora.no_grad():
        cache = models.Cache()
        near(np.concatenate([model(part, cache=cache).numpy() for part in np.split(IDS, [2, 3], axis=1)], 1), full)
        assert cache.length == IDS.shape[1]  # the prefix is not copied into it
        again = models.generate(model, IDS, 5, use_cache=False).ids
        np.testing.assert_array_equal(models.generate(model, IDS, 5).ids, again)
        np.testing.assert_array_equal(models.generate(model, [[5], [6, 7, 8]], 5).ids,
                                      models.generate(model, [[5], [6, 7, 8]], 5, use_cache=False).ids)
    tuners.inject(model, tuners.PromptConfig(num_virtual_tokens=3), "prompt", token_ids=TEXT)
    near(model(IDS), full)
    with minilora.no_grad():
        cache = models.Cache()
        near(np.concatenate([model(part, cache=cache).numpy() for part in np.split(IDS, [2, 3], axis=1)], 1), full)
        assert cache.length == IDS.shape[1] + 3
        np.testing.assert_array_equal(models.generate(model, IDS, 5).ids, again)


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("batch", [["c", "__base__", "a"], ["b", "b", "d"], ["__base__"] * 3])
@PROOF
def test_mixed_batch_equals_each_alone(make, batch, device):
    model = make()
    for i, name in enumerate("ab"):
        tuners.inject(model, tuners.PrefixConfig(num_virtual_tokens=2 + i), name, rng=i)
        tuners.inject(model, tuners.PromptConfig(num_virtual_tokens=1 + 2 * i), "cd"[i], rng=i)
    alone = []
    for row, name in enumerate(batch):
        tuners.activate(model, None if name == "__base__" else name)
        alone.append(model(IDS[row:row + 1]).numpy()[0])
    with lora.mixed(model, adapter_names=batch):
        near(model(IDS), alone, 1e-13)
        with tuners.disabled(model):
            near(model(IDS), base := np.concatenate([model(IDS[i:i + 1]).numpy() for i in range(3)]))
        with pytest.raises(StateError, match="mixed batch"):
            tuners.activate(model, "a")
        if make in CAUSAL:
            with minilora.no_grad():
                cache = models.Cache()
                parts = [model(part, cache=cache).numpy() for part in np.split(IDS, [2, 3], axis=1)]
                near(np.concatenate(parts, 1), alone, 1e-13)
    with pytest.raises(ShapeError, match="3 names"), lora.mixed(model, adapter_names=batch):
        model(IDS[:2])
    tuners.activate(model, "a")
    with lora.disabled(model):
        near(model(IDS), base)
    for name in "abcd":
        tuners.remove(model, name)
    near(model(IDS), base)
    assert not any("front" in name for name in model.state_dict())


CONFIGS = {"prefix": tuners.PrefixConfig(**one), "prompt": tuners.PromptConfig(**one),
           "mlp": tuners.PrefixConfig(**one, prefix_projection=True, encoder_hidden_size=3)}


@pytest.mark.parametrize("make", [gpt2, llama, bert])
@pytest.mark.parametrize("config", CONFIGS)
def test_gradcheck(make, config):
    model = make()
    own = tuners.inject(model, CONFIGS[config], rng=1)
    padding = np.ones(IDS.shape, bool)
    padding[0, 4:] = False
    trained = [p for p in model.parameters() if p.trainable]
    assert len(trained) == len(list(own.parameters())) == (5 if config == "mlp" else 1)
    report = testing.gradcheck(lambda: model(IDS[:2], key_padding=padding[:2]), parameters=model.named_parameters())
    assert report.passed, report  # to 1e-9


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("config", CONFIGS)
@PROOF
def test_checkpointing_gives_the_same_bits(make, config, device):
    found = []
    for mode in (False, True):
        model = make()
        own = tuners.inject(model, CONFIGS[config], rng=1)
        nn.grad_checkpoint(model, mode)
        y = model(IDS)
        y.backward(minilora.tensor(np.random.default_rng(2).standard_normal(y.shape)).data)
        found.append([p.grad for p in own.parameters()])
    for one_way, other in zip(*found):
        np.testing.assert_array_equal(backend.to_host(one_way), backend.to_host(other))


def test_together_with_lora(device):
    """Each trains, switches, merges and goes as if the other were not there."""
    model = gpt2()
    tuners.inject(model, tuners.PrefixConfig(num_virtual_tokens=2), "p", rng=0)
    lora.inject(model, lora.Config(r=2, target_modules=["c_attn"]), "l", rng=0)
    lora.inject(model, lora.Config(r=2, target_modules=["c_attn"]), "p", rng=1)  # one name, for both
    for module in model.h:
        for name in "lp":
            module.attn.c_attn.adapters[name].lora_B.data[...] = 0.1
    names = {name for name, p in model.named_parameters() if p.trainable}
    assert "front.own.p.embedding" in names and len(names) == 5
    both = model(IDS).numpy()
    lora.activate(model, "l")
    with_l = model(IDS).numpy()
    with tuners.disabled(model):
        l_alone = model(IDS).numpy()
    with lora.disabled(model):
        base = model(IDS).numpy()
    lora.activate(model)
    p_alone = model(IDS).numpy()
    assert model.front.own["p"].embedding.trainable
    with lora.mixed(model, adapter_names=["p", "l", "__base__"]):
        near(model(IDS), [both[0], l_alone[1], base[2]], 1e-13)
    lora.activate(model, "l")
    tuners.activate(model, "p")
    assert {name for name, p in model.named_parameters() if p.trainable} > {"front.own.p.embedding"}
    lora.merge(model.eval())
    near(model(IDS), with_l, 1e-13)
    assert "front.own.p.embedding" in model.state_dict()
    lora.unmerge(model)
    near(model(IDS), with_l)
    lora.bake(model)
    near(model(IDS), with_l, 1e-13)
    assert [name for name, p in model.named_parameters() if p.trainable] == ["front.own.p.embedding"]
    assert not np.allclose(p_alone, base)


def test_loss_falls_and_nothing_else_moves(device):
    """Both are trained by one optimizer, also in parts on threads; a copy and a pickle are apart."""
    model = gpt2()
    before = {name: a.copy() for name, a in model.state_dict().items()}
    tuners.inject(model, tuners.PrefixConfig(num_virtual_tokens=3, prefix_projection=True), "p", rng=0)
    lora.inject(model, lora.Config(r=2, target_modules=["c_fc"]), rng=0)
    optimizer = minilora.optim.AdamW([(name, p) for name, p in model.named_parameters() if p.trainable], lr=0.02)
    twin, losses = copy.deepcopy(model), []
    state = model.state_dict()
    for _ in range(12):
        optimizer.zero_grad()
        loss = parallel.backward(lambda part: model.loss(part, part), IDS, threads=2)
        losses.append(float(loss.numpy()))
        optimizer.step()
    assert losses[-1] < losses[0] - 0.03
    after = model.state_dict()
    base = {name: a for name, a in after.items() if name in before}
    assert all((a == before[name]).all() for name, a in base.items())
    assert {name.split(".")[0] for name in after if name not in before} >= {"front"}
    for name, a in twin.state_dict().items():
        np.testing.assert_array_equal(a, state[name])
    twin.load_state_dict(after)
    near(twin(IDS), model(IDS).numpy())
    again = pickle.loads(pickle.dumps(model))
    near(again(IDS), model(IDS).numpy())
    assert {n for n, p in again.named_parameters() if p.trainable} == {n for n, p in model.named_parameters() if p.trainable}
    tuners.fold(model)
    near(again(IDS), model(IDS).numpy(), 1e-12)
    assert model.front.own["p"].embedding.shape == (3, 32)


def test_training_in_parts_gives_the_same_gradients():
    model = llama()
    own = tuners.inject(model, tuners.PrefixConfig(num_virtual_tokens=2), rng=0)
    model.loss(IDS, IDS).backward()
    whole, own.embedding.grad = own.embedding.grad, None
    parallel.backward(lambda part: model.loss(part, part), IDS, threads=3)
    near(own.embedding.grad, whole)


def test_half_precision():
    """The prefix is float32 beside a base in float16, and its gradient too."""
    model = gpt2("float32").to(dtype="float16")
    own = tuners.inject(model, tuners.PrefixConfig(num_virtual_tokens=2), rng=0)
    assert own.embedding.dtype == np.float32
    model.loss(IDS, IDS).backward()
    assert model(IDS).dtype == np.float16 and own.embedding.grad.dtype == np.float32 and own.embedding.grad.any()
    model.to(dtype="float16")
    assert own.embedding.dtype == np.float32
    wide = gpt2("float32")
    tuners.inject(wide, tuners.PrefixConfig(num_virtual_tokens=2), rng=0)
    np.testing.assert_allclose(model(IDS).numpy(), wide(IDS).numpy(), atol=2e-3)


@pytest.mark.parametrize("config", [tuners.PrefixConfig(num_virtual_tokens=2, task_type="SEQ_CLS"),
                                    tuners.PromptConfig(num_virtual_tokens=2, task_type="SEQ_CLS")], ids=["prefix", "prompt"])
@pytest.mark.parametrize("kind", ["sentence", "gpt2", "bert"])
def test_classifiers(config, kind, device):
    """Their head is trained with it; texts in a padded batch have the classes that they have alone."""
    labels = models.Labels(["bad", "good"])
    model = models.SentenceClassifier(bert(), labels, rng=1) if kind == "sentence" else \
        models.GPT2Classifier(gpt2(pad_token_id=0).config, labels, rng=1, dtype="float64") if kind == "gpt2" else \
        models.BertClassifier(bert().config, labels, rng=1, dtype="float64")
    tuners.inject(model, config, rng=0)
    head = "score" if kind == "gpt2" else "classifier"
    trained = {name.split(".")[0 if name.startswith(head) else 1] for name, p in model.named_parameters() if p.trainable}
    assert trained == {head, "front"}
    padding = np.array([[1] * 6, [1] * 4 + [0] * 2, [1] * 6])
    ids = IDS * padding
    loss = model(ids, labels=[0, 1, 0], key_padding=padding)
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.trainable)
    near(model(ids, key_padding=padding).numpy()[1:2], model(ids[1:2, :4]).numpy(), 1e-13)


def test_switching_and_errors():
    model = gpt2()
    with pytest.raises(ConfigError, match="there are none"):
        tuners.activate(model, "x")
    assert tuners.names(model) == [] and tuners.activate(model) is None
    own = tuners.inject(model, tuners.PrefixConfig(num_virtual_tokens=2), "a", rng=0)
    model.loss(IDS, IDS).backward()
    tuners.inject(model, tuners.PromptConfig(num_virtual_tokens=2, prompt_tuning_init="SAMPLE_VOCAB"), "b", rng=0)
    assert own.embedding.grad is None and not own.embedding.trainable and tuners.names(model) == ["a", "b"]
    tuners.activate(model, "a", trainable=False)
    assert not any(p.trainable for p in model.parameters())
    state = {name: a.copy() for name, a in model.state_dict().items()}
    for call, error, text in [
            (lambda: tuners.inject(model, tuners.PrefixConfig(**one), "a"), ConfigError, "already"),
            (lambda: tuners.inject(model, tuners.PrefixConfig(**one), "../a"), ConfigError, "characters"),
            (lambda: tuners.inject(model, tuners.PrefixConfig(**one, num_layers=3, num_attention_heads=4), "c"),
             ConfigError, "num_layers: 3, and this model has 2 .layers.\n.*num_attention_heads: 4, and this model has 2"),
            (lambda: tuners.inject(model, tuners.PromptConfig(**one, token_dim=9), "c"), ConfigError, "has 8"),
            (lambda: tuners.inject(model, tuners.PromptConfig(**one, prompt_tuning_init="TEXT"), "c"),
             ConfigError, "token_ids="),
            (lambda: tuners.inject(model, tuners.PromptConfig(**one), "c", token_ids=[]), ShapeError, "at least"),
            (lambda: tuners.inject(model, tuners.PrefixConfig(**one), "c", token_ids=[1]), ConfigError, "prompt"),
            (lambda: tuners.inject(model, tuners.PrefixConfig(**one, modules_to_save=["hat"]), "c"),
             ConfigError, "called 'hat'"),
            (lambda: tuners.inject(model, lora.Config(r=1, target_modules=["c_fc"]), "c"), DTypeError, "PrefixConfig"),
            (lambda: tuners.inject(nn.Linear(2, 2), tuners.PrefixConfig(**one)), DTypeError, "in front of a Lin"),
            (lambda: tuners.inject(3, tuners.PrefixConfig(**one)), DTypeError, "expected a model"),
            (lambda: tuners.remove(model, "c"), ConfigError, "there are 'a', 'b'"),
            (lambda: tuners.fold(model, "a"), ConfigError, "no MLP"),
            (lambda: tuners.fold(model), ConfigError, "say which"),
            (lambda: model(np.ones((1, 23), int)), ShapeError, "taken by what stands in front"),
            (lambda: models.generate(model, np.ones((1, 20), int), 5), ShapeError, "the model has 22"),
            (lambda: lora.mixed(model, ["a", "d", "a"]).__enter__(), ConfigError, "no adapter of the name 'd'"),
            (lambda: model.save("nowhere"), StateError, "tuners.remove")]:
        with pytest.raises(error, match=f"(?s){text}"):
            call()
    assert all((a == state[name]).all() for name, a in model.state_dict().items())
    with pytest.raises(ConfigError, match="3 problems"):
        tuners.PrefixConfig(num_virtual_tokens=True, prefix_projection=1, modules_to_save="head")
    with pytest.raises(ConfigError, match="RANDOM"):
        tuners.PromptConfig(num_virtual_tokens=1, prompt_tuning_init="NONE")


def test_one_text_without_a_batch():
    for config in (tuners.PrefixConfig(**one), tuners.PromptConfig(**one)):
        model = llama()
        tuners.inject(model, config, rng=0)
        near(model(IDS[0]), model(IDS[:1]).numpy()[0])


def test_zero_start_with_an_mlp():
    own = tuners.inject(gpt2(), tuners.PrefixConfig(**one, prefix_projection=True, init_weights="zero"), rng=0)
    assert not own.values().numpy().any()
    own = tuners.inject(gpt2(), tuners.PrefixConfig(**one, init_weights="zero"), rng=0)
    assert not own.values().numpy().any()
