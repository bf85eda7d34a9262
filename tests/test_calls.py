"""Calls typed as PyTorch, PEFT and transformers have them: none ends in Python's bare TypeError, and what is advised works."""
import contextlib
import inspect
import pickle
import re

import numpy as np
import pytest

import minilora
from minilora import errors, formats, lora, models, nn, ops, optim, quant, testing, train, tuners
from minilora.calls import answered, answered_class
from minilora.elsewhere import BY_PLACE, LEFT_OUT, MISSING, RENAMED
from minilora.errors import ArgumentError, ConfigError, DTypeError

x = minilora.tensor(np.ones((2, 3), "float32"))
p = minilora.Parameter(np.ones((2, 3), "float32"))
ids, labels = np.array([[1, 0]]), np.array([0, 1])
config = lora.Config(r=2, target_modules=["0"])


def layers():
    return nn.Sequential(nn.Linear(3, 4, rng=0), nn.ReLU(), nn.Linear(4, 2, rng=0))


def optimizer():
    return optim.SGD(layers().parameters(), lr=0.1)


def text_model():
    return nn.GPT2(nn.GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2), rng=0)


def loss():
    return (p * 2.0).sum()


# The call as it is typed there, and what the message tells to write or do.
TYPED = {
    "x.size()": "x.shape", "x.size(1)": "x.shape[1]", "x.size(dim=-1)": "x.shape[-1]",
    "x.sum(dim=1, keepdim=True)": "axis=1", "x.reshape(shape=(3, 2))": "x.reshape((3, 2))",
    "x.transpose(dim0=0, dim1=1)": "x.transpose(axes)", "x.numpy(force=True)": "a copy",
    "loss().backward(retain_graph=True)": "Add the losses", "loss().backward(create_graph=True)": "minilora.engine.Op",
    "loss().backward(inputs=[p])": "p.trainable = False",
    "minilora.tensor([1.0], requires_grad=True)": "minilora.Parameter", "minilora.tensor([1.0], device='cuda')": "use('gpu')",
    "minilora.Parameter([1.0], requires_grad=False)": "trainable=False", "minilora.use(device='cpu')": "minilora.use('cpu')",
    "ops.softmax(x, dim=-1)": "axis=-1", "ops.sum(x, dim=1, keepdim=True)": "keepdims=True", "ops.argmax(x, dim=1)": "axis=1",
    "ops.concatenate([x, x], dim=0)": "axis=0", "ops.concatenate(x, x)": "ops.concatenate([x, y])",
    "ops.stack(x, x)": "ops.stack([x, y])", "ops.split(x, split_size_or_sections=1)": "indices_or_sections=1",
    "ops.clip(x, min=0.0, max=1.0)": "low=0.0", "ops.transpose(x, 0, 1)": "ops.transpose(x, (1, 0))",
    "ops.reshape(x, 3, 2)": "ops.reshape(x, shape)", "ops.linear(x, p, bias=None)": "b=None", "ops.matmul(x, other=x)": "x2=",
    "ops.relu(x, inplace=True)": "leave it out", "ops.dropout(x, 0.1)": "seed=0",
    "ops.dropout(x, 0.1, training=True)": "model.eval()", "ops.layer_norm(x, normalized_shape=(3,))": "the last axis",
    "ops.embedding(input=ids, weight=p)": "ids=array([[1, 0]])", "ops.attention(x, x, x, is_causal=True)": "causal=True",
    "ops.attention(x, x, x, key_padding_mask=ids)": "the opposite", "ops.exp(x, out=x)": "a new tensor",
    "ops.cross_entropy(x, labels, reduction='sum')": "the mean", "ops.cross_entropy(x, target=labels)": "labels=array([0, 1])",
    "ops.mse(input=x, target=x)": "prediction=", "ops.softmax(x, -1, 2, 3)": "at most 2", "ops.sqrt()": "x is missing",
    "ops.sum(x, 1, axis=1)": "given twice", "ops.mean(x, axxis=1)": "is axis meant?", "ops.sum(x, dtype='float64')": "astype",
    "nn.Linear(3, 4, device='cuda')": "use('gpu')", "nn.Linear(3)": "out_features is missing",
    "nn.Linear(3, 4, use_bias=False)": "bias=False", "nn.ReLU(inplace=True)": "nothing is done in place",
    "nn.ReLU(True)": "none",
    "nn.Softmax(dim=-1)": "axis=-1", "nn.LogSoftmax(dim=1)": "axis=1", "nn.Dropout(0.1, inplace=True)": "in place",
    "nn.CrossEntropyLoss(reduction='sum')": "the mean", "nn.CrossEntropyLoss(weight=p)": "no weights of classes",
    "nn.MSELoss(reduction='sum')": "the mean", "nn.Conv2d(1, 2, 3, padding_mode='zeros')": "zeros are padded",
    "nn.AvgPool2d(2, ceil_mode=True)": "leave it out", "nn.Upsample(2)": "scale_factor=2", "nn.Module(3)": "none",
    "nn.Upsample(scale_factor=2, mode='nearest')": "the nearest", "nn.GPT2(n_layer=2)": "config",
    "nn.MultiheadAttention(8, 2, batch_first=True)": "always", "nn.GPT2Config(hidden_size=8)": "n_embd=8",
    "nn.LlamaConfig(n_layer=2)": "num_hidden_layers=2", "nn.grad_checkpoint(layers(), use_reentrant=False)": "leave it out",
    "layers()(x, x)": "2 arguments", "layers()(input=x)": "x=", "layers().to('cpu', non_blocking=True)": "leave it out",
    "layers().requires_grad(requires_grad=False)": "mode=False", "layers().parameters(recurse=True)": "always",
    "layers().load_state_dict({}, assign=True)": "arrays that are there",
    "layers().state_dict(prefix='a.')": "before the names",
    "text_model()(input_ids=ids)": "ids=array([[1, 0]])", "text_model()()": "ids is missing",
    "models.generate(text_model(), input_ids=ids, max_new_tokens=1)": "ids=",
    "models.load('a', torch_dtype='float16')": "dtype=",
    "models.generate(text_model(), ids, 1, do_sample=True)": "temperature=1.0",
    "models.generate(text_model(), ids, max_length=5)": "max_new_tokens", "models.load('a', device_map='auto')": "use('gpu')",
    "models.load('a', num_labels=3)": "labels=", "models.load('a', load_in_4bit=True)": "minilora.quant.quantize(model)",
    "optim.Adam(layers().parameters(), lr=0.1, amsgrad=True)": "minilora.optim.Optimizer",
    "optim.AdamW(layers().parameters(), lr=0.1, fused=True)": "one pass", "optim.Adam(lr=0.1)": "params is missing",
    "optim.AdamW(layers().parameters(), learning_rate=0.1)": "lr=0.1", "optim.SGD(layers().parameters())": "lr=0.1",
    "optim.SGD(layers().parameters(), 0.1, 0.9, 0.0, 0.0, True)": "at most 4",
    "optimizer().zero_grad(set_to_none=True)": "None",
    "optimizer().step(lambda: 0)": "after loss.backward()", "optimizer().step(closure=None)": "loss.backward() before",
    "optimizer().clip_grad_norm([p], 1.0)": "optimizer.clip_grad_norm(1.0)",
    "optimizer().clip_grad_norm(1.0, norm_type=2)": "all gradients together", "optim.cosine(T_max=10)": "total=10",
    "optim.step_decay(step_size=10, gamma=0.5)": "factor=0.5",
    "optim.linear(num_training_steps=9, num_warmup_steps=1)": "warmup=1",
    "optim.Scheduler(optimizer())": "optim.cosine(total=100)", "optim.LossScale(init_scale=2.0)": "start=2.0",
    "lora.Config(8)": "lora.Config(r=8)", "lora.Config(8, 16)": "lora.Config(r=8, lora_alpha=16)",
    "lora.Config({'r': 8})": "lora.Config(**settings)", "lora.Config(r=8, alpha=16)": "'lora_alpha'",
    "lora.inject(layers(), config, adapter_name='b')": "name='b'", "lora.inject(layers())": "lora.Config(r=8",
    "lora.inject(layers(), peft_config=config)": "config=", "lora.inject(layers(), config, seed=0)": "rng=0",
    "lora.inject(layers(), r=8)": "minilora.lora.Config(r=8", "lora.merge(layers(), safe_merge=True)": "always checked",
    "lora.merge(layers(), 'b')": "lora.activate(model, name)", "lora.remove(layers())": "lora.status(model)",
    "lora.merge(layers(), adapter_names=['b'])": "lora.activate(model, *names)",
    "lora.activate(layers(), adapter_name='b')": "lora.activate(model, 'b')", "lora.disabled()": "model is missing",
    "lora.plan(layers(), config, batch_size=4)": "batch=4", "lora.what_fits(layers(), config)": "memory and length are missing",
    "formats.load_adapter('folder')": "load_adapter(model, folder)", "formats.save_adapter('folder', layers())": "a model",
    "formats.save_state({}, 'a.safetensors')": "save_state(path, tensors)",
    "formats.load_state('a', map_location='cpu')": "use('gpu')", "formats.load_state('a', weights_only=True)": "pickles",
    "train.Settings(num_train_epochs=3, fp16=True)": "epochs=3", "train.Settings(lr=0.1)": "learning_rate=0.1",
    "train.fit(layers())": "data is missing", "train.fit(layers(), train_dataset=[])": "data=[]",
    "train.fit(layers(), [], epochs=2)": "Settings(epochs=2)", "train.data.Arrays(x, labels)": "x=array",
    "tuners.PrefixConfig(8)": "num_virtual_tokens", "tuners.inject(layers())": "config is missing",
    "quant.quantize(layers(), bits=4)": "kind='nf4'", "testing.gradcheck(ops.exp, (p,), eps=1e-6)": "leave it out",
    "testing.gradcheck(ops.exp, inputs=(p,))": "gradcheck(f, x, y)", "minilora.half.mixed(dtype='float16')": "leave it out",
    "minilora.summary()": "model is missing", "minilora.record(loss, mode='x')": "record(step, most=8)",
}


