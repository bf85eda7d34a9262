"""Mixed precision: overflows are skipped, counted and undone; what else goes wrong ends the run, and is named."""

import json
import os

import numpy as np
import pytest
from ranks import together
from rows_of_numbers import Net, drawn, loss_of
from standin import counting

import minilora
from minilora import lora, nn, ops, optim
from minilora.errors import ConfigError, DivergedError
from minilora.train import Settings, fit
from minilora.train.beside import Beside
from minilora.train.distributed.comm import Serial
from minilora.train.run import Run

MIXED = dict(steps=8, batch_size=4, accumulation=2, learning_rate=0.05, threads=1, precision="mixed", steps_per_report=1)


def run_of(model, data, loss=loss_of, comm=None, optimizer=None, **settings):
    run = Run(model, data, Settings(**{**MIXED, **settings}), loss, comm or Serial(), optimizer)
    run.model.train()
    return run


def state(run):
    """All that a skipped step must not touch, as bytes."""
    groups = run.optimizer.state_dict()["groups"]
    return {"weights": {name: array.tobytes() for name, array in run.model.state_dict().items()},
            "moments": [array.tobytes() for group in groups for array in group["state"].values()],
            "steps": [group["steps"] for group in groups], "rates": [group["settings"]["lr"] for group in groups],
            "schedule": run.scheduler.state_dict(), "step": run.step, "tokens": run.tokens, "losses": list(run.losses)}


class Steep(nn.Module):
    """x -> x W, whose gradient passes through float16 times 2^k: finite up to some scale."""

    def __init__(self, factor, classes=5, p=0.0):
        self.inner, self.outer = nn.Linear(4, 6, rng=0), nn.Linear(6, classes, rng=1)
        self.drop, self.factor = nn.Dropout(p, rng=2), factor

    def forward(self, x):
        return self.outer(self.drop(ops.gelu(self.inner(x) * self.factor))) * (1.0 / self.factor)


# -- skipping ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_a_run_with_overflows_is_the_run_that_began_with_the_right_scale(p):
    """To the bit, masks of dropout included: a skipped step leaves nothing behind."""
    runs = [run_of(Steep(64.0, p=p), drawn(), loss_scale=2.0 ** k) for k in (30, 20)]
    made = [[run.update() for _ in range(4)] for run in runs]
    assert runs[0].scaling.skipped > 10 and made[0][0].skipped == runs[0].scaling.skipped and not made[0][1].skipped
    again = run_of(Steep(64.0, p=p), drawn(), loss_scale=runs[0].scaling.value)
    least = [again.update() for _ in range(4)]
    assert again.scaling.skipped == 0 and made[0][0].scale == again.scaling.value == runs[1].scaling.value
    assert state(runs[0]) == state(again) == state(runs[1])
    assert [each._replace(skipped=0) for each in made[0]] == least


def test_a_skipped_step_touches_nothing():
    run = run_of(Steep(64.0, p=0.4), drawn(), loss_scale=2.0 ** 16)
    run.update()
    run.scaling.value, before, counters = 2.0 ** 32, state(run), [run.model.drop.step]
    batches = [run.batch(number) for number in run.window]
    run.last_good.keep()
    with np.errstate(all="ignore"):
        assert run._attempt(batches, 0.05) is None
    assert state(run) == before and [run.model.drop.step] == counters
    assert (run.scaling.value, run.scaling.in_a_row) == (2.0 ** 31, 1)


def test_an_overflow_in_one_of_two_micro_batches_skips_both():
    """One row is a million times the others: its batch alone overflows."""
    data = drawn()
    data.x[data.order(0, 0, 4)[1][0]] *= 3e4

    def finite(part):
        run = run_of(Net(), data, loss_scale=2.0 ** 16)
        run.optimizer.zero_grad()
        with np.errstate(all="ignore"):
            run.backward(run.batch(part))
        return all(np.isfinite(p.gathered).all() for p in run.model.parameters())

    def loss(model, inputs):
        return ops.mean(model(minilora.tensor(inputs["x"])) ** 2)

    run = run_of(Net(), data, loss=loss, loss_scale=2.0 ** 16)
    made = run.update()
    assert made.skipped > 0 and run.scaling.skipped == made.skipped
    again = run_of(Net(), data, loss=loss, loss_scale=run.scaling.value)
    assert again.update()._replace(skipped=made.skipped) == made and state(again) == state(run)
    assert finite(0)


