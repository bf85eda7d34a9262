"""A model in a subspace as a file: there and back, what belongs to another model, and damaged files."""
import json

import numpy as np
import pytest

import minilora
from minilora import formats, nn, ops
from minilora.errors import ConfigError, FileError, FormatError, StateError
from minilora.formats.subspaces import KEY
from minilora.nn import Module
from minilora.train import Beside, Settings, fit
from minilora.train.data import Arrays
from minilora.tuners.intrinsic import Fastfood, Subspace


class Net(Module):
    def __init__(self, seed=0):
        rng = np.random.default_rng(seed)
        self.one, self.two = nn.Linear(6, 12, rng=rng), nn.Linear(12, 3, rng=rng)

    def forward(self, x):
        return self.two(ops.gelu(self.one(x)))


KINDS = [dict(d=9, method="did"), dict(d=9, method="said"), dict(d=9, projection="dense", seed=7)]
X = np.random.default_rng(1).standard_normal((20, 6)).astype("float32")


def trained(**settings):
    space = Subspace(Net(), **(settings or KINDS[1]))
    rng = np.random.default_rng(2)
    for p in space.own():
        p.data = rng.standard_normal(p.shape).astype(p.dtype)
    return space


def outputs(model):
    with minilora.no_grad():
        return model(minilora.tensor(X)).numpy()


@pytest.mark.parametrize("settings", KINDS)
def test_there_and_back(settings, tmp_path):
    space = trained(**settings)
    file = formats.save_subspace(space, tmp_path / "a" / "b")
    assert file == tmp_path / "a" / "b" / "subspace.safetensors" and file.stat().st_size < 1000
    again = formats.load_subspace(tmp_path / "a" / "b", Net())
    np.testing.assert_array_equal(outputs(again), outputs(space))
    np.testing.assert_array_equal(outputs(again.model), outputs(space))
    formats.save_subspace(again, tmp_path / "x.safetensors")
    assert (tmp_path / "x.safetensors").read_bytes() == file.read_bytes()
    np.testing.assert_array_equal(outputs(formats.load_subspace(tmp_path / "x.safetensors", Net()).fold()), outputs(space))


def test_one_block_of_all(tmp_path):
    space = trained(d=9)
    space.projection = Fastfood(9, space.projection.size, 3, block=128)
    y = outputs(space)
    space.v.version += 1
    assert not np.array_equal(y, outputs(Subspace(Net(), 9)))
    formats.save_subspace(space, tmp_path)
    again = formats.load_subspace(tmp_path, Net())
    assert again.projection == space.projection


def test_of_half_precision(tmp_path):
    space = Subspace(Net().to(dtype="float16"), 5)
    space.v.data = np.ones(5, "float32")
    formats.save_subspace(space, tmp_path)
    assert formats.load_subspace(tmp_path, Net().to(dtype="float16")).v.data.tolist() == [1.0] * 5
    with pytest.raises(FormatError, match="not those that it was trained from"):
        formats.load_subspace(tmp_path, Net())  # in float32 the numbers are others


def test_another_model(tmp_path):
    formats.save_subspace(trained(), tmp_path)
    partly = Net()
    partly.one.requires_grad(False)
    for model, text in ((Net(1), "not those that it was trained from"), (partly, "and the model trains 39 in 2"),
                        (nn.Linear(3, 3, rng=0), "and the model trains 12 in 2")):
        before = [(p.trainable, p.data) for p in model.parameters()]
        with pytest.raises(FormatError, match=text):
            formats.load_subspace(tmp_path, model)
        assert all(p.trainable is t and p.data is a for p, (t, a) in zip(model.parameters(), before))
    with pytest.raises(ConfigError, match="nothing in the model is trained"):
        formats.load_subspace(tmp_path, Net().requires_grad(False))


def test_what_is_not_moved_belongs_to_the_base(tmp_path):
    def partly(shift=0.0):
        model = Net()
        model.two.requires_grad(False)
        model.two.bias.data = model.two.bias.data + np.float32(shift)
        return model
    formats.save_subspace(Subspace(partly(), 4), tmp_path)
    formats.load_subspace(tmp_path, partly())
    with pytest.raises(FormatError, match="not those that it was trained from"):
        formats.load_subspace(tmp_path, partly(0.5))


def test_other_random_numbers(tmp_path, monkeypatch):
    formats.save_subspace(trained(), tmp_path)
    draw = Fastfood.draw
    monkeypatch.setattr(Fastfood, "draw", lambda self: (*draw(self)[:2], draw(self)[2] * 1.0001))
    with pytest.raises(FormatError, match="seed 0 gives other random numbers here"):
        formats.load_subspace(tmp_path, Net())