@pytest.mark.parametrize("call", TYPED)
def test_what_is_typed_elsewhere_is_answered(call):
    with pytest.raises(errors.MiniloraError) as caught:
        eval(call)
    assert isinstance(caught.value, (ArgumentError, ConfigError, DTypeError)), caught.value
    assert TYPED[call] in str(caught.value)
    assert len(str(caught.value)) < 1200 and " at 0x" not in str(caught.value)


@pytest.mark.parametrize("call", [call for call in TYPED if re.match(r"(ops|nn|optim|train\.Settings)", call)])
def test_following_the_advice_works(call):
    """Every ``write NAME=VALUE`` goes into the call, and what is to be left out goes: then the names fit."""
    with pytest.raises(errors.MiniloraError) as caught:
        eval(call)
    text = str(caught.value)
    for name, ours in re.findall(r"there is no (\w+): write (\w+)=", text):
        call = re.sub(rf"\b{name}=", f"{ours}=", call)
    for name in re.findall(r"there is no (\w+)(?::(?! write)|$)", text, re.M):
        call = re.sub(rf"(, )?\b{name}=(\([^)]*\)|[^,)]+)", "", call).replace("(, ", "(")
    if "there is no" in text and not re.search("missing|meant", text):
        with contextlib.suppress(errors.ShapeError, errors.StateError, ConfigError):  # the values are no good, the names are
            with np.errstate(all="ignore"):
                eval(call)