def test_the_scale_doubles_after_good_steps_and_comes_back():
    run = run_of(Steep(64.0), drawn(), loss_scale=1.0, scale_growth=1, steps=60, max_skips=3)
    scales = [run.update().scale for _ in range(40)]
    assert scales[:5] == [1.0, 2.0, 4.0, 8.0, 16.0]
    highest = max(scales)
    assert run.scaling.skipped > 3 and highest < 2.0 ** 30 and min(scales[30:]) >= highest / 4


def test_unscaled_before_clipping():
    """The norm told, and the step made, are those of the true gradients, whatever the scale.."""
    # By SGD: Adam divides factors out.
    def moved(**settings):
        model = Net()
        run = run_of(model, drawn(), max_grad_norm=0.1, optimizer=lambda named: optim.SGD(named, lr=1.0), **settings)
        before = [p.data.copy() for p in model.parameters()]
        norm = run.update().norm
        return norm, np.concatenate([(p.data - old).ravel() for p, old in zip(model.parameters(), before)])

    plain, step = moved(precision="full")
    assert plain > 0.1 and np.linalg.norm(step) == pytest.approx(0.1, rel=1e-5)
    for scale in (2.0 ** 4, 2.0 ** 10):
        norm, same = moved(loss_scale=scale)
        assert norm == pytest.approx(plain, rel=5e-3)
        np.testing.assert_allclose(same, step, rtol=0, atol=5e-3 * 0.1)


def test_nothing_but_float32_is_trained_and_the_adapter_beside_float16_is():
    with pytest.raises(ConfigError, match=r"inner.weight is float16: convert the model first, model.to\(dtype='float32'\)"):
        run_of(Net(dtype="float16"), drawn(dtype="float16"))
    model = Net(dtype="float16")
    lora.inject(model, lora.Config(r=2, target_modules=["inner", "outer"]), rng=0)
    made = fit(model, drawn(dtype="float16"), Settings(**MIXED), loss=loss_of, quiet=True)
    assert made.step == 8 and {p.dtype.name for p in model.parameters() if p.trainable} == {"float32"}


# -- what is no overflow of the scale ---------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_is_not_skipped():
    data, model = drawn(), Net()
    data.x[7, 1, 2] = np.nan
    run = run_of(model, data, batch_size=12)
    with pytest.raises(DivergedError, match=r"step 1: the loss is nan.*row 7 of the data, x\[1, 2\] is nan"):
        run.update()
    assert run.scaling.skipped == 0 and run.scaling.value == 2.0 ** 16


def test_activations_that_overflow():
    model = Net()
    model.outer.weight.data[...] = 1e6
    said = r"output of Linear in outer, float16 .*precision='full' \(--precision full\) has room"
    with pytest.raises(DivergedError, match=said):
        run_of(model, drawn()).update()


class Root(nn.Module):
    def __init__(self):
        self.weight = minilora.Parameter([0.0] * 4)

    def forward(self, x):
        return ops.sqrt(ops.abs(x * self.weight))


def mean_of(model, inputs):
    return ops.mean(model(minilora.tensor(inputs["x"])))


@pytest.mark.parametrize(("start", "skips", "words"), [
    (2.0 ** 16, 20, "the loss scale is 1 already, and cannot be halved"),
    (2.0 ** 30, 5, r"5 steps in a row were to be skipped; the loss scale is 6.71\d*e\+07")])
def test_a_gradient_that_no_scale_makes_finite_ends_the_run(start, skips, words):
    """sqrt at 0: the model is as it was, and the error names the first array that is not finite."""
    run = run_of(Root(), drawn(), loss=mean_of, loss_scale=start, max_skips=skips)
    before = state(run)
    with pytest.raises(DivergedError, match=rf"the norm of the gradients is nan and {words}.*the gradient of weight \(4,\)"):
        run.update()
    assert state(run) == before and run.scaling.skipped == min(skips - 1, 16)


def test_a_diverged_run_keeps_its_folder(tmp_path):
    class Spoils(Beside):
        def after_step(self, run, made):
            if run.step == 3:
                run.model.weight.data[...] = 0.0

    model = Root()
    model.weight.data[...] = 1.0
    with pytest.raises(DivergedError, match="diverged in step 4.*checkpoints/step-000003"):
        fit(model, drawn(), Settings(**MIXED, save_every=1), loss=mean_of, folder=tmp_path / "run", quiet=True,
            beside=[Spoils()])
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["status"].startswith("diverged") and report["skipped"] == 16 and report["loss_scale"] == 1.0
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == ["step-000002", "step-000003"]


