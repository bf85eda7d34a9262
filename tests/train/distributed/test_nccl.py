"""Sums of device arrays: the protocol, on the stand-in and with an emulated NCCL; the real one with a GPU, by itself."""
import os

import emulated_nccl
import numpy as np
import pytest
import standin
from conftest import fetch, need_gpu
from plain_card import plain_card
from ranks import Rank, together

import minilora
from minilora import backend, collective, nn, optim
from minilora.errors import ConfigError, DeviceError, DTypeError, ShapeError, StateError
from minilora.kernels import nccl as binding
from minilora.tensor import Parameter
from minilora.train.distributed.gradients import mean_over_all
from minilora.train.distributed.nccl import Nccl, take_one

xp = standin.xp


def emulated(monkeypatch):
    """Each thread on a card of its own, with the emulated NCCL."""
    monkeypatch.setattr(binding, "library", lambda: emulated_nccl)
    cards = iter(range(1000))
    monkeypatch.setattr(binding, "place", lambda: f"here {next(cards)}")


@pytest.fixture
def card(monkeypatch):
    """The stand-in as a GPU."""
    emulated(monkeypatch)
    with standin.card() as device:
        yield device


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["float32", "float64", "int64"])
def test_device_arrays_are_summed_where_they_lie(card, size, dtype):
    def rank(host):
        comm = Nccl(host, card)
        before = len(host.messages)
        flat = xp.asarray(np.arange(12).astype(dtype) * (host.rank + 1))
        comm.sum_(flat)
        part = xp.asarray(np.arange(12).astype(dtype).reshape(3, 4) + host.rank)[1:]
        comm.broadcast_(part)
        comm.sum_(xp.empty((0,), dtype=dtype))
        assert len(host.messages) == before, "nothing of it goes through the host"
        onward = np.ones(2)
        comm.sum_(onward)
        comm.broadcast_(onward)
        comm.barrier()
        assert (onward == size).all() and len(host.messages) == before + 2
        assert (comm.rank, comm.size, comm.local_rank, comm.local_size, comm.cores) == (host.rank, size, host.rank, size, 1)
        return fetch(flat).tolist(), fetch(part).tolist()

    expected = (np.arange(12) * size * (size + 1) / 2).tolist(), np.arange(4, 12).reshape(2, 4).tolist()
    with standin.counting() as counts:
        assert together(size, rank) == [expected] * size
    assert counts.syncs <= 2 * size  # those of `fetch`


def test_an_update_on_cards(card):
    def rank(host):
        comm = Nccl(host, card)
        p, q = (Parameter(xp.asarray(np.zeros(3, "float32"))) for _ in range(2))
        optimizer = optim.AdamW([{"params": [p]}, {"params": [q]}], lr=0.1)
        p.grad = xp.asarray(np.full(3, host.rank + 1.0, "float32"))
        made = mean_over_all(optimizer, comm, xp.asarray(np.float32(2.0)), host.rank, 5)
        return made.loss, made.targets, made.tokens, fetch(p.gathered).tolist(), q.gathered

    assert together(3, rank) == [(2.0, 3, 15, [2.0] * 3, None)] * 3


def test_the_key_is_rank_0s(card):
    def rank(host):
        return Nccl(host, card)._links.communicator.meeting

    meetings = together(4, rank)
    assert all(each is meetings[0] for each in meetings)


def test_what_nccl_cannot_take_is_refused(card):
    def rank(host):
        comm = Nccl(host, card)
        for call in (comm.sum_, comm.broadcast_):
            with pytest.raises(DTypeError, match="float16.*astype"):
                call(xp.asarray(np.ones(3, "float16")))
            with pytest.raises(ShapeError, match="contiguous"):
                call(xp.asarray(np.ones((3, 4), "float32"))[:, 1])

    together(2, rank)


def test_two_processes_on_one_card_are_refused_by_both(card, monkeypatch):
    monkeypatch.setattr(binding, "place", lambda: "node7 0000:01:00.0")

    def rank(host):
        with pytest.raises(DeviceError, match="ranks 0, 1 on node7 0000:01:00.0.*gpus-per-task"):
            Nccl(host, card)

    together(2, rank)


def test_an_abort_ends_what_is_under_way_first(card):
    class Host(Rank):
        def abort(self, status):
            raise SystemExit(status)

    def rank(host):
        host.__class__ = Host
        comm = Nccl(host, card)
        with pytest.raises(SystemExit) as end:
            comm.abort(5)
        return end.value.code, comm._links.communicator.meeting.aborted

    (code, aborted), _ = together(2, rank)
    assert code == 5 and sorted(aborted) == [0, 1]


def test_a_communicator_is_given_back(card):
    def rank(host):
        comm = Nccl(host, card)
        meeting = comm._links.communicator.meeting
        del comm
        host.barrier()
        return sorted(meeting.destroyed)

    assert together(2, rank)[0] == [0, 1]