def test_what_the_tables_tell_is_there():
    """Names of ours are those of some public function or class; texts about a place name one."""
    rooms = {"minilora": minilora, "ops": ops, "nn": nn, "optim": optim, "lora": lora, "formats": formats, "models": models,
             "train": train, "tuners": tuners, "quant": quant, "testing": testing}
    public = [getattr(room, name) for room in rooms.values() for name in room.__all__]
    public += [optim.Optimizer.step, optim.Optimizer.clip_grad_norm, optim.Optimizer.zero_grad]
    public += [minilora.Tensor.backward, nn.Module.requires_grad, models.CausalLM.forward]
    taken = set()
    for thing in public:
        with contextlib.suppress(TypeError, ValueError):
            taken |= set(inspect.signature(thing).parameters)
    unknown = {ours for names in RENAMED.values() for ours in names} - taken
    assert not unknown
    for where in [*BY_PLACE, *MISSING, *(key.rsplit(".", 1)[0] for key in LEFT_OUT if key.count(".") > 1 and key[0] != ".")]:
        if not where.startswith("."):
            thing = rooms[where.split(".")[0]]
            for part in where.split(".")[1:]:
                thing = getattr(thing, part)
            assert callable(thing)


def test_what_was_refused_lets_its_arguments_go():
    """No circle of a frame and its error: memory goes at once, without a collection."""
    import gc
    import weakref

    def refused(call, thing):
        gone = weakref.ref(thing)
        with contextlib.suppress(errors.MiniloraError):
            call(thing)
        return gone

    gc.collect()
    gc.disable()
    try:
        for call in (lambda model: model(x, x), lambda model: model(minilora.tensor(np.ones((2, 5), "float32"))),
                     lambda model: lora.inject(model, nothing=3), lambda model: model.to("cpu", nothing=3),
                     lambda model: lora.inject(model, config, "not a name.")):
            gone = refused(call, layers())  # in the assert, pytest would keep the model
            assert gone() is None
    finally:
        gc.enable()