def rewritten(file, tensors=None, metadata=None, **changes):
    state = formats.open_state(file)
    said = {**json.loads(state.metadata[KEY]), **changes}
    told = {KEY: json.dumps({name: value for name, value in said.items() if value != "gone"})} if metadata is None else metadata
    formats.save_state(file, {**formats.load_state(file), **(tensors or {})}, told)


@pytest.mark.parametrize("changes, text", [
    (dict(metadata={}), "this is no file of a subspace"), (dict(metadata={KEY: "{"}), "are damaged: JSONDecodeError"),
    (dict(metadata={KEY: "[]"}), "are damaged: TypeError"), (dict(metadata={KEY: '{"d": 1, "d": 2}'}), "is there twice"),
    (dict(seed="gone"), "are damaged: KeyError 'seed'"), (dict(version=2), "version 2 of this format"),
    (dict(d=True), "d is of another type"), (dict(seed=-1), "seed must be an int >= 0"),
    (dict(block=3), "block must be a power of 2"), (dict(block=4), "block must be a power of 2"),
    (dict(method="x", projection="y"), "method 'x' is none of did, said; projection 'y' is none of"),
    (dict(method="did"), "expected the tensors"), (dict(d=4), "expected the tensors"),
    (dict(tensors={"v": np.array([1, np.nan, 0, 0, 0], "float32")}), "expected finite numbers"),
    (dict(tensors={"v": np.ones(5, "int32")}), "expected finite numbers"),
    (dict(tensors={"more": np.ones(1)}), "expected the tensors"),
    (dict(size=10**30), "moves 1,000,000"), (dict(base="0"), "not those that"), (dict(drawn="0"), "other random numbers"),
])
def test_damaged_files(changes, text, tmp_path):
    file = formats.save_subspace(trained(), tmp_path)
    rewritten(file, **changes)
    model = Net()
    with pytest.raises(FormatError, match=text):
        formats.load_subspace(tmp_path, model)
    assert all(p.trainable is True for p in model.parameters())


def test_what_cannot_be_saved_or_read(tmp_path):
    space = trained()
    with pytest.raises(FileError):
        formats.load_subspace(tmp_path, Net())
    space.v.data[0] = np.inf
    with pytest.raises(StateError, match="NaN or inf"):
        formats.save_subspace(space, tmp_path)
    assert not any(tmp_path.iterdir())
    space.v.data[0] = 0.0
    space.fold()
    with pytest.raises(StateError, match="was folded"):
        formats.save_subspace(space, tmp_path)


# -- the loop ----------------------------------------------------------------------------------------------------------


def loss_of(model, batch):
    return nn.CrossEntropyLoss()(model(minilora.tensor(batch["x"])), batch["y"])


DATA = Arrays(x=X, y=np.arange(20) % 3)
SETTINGS = Settings(steps=12, batch_size=5, learning_rate=0.5, steps_per_eval=12, save_every=6, warmup=0, threads=2)


def test_fit_writes_the_file_and_goes_on_to_the_bit(tmp_path):
    whole = Subspace(Net(), **KINDS[1])
    made = fit(whole, DATA, SETTINGS, loss=loss_of, folder=tmp_path / "whole", quiet=True)
    assert made.losses[-1][1] < made.losses[0][1] and not (tmp_path / "whole" / "state.safetensors").exists()
    np.testing.assert_array_equal(outputs(formats.load_subspace(tmp_path / "whole", Net())), outputs(whole))

    class Cut(Beside):
        def after_step(self, run, made):
            if run.step == 7:
                raise RuntimeError("a power cut")
    with pytest.raises(RuntimeError):
        fit(Subspace(Net(), **KINDS[1]), DATA, SETTINGS, loss=loss_of, folder=tmp_path / "cut", beside=[Cut()], quiet=True)
    again = Subspace(Net(), **KINDS[1])
    fit(again, DATA, SETTINGS, loss=loss_of, folder=tmp_path / "cut", resume=True, quiet=True)
    np.testing.assert_array_equal(again.v.data, whole.v.data)
    np.testing.assert_array_equal(outputs(again), outputs(whole))


def test_fit_keeps_the_best(tmp_path):
    space = Subspace(Net(), 6)
    fit(space, DATA, SETTINGS, loss=loss_of, valid=DATA, folder=tmp_path / "run", quiet=True)
    np.testing.assert_array_equal(outputs(space.model), outputs(space))


def test_what_is_trained_beside_is_saved_beside(tmp_path):
    model = Net()
    model.two.requires_grad(False)
    space = Subspace(model, 6)
    model.two.requires_grad(True)
    made = fit(space, DATA, SETTINGS, loss=loss_of, folder=tmp_path / "run", quiet=True)
    assert any("trained beside the subspace" in note for note in made.notes)
    assert set(formats.load_state(tmp_path / "run" / "state.safetensors")) == {"model.two.weight", "model.two.bias"}
