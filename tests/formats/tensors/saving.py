"""Saves that are killed: run as a script, in a process of its own, which forks one saver after another.

Every saver saves states 1, 2, 3 ... in turn; whatever is found after its end must be one of them as a whole.
"""
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np

from minilora.formats import open_state, save_state
from minilora.formats.tensors import durable


def save_file(folder, k):
    save_state(folder / "m.safetensors", {"a": np.full(3000, k), "b": np.full((2, 5), k)}, {"k": str(k)})


def save_shards(folder, k):
    save_state(folder / "m.safetensors", {"a": np.full(3000, k), "b": np.full((2, 5), k)}, {"k": str(k)}, 24_000)


def save_either(folder, k):
    (save_file if k % 2 else save_shards)(folder, k)


def save_folder(folder, k):
    with durable.replace_folder(folder / "adapter") as new:
        (new / "adapter_config.json").write_text(json.dumps({"k": k}))
        save_state(new / "adapter_model.safetensors", {"a": np.full(3000, k)}, {"k": str(k)})


SAVERS = {"file": save_file, "shards": save_shards, "either": save_either, "folder": save_folder,
          "folder_in_steps": save_folder}


def state_of(folder):
    """The number of the state that is there; an error if two are mixed or none is whole."""
    if (folder / "adapter").exists() or list(folder.glob(".adapter*")):
        place = durable.recover_folder(folder / "adapter")
        assert {"adapter_config.json", "adapter_model.safetensors", "notes.txt"} == set(os.listdir(place)), os.listdir(place)
        assert (place / "notes.txt").read_text() == "of somebody else"
        k = json.loads((place / "adapter_config.json").read_text())["k"]
        state = open_state(place / "adapter_model.safetensors")
    else:
        single = folder / "m.safetensors"
        state = open_state(single if single.exists() else folder / "m.safetensors.index.json")
        k = int(state.metadata["k"])
    assert {int(number) for array in state.values() for number in np.unique(array)} == {k} == {int(state.metadata["k"])}
    return k


def first(save, folder):
    save(folder, 0)
    if (folder / "adapter").exists():
        (folder / "adapter" / "notes.txt").write_text("of somebody else")


def read_while_it_is_replaced(save, folder, times):
    """Config and weights are of one state, whenever they are read."""
    first(save, folder)
    adapter, index, seen = folder / "adapter", folder / "m.safetensors.index.json", set()

    def for_ever():
        k = 0
        while True:
            k += 1
            save(folder, k)

    def read():
        k = json.loads((adapter / "adapter_config.json").read_text())["k"]
        time.sleep(0.001)  # so that it is often replaced in between
        return k, float(open_state(adapter / "adapter_model.safetensors")["a"][0])

    process = forked(for_ever)
    try:
        began, read_times = time.monotonic(), 0
        while read_times < times or len(seen) < 3 and time.monotonic() - began < 100:
            read_times += 1
            if save is save_folder:
                k, number = durable.read_steadily(adapter, read)
            else:
                state = open_state(index)
                k, (number,) = int(state.metadata["k"]), {float(array.max()) for array in state.values()}
            assert k == number
            seen.add(k)
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    assert len(seen) > 2, "nothing was replaced"
    return len(seen)


def killed_at(call, n):
    """Let the n-th call of the system that changes something be the last."""
    left = [n]

    def counting(function):
        def counted(*arguments, **options):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)
        return counted

    for name in ("fsync", "replace", "rename", "unlink", "link", "mkdir", "open", "rmdir", "chmod"):
        setattr(os, name, counting(getattr(os, name)))
    durable.exchange = counting(durable.exchange)
    call()


def forked(call):
    """Run a call in a fork; the process id."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            call()
            code = 0
        finally:
            os._exit(code)
    return process


def at_every_call(save, folder, step):
    """Kill a save before its first change, and `step` changes later ..., until one is not killed any more."""
    first(save, folder)
    before, n = 0, 0
    while True:
        _, status = os.waitpid(forked(lambda: killed_at(lambda: save(folder, before + 1), n)), 0)
        k = state_of(folder)
        assert k in (before, before + 1), f"call {n}: {k} after {before}"
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0 and k == before + 1, f"call {n} failed"
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        before, n = k, n + step
    assert n > 5
    return n


def at_random_times(save, folder, times):
    first(save, folder)
    seen = set()
    for _ in range(times):
        begin = state_of(folder)
        heard, said = os.pipe()

        def for_ever():
            k = begin
            while True:
                k += 1
                save(folder, k)
                os.write(said, b".")

        process = forked(for_ever)
        os.read(heard, 1)  # it has begun
        time.sleep(random.uniform(0.0, 0.03))
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        os.close(heard)
        os.close(said)
        assert os.WIFSIGNALED(status), "the saver stopped by itself"
        seen.add(state_of(folder))
    assert len(seen) == times  # each run saved once at least
    return len(seen)


if __name__ == "__main__":
    way, number, where, *savers = sys.argv[1:]
    for name in savers:
        folder = Path(where) / name
        folder.mkdir()
        if name == "folder_in_steps":
            durable.exchange = lambda a, b: False
        save = SAVERS[name]
        kill = {"times": at_random_times, "every": at_every_call, "read": read_while_it_is_replaced}[way]
        print(name, kill(save, folder, int(number)))
        save(folder, 10**9)  # and the next save leaves nothing behind
        assert state_of(folder) == 10**9
        left = [name for name in os.listdir(folder) if name.startswith(".")]
        assert not left and len(os.listdir(folder)) <= 3, os.listdir(folder)
