"""GPU: one recording of a step, for arguments of one kind and one state of what the step reads from Python.

Whoever records promises CUDA that the launches will find at every replay what they found: memory at the same addresses, numbers
in memory and not in the arguments of kernels. So the step's own memory comes from a pool that nobody else uses and that lives
as long as the graph; its arguments and the numbers that change (minilora/replay.py) lie in one block, which one copy fills
before every replay; and products go through `products`, as CuPy does not let its own be recorded.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from contextvars import copy_context
from copy import copy
from operator import is_
from typing import Any


from ... import outside, replay
from ...errors import MiniloraError, StateError
from ...recording import is_recording, watcher
from ...tensor import Parameter, Tensor
from .block import Block, from_host, on_device
from .refusals import plain_parts, refuse_changes, refuse_numbers, refuse_written

__all__ = ["Take", "built"]

Array = Any


class Take:
    """The first call runs the step in the pool, the second records it, the others replay it.

    Parameters
    ----------
    step : callable
    arguments : tuple of (tuple, dict)
        Of a call for which this take is made.
    stream : cupy.cuda.Stream
        On which it is recorded.
    pool : cupy.cuda.MemoryPool
    """

    def __init__(self, xp: Any, step: Callable[..., Any], arguments: Any, stream: Any, pool: Any) -> None:
        self.xp, self.step, self.stream, self.pool = xp, step, stream, pool
        leaves = leaves_of(arguments)
        self.block = Block(xp, [a for a in leaves if from_host(a)])
        rest = iter(self.block.inputs)
        self.inputs = [self.own(leaf, rest) for leaf in leaves]
        self.hosts = [i for i, leaf in enumerate(leaves) if from_host(leaf)]  # arguments that the block takes
        self.devices = [i for i, leaf in enumerate(leaves) if type(leaf) is Tensor or on_device(leaf)]
        self.arguments = built(arguments, iter(self.inputs))
        self.recording: replay.Recording | None = None
        self.graph: Any = None
        self.written: list[int] = []  # arguments that the step itself writes into
        self.used = 0  # at which call of the step it was used last

    def own(self, argument: Any, rest: Any) -> Any:
        """What the step gets in the place of an argument: an array of the device that is filled before every call."""
        if from_host(argument):
            return next(rest)
        if type(argument) is Tensor:
            return Tensor(self.xp.empty_like(argument.data))
        return self.xp.empty_like(argument) if on_device(argument) else argument

    def fits(self) -> bool:
        """Whether all that the step read from Python is as it was."""
        return self.recording is not None and self.recording.unchanged()

    def __call__(self, leaves: Sequence[Any], stream: Any) -> Any:
        """The step with these arguments, on the stream of the caller."""
        self.fill(leaves)
        new = self.graph is None
        before = [data_of(self.inputs[i]).copy() for i in self.devices] if new else []
        if self.recording is None:
            result = self.warm()
            self.give_back_written(leaves, before)
            return result
        gradients = {parameter: parameter.gathered for parameter in self.recording.settled} if new else {}
        pictures, launched = self.recording.pictures(), False
        try:
            if new:
                self.capture(gradients)
            else:
                self.recording.repeat()
            self.block.upload(stream)
            launched = self.graph.launch(stream) is None
            self.settle()
        except BaseException:  # Ctrl-C, too, wherever it comes: all of a step or nothing
            if launched:
                self.settle()
            else:
                put_back(pictures, gradients)
            raise
        if new and self.give_back_written(leaves, before):  # what it wrote before happened to be there
            self.graph = None
        return copied(self.result)

    def settle(self) -> None:
        """Give the parameters the gradients that the step leaves."""
        for parameter, gathered, lent in self.settled:
            parameter.gathered = gathered.copy() if lent else gathered

    def fill(self, leaves: Sequence[Any]) -> None:
        for i, place in zip(self.hosts, self.block.next_slot()):
            place[...] = leaves[i]
        for i in self.devices:
            data_of(self.inputs[i])[...] = data_of(leaves[i])

    def run(self, recording: replay.Recording) -> Any:
        """Call the step, and let the recording hear of all that it reads."""
        def look(op: Any, inputs: Iterable[Any], output: Any) -> None:
            for x in inputs:
                if isinstance(x, Parameter):
                    recording.reads_parameter(x)

        arguments, named = self.arguments
        with recording:
            replay.expect("the contexts in which the step is called", Contexts())
            outside.watch(self.step, self.inputs)
            token = watcher.set(look)
            try:
                return self.step(*arguments, **named)
            finally:
                watcher.reset(token)

    def warm(self) -> Any:
        """Run the step as it will be recorded: kernels are compiled, the pool has what it takes, numbers come from memory."""
        def allocate(count: int, dtype: Any) -> tuple[Array, Callable[[Sequence[float]], None]]:
            memory, fill = self.block.allocate(count, dtype)

            def fill_at_once(values: Sequence[float]) -> None:
                fill(values)
                self.block.upload(self.stream)
            return memory, fill_at_once

        recording = replay.Recording(allocate)
        self.block.used = self.block.numbers
        self.xp.cuda.get_current_stream().synchronize()
        with self.stream:
            self.block.upload(self.stream)
            if hasattr(self.xp, "products"):
                self.xp.products.follow()  # its workspace is not the pool's
            with self.xp.cuda.using_allocator(self.pool.malloc):
                result = self.run(recording)
        self.stream.synchronize()
        recording.renew()  # what the step makes once and keeps is there now
        self.recording, self.result = recording, plain_parts(result)
        return copied(result)

    def give_back_written(self, leaves: Sequence[Any], before: Sequence[Array]) -> bool:
        """Write into the caller's arrays what the step has written into their copies; `capture` refuses such a step."""
        for i, was in zip(self.devices, before):
            own = data_of(self.inputs[i])
            if bool(((own != was) & ((own == own) | (was == was))).any()):  # NaN is no change
                data_of(leaves[i])[...] = own
                self.written.append(i)
        return bool(self.written)

    def capture(self, before: Mapping[Any, Array | None]) -> None:
        """Record the step, which finds the gradients `before`: Python does all that it does in a step, the device nothing yet.

        After an error the caller puts back what Python did.
        """
        self.block.used = self.block.numbers
        recording, collecting = replay.Recording(self.block.allocate), gc.isenabled()
        self.xp.cuda.get_current_stream().synchronize()
        gc.disable()  # what it frees might not be the pool's
        try:
            with self.stream, self.xp.cuda.using_allocator(self.pool.malloc):
                self.stream.begin_capture()
                try:
                    result = self.run(recording)
                except BaseException:
                    with suppress(Exception):  # the stream must not record any longer; that the recording is broken is known
                        self.stream.end_capture()
                    raise
                self.graph = self.stream.end_capture()
            refuse_changes(recording)
            refuse_written(self.written)
            refuse_numbers(result, self.result)
        except BaseException as error:
            self.graph = self.recording = None
            put_back([], {parameter: before.get(parameter) for parameter in recording.settled})
            if isinstance(error, MiniloraError) or not isinstance(error, RuntimeError):  # CUDA's are RuntimeErrors
                raise
            raise StateError(f"record: the step cannot be recorded: {type(error).__name__}: {error}. While it is recorded, "
                             "nothing may wait for the GPU or copy between host and device, and products must be minilora's "
                             "own. Nothing has changed; call the step itself, without record, to train without a graph"
                             ) from error
        finally:
            if collecting:
                gc.enable()
        self.settled = [(parameter, found, lent(parameter, found, before.get(parameter)))
                        for parameter in recording.settled for found in [parameter.gathered]]
        self.recording, self.result = recording, result


