"""The loop over ranks that are threads: what comes out does not depend on their number, and all end alike."""
import pickle

import numpy as np
import pytest
from ranks import together
from shared_run import Rows, bits, loss, model_of, settings, trained

import minilora
from minilora import nn
from minilora.errors import DivergedError, StateError
from minilora.train.beside import Beside
from minilora.train.distributed.comm import Serial
from minilora.train.loop import fit


def test_the_result_does_not_depend_on_the_number_of_ranks_beyond_rounding():
    alone, result = trained(Serial(), valid=Rows(7))
    for size in (1, 2, 3, 4, 7):
        made = together(size, lambda comm: trained(comm, valid=Rows(7)))
        for model, other in made:
            assert bits(model) == bits(made[0][0]) and other.losses == made[0][1].losses
            assert [vars(e) for e in other.evaluations] == [vars(e) for e in made[0][1].evaluations]
            np.testing.assert_allclose([x for _, x in other.losses], [x for _, x in result.losses], rtol=2e-5)
            for name, value in alone.state_dict().items():
                np.testing.assert_allclose(np.asarray(model.state_dict()[name]), np.asarray(value), rtol=1e-4, atol=2e-6)


def test_settings_with_two_rates_and_an_empty_share():
    how = settings(loraplus_ratio=4.0, batch_size=2)
    alone, _ = trained(Serial(), how)
    for model, _ in together(3, lambda comm: trained(comm, how)):
        for name, value in alone.state_dict().items():
            np.testing.assert_allclose(np.asarray(model.state_dict()[name]), np.asarray(value), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("size", [2, 4])
def test_masks_differ_between_ranks_and_state_does_not(size):
    masks = {}

    class Watched(Beside):
        def __init__(self, rank):
            self.rank = rank

        def begin(self, run):
            drop = run.model[2]
            forward = drop.forward
            drop.forward = lambda x: masks.setdefault(self.rank, []).append((y := forward(x)).data == 0) or y

    made = together(size, lambda comm: trained(comm, settings(batch_size=8), dropout=0.5, running=True,
                                               beside=[Watched(comm.rank)]))
    assert len({pickle.dumps(bits(model)) for model, _ in made}) == 1
    same = [np.array_equal(one[:1], other[:1]) for one, other in zip(masks[0], masks[1])]
    assert sum(same) < len(same)
    again = together(size, lambda comm: trained(comm, settings(batch_size=8), dropout=0.5, running=True))
    assert bits(again[0][0]) == bits(made[0][0])


def test_rank_0_draws_what_a_process_by_itself_draws():
    from minilora import parts

    drop = nn.Dropout(0.5, rng=1)
    x = minilora.tensor(np.ones((4, 9), "float32"))
    masks = []
    for rank in (None, 0, 1, 2):
        drop.step = 0
        if rank is None:
            masks.append(drop(x).numpy().tobytes())
            continue
        with parts.in_process(rank):
            masks.append(drop(x).numpy().tobytes())
    assert masks[0] == masks[1] and len(set(masks)) == 3


@pytest.mark.parametrize("size", [2, 5])
def test_a_resume_is_exact_with_dropout_running_means_and_ranks_without_rows(tmp_path, size):
    whole = together(size, lambda comm: trained(comm, settings(schedule="constant"), dropout=0.4, running=True))

    class Stop(Beside):
        def after_step(self, run, made):
            run.asked = run.comm.rank == 1 and run.step == 2

    first = together(size, lambda comm: trained(comm, settings(schedule="constant"), tmp_path / "run", dropout=0.4,
                                                running=True, beside=[Stop()]))
    assert [result.step for _, result in first] == [3] * size
    rest = together(size, lambda comm: trained(comm, settings(schedule="constant"), tmp_path / "run", True, dropout=0.4,
                                               running=True))
    assert {pickle.dumps(bits(model)) for model, _ in rest} == {pickle.dumps(bits(whole[0][0]))}


def test_another_number_of_ranks_is_refused_until_it_is_permitted(tmp_path):
    how = settings(schedule="constant", steps=2)
    together(2, lambda comm: trained(comm, how, tmp_path / "run", dropout=0.4))
    with pytest.raises(StateError, match="processes: 2 there, 3 here"):
        together(3, lambda comm: trained(comm, how, tmp_path / "run", True, dropout=0.4))
    longer = settings(schedule="constant", steps=4)
    made = together(3, lambda comm: trained(comm, longer, tmp_path / "run", True, dropout=0.4, permit=["steps", "processes"]))
    assert [result.step for _, result in made] == [4] * 3 and len({pickle.dumps(bits(model)) for model, _ in made}) == 1


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_whoever_is_asked_to_stop_all_stop_after_the_same_step(tmp_path, rank):
    class Stop(Beside):
        def after_step(self, run, made):
            run.asked = run.asked or run.comm.rank == rank and run.step == 1

    made = together(3, lambda comm: trained(comm, folder=tmp_path / "run", beside=[Stop()]))
    assert [result.step for _, result in made] == [2] * 3
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())[-1] == "step-000002"


def test_all_are_told_of_the_row_that_is_not_finite():
    def rank(comm):
        with pytest.raises(DivergedError) as error:
            trained(comm, data=Rows(bad=7))
        return str(error.value)

    texts = together(3, rank)
    assert len(set(texts)) == 1 and "row 7 of the data, x[2] is nan" in texts[0] and "Mend that row" in texts[0]


def test_all_are_told_of_the_evaluation_that_is_not_finite():
    def rank(comm):
        with pytest.raises(DivergedError) as error:
            trained(comm, valid=Rows(9, bad=4))
        return str(error.value)

    texts = together(3, rank)
    assert len(set(texts)) == 1 and "x[2] is nan" in texts[0]


@pytest.mark.parametrize(("change", "words"), [("seed", "settings: seed: rank 0, another in rank 1"),
                                               ("weights", "trained: 1.*lora_A"), ("base", "base: 1.weight"),
                                               ("dropout", "state: 2.seed"), ("data", "data: ")])
def test_what_ranks_do_not_share_is_refused_before_anything_is_written(tmp_path, change, words):
    def rank(comm):
        model, data, how = model_of(0.3), Rows(), settings()
        if comm.rank == 1:
            if change == "seed":
                how = settings(seed=4)
            elif change == "weights":
                next(p for name, p in model.named_parameters() if "lora_A" in name).data += 1
            elif change == "base":
                model[1].weight.data[0, 0] += 1
            elif change == "dropout":
                model[2].seed += 1
            else:
                data.fingerprint = "others"
        with pytest.raises(StateError, match=words) as error:
            fit(model, data, how, loss=loss, comm=comm, folder=tmp_path / "run", quiet=True)
        return str(error.value)

    assert len(set(together(2, rank))) == 1
    assert not (tmp_path / "run").exists()
