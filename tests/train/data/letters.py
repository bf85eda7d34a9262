"""A tokenizer of letters, with the methods of `minilora.models.Tokenizer` that reading needs, and no library behind it."""
from types import SimpleNamespace

PAD, BOS, EOS, UNK = 0, 1, 2, 3
SPECIAL = {"<pad>": PAD, "<s>": BOS, "</s>": EOS, "<unk>": UNK, "<|user|>": 4, "<|bot|>": 5, "<|end|>": 6}
FIRST = 10


class Letters:
    """A token for each letter. `merges` are pairs of letters that are one token; special tokens are read from a text.

    `around` are the tokens that a text begins and ends with. With `blank` a text that does not begin with one gets a blank in
    front, as sentencepiece does.
    """

    def __init__(self, around=((BOS,), ()), eos="</s>", merges=(), blank=False, eos_ids=None):
        self.around, self.merges, self.blank, self.pad_id = around, list(merges), blank, PAD
        self.special_tokens = {"eos_token": eos} if eos else {}
        self.eos_ids = eos_ids if eos_ids is not None else (SPECIAL[eos],) if eos else ()
        self.calls = 0

    def id_of(self, token):
        return SPECIAL.get(token)

    def encode(self, texts, *, special_tokens=True):
        self.calls += 1
        before, after = self.around if special_tokens else ((), ())
        return SimpleNamespace(ids=[[*before, *self._bare(text), *after] for text in texts])

    def _bare(self, text):
        text.encode("utf-8")  # as the library does
        ids, place = [], 0
        text = " " + text if self.blank and text and not text.startswith((" ", "<")) else text
        while place < len(text):
            known = next((name for name in [*SPECIAL, *self.merges] if text.startswith(name, place)), text[place])
            letter = FIRST + self.merges.index(known) if known in self.merges else FIRST + 10 + ord(known[0])
            ids.append(SPECIAL.get(known, letter))
            place += len(known)
        return ids

    def decode(self, ids, skip_special_tokens=True):
        text = self.written(ids, skip_special_tokens)
        return text.removeprefix(" ") if self.blank else text

    def written(self, ids, skip_special_tokens=False):
        """Ids as text, with the blank in front."""
        names = {i: name for name, i in SPECIAL.items()}
        return "".join(("" if skip_special_tokens else names[i]) if i in names else
                       self.merges[i - FIRST] if i < FIRST + 10 else chr(i - FIRST - 10) for i in ids)

    def chat(self, messages, *, add_generation_prompt=True, tools=None):
        text = f"<s>{len(tools)} tools " if tools else "<s>"
        for message in messages:
            who = {"user": "<|user|>", "assistant": "<|bot|>"}[message["role"]]
            text += f"{who}{message['content']}<|end|>"
        return text + ("<|bot|>" if add_generation_prompt else "")

    def texts(self, data, number, learned=False):
        """A row of `Tokens` as text, or only what is learned of it."""
        (row,) = data.batch([number]).inputs["labels" if learned else "ids"][:, :data.lengths[number]]
        return self.written([i for i in row.tolist() if i >= 0])
