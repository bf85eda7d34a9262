"""Twins: the same small model in torch and here, with the same names and numbers."""
import warnings

import numpy as np

from minilora import Parameter, nn, ops


def numbers(model, dtype):
    """Every parameter of a torch model on the host, as copies."""
    return {name: p.detach().numpy().astype(dtype).copy() for name, p in model.named_parameters()}


def torch_text(torch, transformers, vocab=11, d=6):
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(d, d + 1)
            self.c_proj = transformers.pytorch_utils.Conv1D(d, d + 1)
            self.norm = torch.nn.LayerNorm(d)

        def forward(self, x):
            return self.norm(x + self.c_proj(torch.tanh(self.fc(x))))

    class Text(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.emb = torch.nn.Embedding(vocab, d)
            self.h = torch.nn.ModuleList([Block(), Block()])
            self.pre_classifier = torch.nn.Linear(d, d, bias=False)
            self.classifier = torch.nn.Linear(d, 3)

        def get_input_embeddings(self):
            return self.emb

        def forward(self, ids):
            x = self.emb(ids)
            for block in self.h:
                x = block(x)
            return self.classifier(torch.tanh(self.pre_classifier(x)))

    return Text()


class Block(nn.Module):
    def __init__(self, d):
        self.fc, self.c_proj, self.norm = nn.Linear(d, d + 1), nn.Linear(d + 1, d), nn.LayerNorm(d)

    def forward(self, x):
        return self.norm(x + self.c_proj(ops.tanh(self.fc(x))))


class Text(nn.Module):
    def __init__(self, vocab=11, d=6):
        self.emb, self.h = nn.Embedding(vocab, d), [Block(d), Block(d)]
        self.pre_classifier, self.classifier = nn.Linear(d, d, bias=False), nn.Linear(d, 3)

    def forward(self, ids):
        x = self.emb(ids)
        for block in self.h:
            x = block(x)
        return self.classifier(ops.tanh(self.pre_classifier(x)))


CONVS = dict(conv1=dict(kernel_size=(3, 2), stride=(2, 1), padding=(1, 0)), conv2=dict(kernel_size=1))
LINE = dict(kernel_size=3, padding=1)


def torch_image(torch, transformers=None):
    class Image(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = torch.nn.Conv2d(3, 5, **CONVS["conv1"])
            self.conv2 = torch.nn.Conv2d(5, 4, bias=False, **CONVS["conv2"])
            self.line = torch.nn.Conv1d(4, 6, **LINE)
            self.head = torch.nn.Linear(6, 2)

        def forward(self, x):
            x = self.conv2(torch.tanh(self.conv1(x)))
            x = self.line(x.reshape(*x.shape[:2], -1))
            return self.head(x.mean(-1))

    return Image()


class Image(nn.Module):
    def __init__(self):
        self.conv1, self.conv2 = nn.Conv2d(3, 5, **CONVS["conv1"]), nn.Conv2d(5, 4, bias=False, **CONVS["conv2"])
        self.line, self.head = nn.Conv1d(4, 6, **LINE), nn.Linear(6, 2)

    def forward(self, x):
        x = self.conv2(ops.tanh(self.conv1(x)))
        x = self.line(x.reshape(*x.shape[:2], -1))
        return self.head(x.mean(-1))


THEIRS, OURS = {"text": torch_text, "image": torch_image}, {"text": Text, "image": Image}


def theirs(torch, transformers, kind, dtype, seed=0):
    """A torch model of this kind with drawn numbers."""
    torch.manual_seed(seed)
    model = THEIRS[kind](torch, transformers)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    return model.to(getattr(torch, dtype)).eval()


def ours(kind, arrays, dtype):
    """Its twin: GPT-2's matrices are (in, out) there and (out, in) here."""
    model = OURS[kind]()
    for name, p in list(model.named_parameters()):
        owner, _, last = name.rpartition(".")
        array = arrays[name]
        turned = owner.endswith("c_proj") and last == "weight"
        dict(model.named_modules())[owner].__dict__[last] = Parameter((array.T if turned else array).astype(dtype))
    return model.eval()


def drawn_input(kind, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 11, (3, 4)) if kind == "text" else rng.standard_normal((2, 3, 6, 5))


def quietly(call, *arguments, **options):
    """The result, and the texts of its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call(*arguments, **options)
    return result, sorted(str(w.message) for w in caught)