# -- what stays as it is ---------------------------------------------------------------------------------------------------


def test_all_that_is_wrong_comes_at_once_and_nothing_else():
    with pytest.raises(ArgumentError) as caught:
        ops.linear(input=x, weight=p, inplace=True)
    assert [line.strip() for line in str(caught.value).split("\n")] == [
        "ops.linear: 3 arguments do not fit. It is called as ops.linear(x, W, b=None)",
        "there is no input: write x=...", "there is no weight: write W=...",
        "there is no inplace: leave it out: nothing is done in place, and a new tensor comes back"]
    assert isinstance(caught.value, TypeError) and caught.value.__cause__ is None


def test_an_error_inside_of_a_call_that_fits_goes_through_as_it_is():
    @answered
    def outer(a, b=0):
        return len(3)

    with pytest.raises(TypeError, match="object of type 'int' has no len") as caught:
        outer(1)
    assert not isinstance(caught.value, errors.MiniloraError)

    class Broken(nn.Module):
        def forward(self, x):
            return len(3)

    with pytest.raises(TypeError, match="has no len"):
        Broken()(x)


def test_a_module_of_ones_own_is_answered_with_its_path():
    class Own(nn.Module):
        def forward(self, x, scale):
            return x * scale

    with pytest.raises(ArgumentError, match=r"^Own: scale is missing. It is called as Own\(x, scale\)"):
        Own()(x)
    with pytest.raises(ArgumentError, match=r"^1: Own: scale is missing"):
        nn.Sequential(nn.ReLU(), Own())(x)

    class Beside:
        def __init__(self, size):
            self.size = size

    class Both(nn.Module, Beside):
        """A class beside a module still gets what is given."""

    assert Both(3).size == 3
    with pytest.raises(ArgumentError, match="^Own: an argument without a name, and it takes none"):
        Own(3)


def test_a_function_answers_once_and_is_pickled_and_described_as_before():
    assert ops.softmax.__wrapped__ and not hasattr(ops.softmax.__wrapped__, "__wrapped__")
    assert pickle.loads(pickle.dumps(ops.softmax)) is ops.softmax and ops.softmax.__name__ == "softmax"
    assert pickle.loads(pickle.dumps(lora.inject)) is lora.inject
    assert list(inspect.signature(ops.softmax).parameters) == ["x", "axis"]
    before = vars(optim.SGD)["__init__"]
    answered_class(optim.SGD)
    assert vars(optim.SGD)["__init__"] is before
    assert not hasattr(ops.add, "__wrapped__")  # operators are called most


def test_the_number_of_elements_is_an_int_like_any_other():
    n = x.size
    assert n == 6 and isinstance(n, int) and repr(n) == "6" and f"{n:,}" == "6" and n // 4 == 1 and type(n + 1) is int
    for made in (x / n, n * x, x - n, ops.maximum(x, n), x ** n):
        assert made.dtype == "float32"
    assert ((x == n) == (x == 6)).all() and type(pickle.loads(pickle.dumps(n))) is int
    assert np.zeros(n).shape == (6,) and optim.cosine(total=n)(6) == 0.0 and minilora.tensor(n).dtype == "int64"
    assert minilora.Parameter(n).dtype == "float32"


def test_a_name_of_another_room_is_found():
    for name, where in [("exp", "minilora.ops.exp"), ("Linear", "minilora.nn.Linear"), ("inject", "minilora.lora.inject")]:
        with pytest.raises(AttributeError, match=f"minilora has {where}$"):
            getattr(minilora, name)


@pytest.mark.parametrize("made, name, cure", [
    (optimizer, "add_param_group", "make the optimizer again"), (optimizer, "state", "optimizer.state_dict"),
    (lambda: optim.Scheduler(optimizer(), optim.constant()), "get_last_lr", r"settings\['lr'\]"),
    (optim.LossScale, "scale", "scaled"), (optim.LossScale, "unscale_", "unscale"),
], ids=["groups", "state", "rates", "scale", "unscale"])
def test_what_an_optimizer_lacks_is_told(made, name, cure):
    thing = made()
    assert not hasattr(thing, name)
    with pytest.raises(AttributeError, match=cure):
        getattr(thing, name)
    setattr(thing, name, 3)  # a class of one's own may have it
    assert getattr(thing, name) == 3
