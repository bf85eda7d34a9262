"""What a run learns from: files of texts, rows of tokens, plain arrays. Each is a `minilora.train.batch.Data`.

    reading     `read`: a folder or a file of JSON lines, and the report of what is in it
    jsonl       JSON lines, with every fault at its line
    rows        what may stand in a line
    encoding    rows as token ids, and which of them are to be learned
    tokens      `Tokens`: such ids as data, in batches of about one length
    buckets     the order of an epoch
    arrays      `Arrays`: arrays of one length as data
    redrawn     `Redrawn`: such arrays with new random numbers in every epoch
"""

from ...calls import answered_names
from .arrays import Arrays
from .reading import Texts, read
from .redrawn import Redrawn
from .tokens import Tokens

__all__ = ["Arrays", "Redrawn", "Texts", "Tokens", "read"]

answered_names(globals(), __all__)