def test_a_step_that_spoils_the_weights():
    run = run_of(Net(), drawn(), optimizer=lambda named: optim.SGD(named, lr=1e38), max_grad_norm=None, learning_rate=1e38)
    before = state(run)["weights"]
    with pytest.raises(DivergedError, match="a weight is not finite|the loss is"):
        for _ in range(8):
            run.update()
            before = state(run)["weights"]
    assert state(run)["weights"] == before


# -- around it --------------------------------------------------------------------------------------------------------


def test_what_is_said_and_written(tmp_path, capsys):
    made = fit(Steep(64.0), drawn(), Settings(**{**MIXED, "loss_scale": 2.0 ** 30}), loss=loss_of, folder=tmp_path / "run")
    assert made.skipped > 5 and made.step == 8
    said = capsys.readouterr().err
    assert "precision mixed: activations in float16" in said and f", {made.skipped} overflows" in said
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {row["skipped"] for row in rows} == {made.skipped} and len({row["loss_scale"] for row in rows}) == 1
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["skipped"] == made.skipped and report["settings"]["precision"] == "mixed"


def test_full_precision_says_nothing_of_it(tmp_path, capsys):
    fit(Net(), drawn(), Settings(steps=2, threads=1), loss=loss_of, folder=tmp_path / "run")
    assert "scale" not in capsys.readouterr().err + (tmp_path / "run" / "metrics.jsonl").read_text()


def test_settings():
    for wrong in ("half", "float16", None):
        with pytest.raises(ConfigError, match="precision must be one of full, mixed"):
            Settings(precision=wrong)
    for wrong in (0.5, 3.0, 2.0 ** 33, float("inf"), "x", True):
        with pytest.raises(ConfigError, match="loss_scale must be"):
            Settings(loss_scale=wrong)
    assert Settings(loss_scale=np.float32(1024)).loss_scale == 1024.0


def test_two_synchronisations_a_step(device):
    """One for whether there is a step, one for whether the weights are finite after it."""
    run = run_of(Net(p=0.2), drawn(), loss_scale=64.0)
    run.update()
    if device != "standin":
        return
    with counting() as counts:
        run.update()
    assert counts.syncs == 2 and counts.calls["get"] == 2, counts


def test_activations_are_kept_in_float16():
    model, data = Net(), drawn(64)
    from minilora.train.memory import needed

    kept = {precision: needed(run_of(model, data, precision=precision), data.batch(range(64)), False).kept
            for precision in ("full", "mixed")}
    assert kept["mixed"] < 0.8 * kept["full"]


def test_checkpointed_blocks_compute_in_mixed_precision_again():
    results = []
    for checkpointed in (False, True):
        model = Net(p=0.3)
        model.inner.grad_checkpoint = checkpointed
        run = run_of(model, drawn(), loss_scale=256.0)
        results.append((run.update(), state(run)))
    assert results[0] == results[1]


@pytest.mark.parametrize("size", [2, 3])
def test_all_processes_skip_together(size):
    """One row overflows, in one of them."""
    data = drawn()
    data.x[data.order(0, 0, 4)[0][1]] *= 3e4

    def loss(model, inputs):
        return ops.mean(model(minilora.tensor(inputs["x"])) ** 2)

    def trained(comm):
        run = run_of(Net(), data, loss=loss, comm=comm, loss_scale=2.0 ** 16)
        made = [run.update() for _ in range(3)]
        return run.scaling.state_dict(), state(run), [each.scale for each in made]

    found = together(size, trained)
    assert found[0][0]["skipped"] > 0 and all(each == found[0] for each in found)


def test_threads():
    data = drawn(32)
    runs = [run_of(Steep(64.0), data, threads=threads, batch_size=16, loss_scale=2.0 ** 30) for threads in (1, 2)]
    made = [run.update() for run in runs]
    assert made[0].norm == pytest.approx(made[1].norm, rel=1e-2) and made[0].loss == pytest.approx(made[1].loss, rel=1e-3)
    assert all(each.skipped > 5 for each in made)