def put_back(pictures: Iterable[Callable[[], Any]], gradients: Mapping[Any, Array | None]) -> None:
    """Undo what Python did in a step that the device has not done."""
    for put in pictures:
        put()
    for parameter, gathered in gradients.items():
        parameter.gathered = gathered


def lent(parameter: Any, gathered: Array | None, before: Array | None) -> bool:
    """Whether a gradient lies in the graph's own memory, into which the next replay writes: then others get a copy."""
    return gathered is not None and gathered is not parameter.room and gathered is not before


class Contexts:
    """In which of minilora's contexts a thread is: no_grad, mixed precision, switched adapters, parts of a batch."""

    def __init__(self) -> None:
        self.seen: tuple[Any, ...] = ()  # all of the thread's, of which most are others'
        self.found: tuple[Any, ...] = ()

    def __call__(self) -> tuple[Any, ...]:
        here = copy_context()
        now = *here, *here.values()
        if len(now) != len(self.seen) or not all(map(is_, now, self.seen)):
            self.seen = now
            self.found = tuple(x for variable, value in here.items()
                               if variable.name.startswith("minilora.") and variable is not watcher and value
                               for x in (variable, value))
        return is_recording(), *self.found


def leaves_of(arguments: Any) -> list[Any]:
    """The arguments of a call, also those in tuples, lists and dicts, in their order."""
    if isinstance(arguments, dict):
        arguments = arguments.values()
    elif not isinstance(arguments, (tuple, list)):
        return [arguments]
    return [leaf for part in arguments for leaf in leaves_of(part)]


def built(like: Any, leaves: Any) -> Any:
    """What `leaves_of` was given, of other leaves: lists and dicts of their own kinds, with all that these know beside."""
    if isinstance(like, tuple):
        parts = [built(part, leaves) for part in like]
        return type(like)(*parts) if hasattr(like, "_fields") else type(like)(parts)
    if not isinstance(like, (list, dict)):
        return next(leaves)
    made = copy(like)
    for key, part in like.items() if isinstance(like, dict) else enumerate(like):
        made[key] = built(part, leaves)
    return made


def data_of(argument: Any) -> Array:
    return argument.data if type(argument) is Tensor else argument


def copied(result: Any) -> Any:
    """The caller's own: the next replay writes into the graph's."""
    if result is None:
        return None
    own = [Tensor(part.data.copy()) if isinstance(part, Tensor) else part.copy() if on_device(part) else part
           for part in leaves_of(result)]
    return built(result, iter(own))