def test_a_device_without_links_is_refused():
    standin.register()
    device = next(each for each in backend._by_type.values() if each.name == "standin")
    with pytest.raises(DeviceError, match="only the GPU can"):
        together(1, lambda host: Nccl(host, device))
    backend.unregister_device("standin")


@pytest.mark.parametrize(("visible", "rank", "size", "expected"), [
    (None, 2, 4, "2"), ("0,1,2,3", 2, 4, "2"), ("4,5,6,7", 1, 2, "5"), ("GPU-a, GPU-b", 1, 2, "GPU-b"), ("3", 0, 1, "3"),
    ("3", 1, 4, "3"),  # each has been given its own
    ("", 1, 4, ""),
])
def test_each_takes_one_gpu(visible, rank, size, expected):
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    take_one(rank, size, environ)
    assert environ == {"CUDA_VISIBLE_DEVICES": expected}


def test_fewer_gpus_than_processes_are_refused():
    environ = {"CUDA_VISIBLE_DEVICES": "0,1"}
    with pytest.raises(ConfigError, match="names 2 GPUs, and 4 processes"):
        take_one(0, 4, environ)
    assert environ == {"CUDA_VISIBLE_DEVICES": "0,1"}


def recorded_training(comm, record, steps=5):
    """The bits that a few steps of all processes leave: each has batches of its own, and adds up gradients in the step."""
    rng = np.random.default_rng(comm.rank)
    layer = nn.Linear(6, 4, bias=False, rng=0)
    optimizer = optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    inputs = [rng.standard_normal((8, 6)).astype("float32") for _ in range(steps)]

    @record
    def step(x):
        optimizer.zero_grad()
        (layer(x) * layer(x)).mean().backward()
        for group in optimizer.groups:
            comm.sum_(group.gather())
        optimizer.step()

    for x in inputs:
        step(backend.to_device(x))
    return fetch(layer.weight).tobytes()


def plain(step):
    return step


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_recorded_step_adds_up(monkeypatch, size):
    """All ranks in one process: each records its own graph, and these meet when they are launched."""
    emulated(monkeypatch)
    results = []
    with plain_card(collective.links) as device:
        for record in (minilora.record, plain):
            results.append(together(size, lambda host: recorded_training(Nccl(host, device), record)))
    assert results[0] == results[1] and len(set(results[0])) == 1


def test_messages_of_the_host_are_refused_in_a_recorded_step(card):
    def rank(host):
        comm = Nccl(host, card)
        x = xp.asarray(np.ones(3, "float32"))
        for call in (lambda: comm.sum_(np.ones(2)), lambda: comm.broadcast_(np.ones(2)), comm.barrier):
            step = minilora.record(lambda x: (call(), x)[1])
            before = len(host.messages)
            with pytest.raises(StateError, match="a replay would not do it again"):
                step(x)
            assert len(host.messages) == before

    together(2, rank)


@pytest.fixture
def alone():
    """A communicator of NCCL's own with one process, on the card: two may not share one."""
    need_gpu()
    with backend.use("gpu") as device:
        try:
            binding.library()
        except DeviceError as error:
            if os.environ.get("MINILORA_REQUIRE_GPU") in (None, "", "0"):
                pytest.skip(str(error))
            pytest.fail(f"MINILORA_REQUIRE_GPU is set, and NCCL cannot be tested: {error}", pytrace=False)
        links = collective.links
        yield device.resolve(links)(0, 1, lambda key: key, lambda text: [text])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float64", "int64"])
def test_the_real_one_adds_up_in_place(alone, dtype):
    xp = backend.current_device().xp
    flat = xp.arange(1000, dtype=dtype)
    part = flat[100:900]
    for call in (alone.sum_, alone.broadcast_):
        call(part)
        call(xp.empty((0,), dtype=dtype))
    with xp.cuda.Stream(non_blocking=True) as stream:
        own = xp.arange(50, dtype=dtype)
        own *= 3
        alone.sum_(own)
        own += 1
        stream.synchronize()
    assert (fetch(flat) == np.arange(1000)).all() and (fetch(own) == np.arange(50) * 3 + 1).all()
    with pytest.raises(DTypeError, match="float16.*astype"):
        alone.sum_(xp.ones(3, dtype="float16"))


@pytest.mark.gpu
def test_the_real_one_in_a_recorded_step(alone):
    alone.rank = 0
    recorded, called = (recorded_training(alone, record) for record in (minilora.record, plain))
    assert recorded == called


@pytest.mark.gpu
def test_the_real_one_behind_a_comm(alone):
    def rank(host):
        with backend.use("gpu") as device:
            comm = Nccl(host, device)
            flat = device.xp.arange(1000, dtype="float32")
            comm.sum_(flat)
            comm.broadcast_(flat)
            return fetch(flat)

    assert (together(1, rank)[0] == np.arange(1000)).all()
