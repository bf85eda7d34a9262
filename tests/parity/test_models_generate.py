"""Generation against transformers': greedy texts in float64, each processor of logits value by value. Run with -m parity."""
import warnings

import numpy as np
import pytest
from generation_cases import CHANGES, N, PROCESSED, PROMPTS, SETTINGS, logits, seen, settle
from in_double import in_double
from test_models_llama import CASES
from test_models_llama import both as both_llamas
from test_torch import torch  # noqa: F401  (a fixture)
from test_torch_transformer import both, transformers  # noqa: F401  (a fixture)
from tiny_transformers import CAUSAL, V

from minilora.models import generate
from minilora.models.decoding.sampling import Sampler, keep_top_k, keep_top_p, penalise, probabilities

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def pairs(torch, transformers):  # noqa: F811
    made = {}
    for family in CAUSAL:
        own, other, parameters = both(family, torch, transformers, **CHANGES[family])
        settle(family, own)
        with torch.no_grad():
            for name, p, theirs in parameters:
                if name in ("wpe.weight", "ln_f.bias", "wte.weight"):
                    theirs.copy_(torch.tensor(p.data))
        made[family] = own, other
    return made


def continued(torch, other, ids, mask, n=N, **settings):  # noqa: F811
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = other.generate(torch.tensor(ids), attention_mask=torch.tensor(mask), max_new_tokens=n,
                             **{"do_sample": False, "pad_token_id": 0, "eos_token_id": None, **settings})
    return out[:, np.shape(ids)[1]:].tolist()


def padded(prompts):
    T = max(map(len, prompts))
    return ([[0] * (T - len(prompt)) + prompt for prompt in prompts],
            [[0] * (T - len(prompt)) + [1] * len(prompt) for prompt in prompts])


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("family", CAUSAL)
def test_fifty_tokens(family, settings, pairs, torch):  # noqa: F811
    own, other = pairs[family]
    settings = SETTINGS[settings]
    expected = [continued(torch, other, [prompt], [[1] * len(prompt)], **settings)[0] for prompt in PROMPTS]
    assert min(len(set(text)) for text in expected) > 2
    for use_cache in (True, False):
        for prompt, text in zip(PROMPTS, expected):
            assert generate(own, prompt, N, use_cache=use_cache, **settings).ids[0].tolist() == text
        assert generate(own, PROMPTS, N, use_cache=use_cache, **settings).ids.tolist() == expected


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("family", CAUSAL)
def test_a_batch_padded_at_the_left(family, use_cache, pairs, torch):  # noqa: F811
    own, other = pairs[family]
    ids, mask = padded(PROMPTS)
    expected = continued(torch, other, ids, mask, use_cache=use_cache)
    assert generate(own, ids, N, attention_mask=mask, use_cache=use_cache).ids.tolist() == expected
    assert generate(own, PROMPTS, N, use_cache=use_cache).ids.tolist() == expected


@pytest.mark.parametrize("family", CAUSAL)
def test_ends(family, pairs, torch):  # noqa: F811
    """Several stop ids, of which one is kept, and pads behind it."""
    own, other = pairs[family]
    ids, mask = padded(PROMPTS)
    free = generate(own, PROMPTS, N).ids
    stops = sorted({int(free[0, 4]), int(free[2, 1])})
    expected = continued(torch, other, ids, mask, eos_token_id=stops, pad_token_id=V - 1)
    assert generate(own, PROMPTS, N, stop_ids=stops, pad_id=V - 1).ids.tolist() == expected


@pytest.mark.parametrize("case", CASES)
def test_the_llama_family(case, torch, transformers):  # noqa: F811
    """Windows, norms of heads, biases, and every kind of rope: past the positions that the model was made for, too."""
    family, changes = CASES[case]
    with in_double(torch):
        for prompts in (PROMPTS[:1], PROMPTS):  # models made anew: transformers' dynamic rope remembers the longest text
            own, other, _ = both_llamas(family, torch, transformers, **changes)
            assert generate(own, prompts, 20).ids.tolist() == continued(torch, other, *padded(prompts), 20)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("name", PROCESSED)
def test_processors(name, ties, torch, transformers):  # noqa: F811
    """Each of transformers' classes, in the order in which its generate applies them."""
    classes = transformers.generation.logits_process
    temperature, k, p, penalty = PROCESSED[name]
    z, ids = logits(ties), seen()
    steps = [
        (penalty and classes.RepetitionPenaltyLogitsProcessor(penalty), lambda z: penalise(z, marked(ids), penalty)),
        (classes.TemperatureLogitsWarper(temperature), lambda z: z / temperature),
        (k and classes.TopKLogitsWarper(k), lambda z: keep_top_k(z, k)),
        (p and classes.TopPLogitsWarper(p), lambda z: keep_top_p(z, p)),
    ]
    theirs = torch.tensor(z)
    for processor, own in steps:
        if processor:
            theirs, z = processor(torch.tensor(ids), theirs), own(z)
            same = np.sort if ties else np.asarray  # which of equal logits top-p drops is a matter of how they are sorted
            np.testing.assert_array_equal(same(z), same(theirs.numpy()))
    if not ties:
        np.testing.assert_allclose(probabilities(z), theirs.softmax(dim=-1), rtol=1e-13)


def marked(ids):
    found = np.zeros((len(ids), V), bool)
    np.put_along_axis(found, ids, True, axis=1)
    return found


@pytest.mark.parametrize("name", PROCESSED)
def test_draws_have_the_probabilities_of_transformers(name, pairs, torch, transformers):  # noqa: F811
    """The processors that its generate builds from these settings, and the frequencies of ours."""
    temperature, k, p, penalty = PROCESSED[name]
    _, other = pairs["gpt2"]
    given = {"temperature": temperature, "top_k": k or 0, "top_p": p or 1.0, "repetition_penalty": penalty or 1.0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = other.generate(torch.tensor([[1, 2, 2]]), max_new_tokens=1, do_sample=True, output_scores=True,
                             output_logits=True, return_dict_in_generate=True, pad_token_id=0, eos_token_id=None, **given)
    expected = out.scores[0].double().softmax(dim=-1)[0].numpy()
    choose = Sampler(1, V, temperature, k, p, penalty, seed=0)
    choose.read(np.array([[1, 2, 2]]))
    z, n = out.logits[0].double().numpy(), 2000
    counts = np.bincount([int(choose(z)[0]) for _ in range(n)], minlength=V)
    assert not counts[expected == 0.0].any()
    assert (np.abs(counts / n - expected) <= 5 * np.sqrt(expected * (1 - expected) / n) + 1e-9).all()
