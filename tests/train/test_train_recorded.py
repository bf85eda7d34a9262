"""`fit(..., recorded=True)`: the bits of the run that is called, on a card that records, and with the kernels emulated."""
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import fetch, need_gpu
from plain_card import plain_card
from ranks import together
from rows_of_numbers import Net, drawn, loss_of

import minilora
from minilora import backend, lora, nn, optim
from minilora.errors import ConfigError, DivergedError
from minilora.kernels.recorded.take import Take
from minilora.train import Batch, Settings, fit
from minilora.train.beside import Beside
from minilora.train.data import Tokens
from minilora.train.distributed.comm import Serial
from minilora.train.recorded import MOST
from minilora.train.run import Run

sys.path.append(str(Path(__file__).parents[1] / "kernels"))
import emulator  # noqa: E402 (lies there)


class Seen(Beside):
    """The updates, and how many graphs there were at the end."""

    def __init__(self):
        self.made, self.graphs, self.problem = [], 0, ""

    def after_step(self, run, update):
        self.made.append(update)

    def end(self, run):
        if run.recorded:
            self.graphs = run.recorded.graphs
            self.problem = run.recorded.problem


def text(rows=40, seed=0):
    rng = np.random.default_rng(seed)
    return Tokens([rng.integers(0, 11, n).tolist() for n in rng.integers(3, 30, rows)])


def gpt2():
    config = nn.GPT2Config(vocab_size=11, n_positions=32, n_embd=8, n_layer=1, n_head=2, embd_pdrop=0.1, resid_pdrop=0.1)
    model = nn.GPT2(config, rng=0)
    lora.inject(model, lora.Config(r=2, lora_alpha=4, lora_dropout=0.1, target_modules=["c_attn"]), rng=0)
    return model


JOBS = {
    "plain": dict(steps=14),
    "accumulation": dict(steps=10, accumulation=3),
    "last batch": dict(epochs=4, batch_size=5),
    "evaluated": dict(steps=12, steps_per_eval=3),
    "no clipping": dict(steps=6, max_grad_norm=None, schedule="constant"),
    "mixed": dict(steps=14, precision="mixed", loss_scale=2.0 ** 24, scale_growth=4),
}


def trained(recorded, model, data, loss=None, optimizer=None, **settings):
    seen = Seen()
    more = {} if loss is None else {"loss": loss}
    settings = Settings(**{"batch_size": 4, "learning_rate": 0.05, "steps_per_report": 1, **settings})
    valid = data if settings.steps_per_eval else None
    result = fit(model, data, settings, valid=valid, optimizer=optimizer, beside=[seen], recorded=recorded, quiet=True, **more)
    weights = [fetch(p).tobytes() for p in model.parameters()]
    state = [value for _, value in model.named_state()]
    return (result.losses, result.evaluations, seen.made, weights, state, result.notes), seen


def same(make, **job):
    (called, _), (recorded, seen) = (trained(each, make(), **job) for each in (False, True))
    assert recorded == called
    return seen


@pytest.mark.parametrize("job", JOBS)
def test_the_same_bits(job):
    with plain_card():
        seen = same(lambda: Net(p=0.3), data=drawn(rows=13), loss=simple_loss, **JOBS[job])
    assert seen.graphs > 1 and not seen.problem


def simple_loss(model, inputs):
    """Without products of vectors, which nothing records."""
    error = model(minilora.tensor(inputs["x"]))[:, 0] - 1.0
    return (error * error).mean()


def test_another_optimizer():
    with plain_card():
        seen = same(lambda: Net(p=0.3), data=drawn(), loss=simple_loss, steps=9,
                    optimizer=lambda named: optim.SGD(named, lr=0.1, momentum=0.9))
    assert seen.graphs == 2


@pytest.fixture(params=[pytest.param("emulated", marks=pytest.mark.slow), pytest.param("gpu", marks=pytest.mark.gpu)])
def card(request):
    if request.param == "emulated":
        with emulator.emulated_device():
            yield
    else:
        need_gpu()
        with backend.use("gpu"):
            yield


@pytest.mark.parametrize("settings", [dict(steps=16), dict(steps=6, accumulation=3), dict(steps=8, precision="mixed")],
                         ids=["one", "accumulated", "mixed"])
def test_texts_of_several_lengths(card, settings):
    seen = same(gpt2, data=text(), **settings)
    assert seen.graphs > 2 and not seen.problem


class Ending(Beside):
    """Asks for the end after some steps."""

    def __init__(self, step):
        self.step = step

    def after_step(self, run, update):
        run.asked = update is not None and run.step == self.step


