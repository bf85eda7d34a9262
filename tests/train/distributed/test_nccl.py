"""Sums of device arrays: the protocol, on the stand-in and with an emulated NCCL; the real one with a GPU, by itself."""
import emulated_nccl
import numpy as np
import pytest
import standin
from conftest import fetch
from ranks import Rank, together

from minilora import backend, optim
from minilora.errors import ConfigError, DeviceError, DTypeError, ShapeError
from minilora.kernels import nccl as binding
from minilora.tensor import Parameter
from minilora.train.distributed.gradients import mean_over_all
from minilora.train.distributed.nccl import Nccl, take_one

xp = standin.xp


@pytest.fixture
def card(monkeypatch):
    """The stand-in as a GPU, each thread on a card of its own, with the emulated NCCL."""
    monkeypatch.setattr(binding, "library", lambda: emulated_nccl)
    cards = iter(range(1000))
    monkeypatch.setattr(binding, "place", lambda: f"here {next(cards)}")
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


@pytest.mark.gpu
def test_the_real_one_by_itself():
    """One process: two may not share a card."""
    from conftest import need_gpu

    need_gpu()
    with backend.use("gpu") as device:
        try:
            binding.library()
        except DeviceError as error:
            pytest.skip(str(error))

        def rank(host):
            comm = Nccl(host, device)
            flat = device.xp.arange(1000, dtype="float32")
            comm.sum_(flat)
            comm.broadcast_(flat)
            return fetch(flat)

        assert (together(1, rank)[0] == np.arange(1000)).all()
