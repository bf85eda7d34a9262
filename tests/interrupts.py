"""KeyboardInterrupt at a chosen line: what Ctrl-C does, wherever it comes."""
import inspect
import os
import sys

import minilora
from minilora import nn
from minilora.lora import undo

PACKAGE = os.path.dirname(minilora.__file__) + os.sep
ROOM = os.path.join(PACKAGE, "lora") + os.sep
LOADING = inspect.unwrap(nn.Module.load_state_dict).__code__  # the method itself, inside of what answers for it
UNDOING = {undo._picture.__code__, undo._put_back.__code__}  # changes nothing; and one Ctrl-C at a time


class Interrupt:
    """Raises KeyboardInterrupt before the n-th line that runs; without n notes which lines those are.

    Lines of the package; or, which is quicker, those of lora/ alone, and only while something is being changed.
    """

    def __init__(self, n=None, every=False):
        self.n, self.every, self.lines = n, every, []

    def __call__(self, frame, event, argument):
        code = frame.f_code
        here = code.co_filename.startswith(PACKAGE if self.every else ROOM) or code is LOADING
        if not here or code in UNDOING:
            return None
        if event == "line":
            self.lines.append((code.co_filename, frame.f_lineno))
            if len(self.lines) == self.n:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self

    def during(self, call, *arguments):
        """Whether the call was interrupted."""
        before, picture = sys.gettrace(), undo._picture

        def begin(*arguments):
            found = picture(*arguments)
            sys.settrace(self)
            return found

        if self.every:
            sys.settrace(self)
        else:
            undo._picture = begin
        try:
            call(*arguments)
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
            undo._picture = picture
        return False