@pytest.mark.parametrize("job", ["accumulation", pytest.param("plain", marks=pytest.mark.slow), "mixed",
                                 pytest.param("evaluated", marks=pytest.mark.slow)])
def test_a_run_that_goes_on_is_the_run_that_was_not_interrupted(job, tmp_path, monkeypatch):
    """Recorded before the interruption and after it, only before, only after: the bits of the run that is called."""
    pytest.importorskip("safetensors")
    settings = Settings(**{"batch_size": 4, "learning_rate": 0.05, "steps_per_report": 1, "save_every": 100, **JOBS[job]})
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)  # a second for each picture
    ends = []
    with plain_card():
        for i, parts in enumerate([[(False, None)], [(True, None)], [(True, 7), (True, None)], [(True, 7), (False, None)],
                                   [(False, 7), (True, None)]]):
            for recorded, end in parts:
                data, model = drawn(rows=13), Net(p=0.3)
                beside = [] if end is None else [Ending(end)]
                made = fit(model, data, settings, loss=simple_loss, valid=data if settings.steps_per_eval else None,
                           folder=tmp_path / str(i), resume=True, recorded=recorded, beside=beside, quiet=True)
                assert made.step == (end or settings.steps)
            ends.append(([fetch(p).tobytes() for p in model.parameters()], made.losses, made.evaluations,
                         [value for _, value in model.named_state()]))
    assert all(end == ends[0] for end in ends)


def test_many_shapes_do_not_make_room_for_each_other(monkeypatch):
    """Of 40 shapes the first 32 are recorded, and stay."""
    made, make = [], Take.__init__
    monkeypatch.setattr(Take, "__init__", lambda take, *given: (made.append(take), make(take, *given))[1])
    data, seen = drawn(rows=40, T=1), Seen()
    data.batch = lambda rows: Batch({"x": data.x[list(rows)].repeat(1 + rows[0], 0)}, 1 + rows[0], 1 + rows[0])
    data.order = lambda seed, epoch, batch_size: [[i] for i in range(40)]
    with plain_card():
        fit(Net(), data, Settings(steps=90, batch_size=1), loss=simple_loss, beside=[seen], recorded=True, quiet=True)
    assert seen.graphs == MOST + 1 == len(made) and not seen.problem


def test_the_header_tells_how_many_shapes_there_are(capsys):
    with plain_card():
        fit(Net(), drawn(rows=13), Settings(steps=2, batch_size=4), loss=simple_loss, recorded=True)
    assert "recorded  updates are repeated as CUDA graphs; 2 shapes of batches in the first epoch\n" in capsys.readouterr().err


def test_what_cannot_be_recorded_is_called_and_said():
    def waiting(model, inputs):
        loss = simple_loss(model, inputs)
        return loss * (1.0 if loss.item() > 0.0 else 2.0)

    with plain_card():
        called, _ = trained(False, Net(p=0.3), drawn(), loss=waiting, steps=6)
        recorded, seen = trained(True, Net(p=0.3), drawn(), loss=waiting, steps=6)
    assert recorded[:-1] == called[:-1] and "item" in seen.problem and "recorded=True: from update" in recorded[-1][0]


def test_ids_that_were_never_seen_are_looked_at_on_the_host():
    rows = drawn(rows=16)
    rows.labels[rows.labels > 2] = 2
    rows.labels[-1, 0] = 7  # there are 5 classes
    rows.order = lambda seed, epoch, batch_size: [list(range(i, i + 4)) for i in range(0, 16, 4)]

    def loss(model, inputs):
        if isinstance(inputs["labels"], np.ndarray):
            loss_of(model, inputs)  # an operation that looks, as all do on the host
        return simple_loss(model, inputs)

    with plain_card(), pytest.raises(minilora.errors.OutOfRangeError, match="7"):
        trained(True, Net(), rows, loss=loss, steps=8)


def test_a_run_that_diverges_says_what_it_would_have_said():
    texts = []
    for recorded in (False, True):
        data = drawn()
        data.x[-1] = np.inf
        with plain_card(), pytest.raises(DivergedError) as caught:
            trained(recorded, Net(), data, loss=simple_loss, epochs=4)
        texts.append(str(caught.value))
    assert texts[0] == texts[1]


def test_on_the_cpu_and_among_processes():
    assert Run(Net(), drawn(), Settings(steps=1), loss_of, Serial(), recorded=True).recorded is None

    def rank(comm):
        with pytest.raises(ConfigError, match="recorded=True is for one process"):
            Run(Net(), drawn(), Settings(steps=1), loss_of, comm, recorded=True)

    together(2, rank)
