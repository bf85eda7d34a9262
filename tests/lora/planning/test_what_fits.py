"""Whole steps of a plan, in each way to train, and what fits into a memory."""
import dataclasses

import numpy as np
import pytest

from minilora import engine, lora, nn
from minilora.errors import ConfigError
from minilora.hollow import rehearse
from minilora.lora.planning.ways import WAYS, ways_for

CONFIG = lora.Config(r=4, target_modules="all-linear")
SHAPE = nn.GPT2Config(vocab_size=97, n_positions=32, n_embd=32, n_layer=2, n_head=2)


def model(**more):
    with nn.undrawn():
        return nn.GPT2(dataclasses.replace(SHAPE, **more))


def test_the_steps_of_a_plan_are_those_of_the_injected_model():
    steps = dict(lora.plan(model(), CONFIG, example=(3, 32)).steps)
    assert list(steps) == ["full fine-tuning", "LoRA", "LoRA, blocks again", "QLoRA, nf4-double"]
    real = nn.GPT2(SHAPE, rng=0)
    example = real.example(3, 32)
    assert steps["full fine-tuning"] == rehearse(real, example)
    lora.inject(real, CONFIG, rng=0)
    again = rehearse(real, example)
    assert steps["LoRA"][:5] == again[:5] and steps["LoRA"].activations == engine.ledger(real(**example)).nbytes
    assert sum(steps["LoRA"].forward) == sum(again.forward) and steps["LoRA"].forward.adapters > 0
    nn.grad_checkpoint(real)
    assert steps["LoRA, blocks again"][:5] == rehearse(real, example)[:5]
    assert steps["QLoRA, nf4-double"].weights < steps["LoRA"].weights


def test_flops_of_adapters_are_those_of_the_paper_work():
    planned = lora.plan(model(), CONFIG, batch=96, example=(3, 32))
    step = dict(planned.steps)["LoRA"]
    assert step.forward.adapters == sum(2 * 96 * (a.a + a.b) for a in planned.adapters)
    logits = 2 * 3 * 31 * 97 * 32  # of which dh is made with the loss
    assert step.forward.weights == sum(2 * 96 * 32 * n for n in (96, 32, 128, 128)) * 2 + 2 * logits


@pytest.mark.parametrize(("base", "bits"), [("bfloat16", 16), ("int8", 8 + 32 / 256), ("nf4", 4.5), ("nf4-double", 4.127)])
def test_bits_of_a_base(base, bits):
    whole = model(n_embd=256, vocab_size=11)
    found = ways_for(whole, [way for way in WAYS if way.base in (None, base) and way.adapters and not way.again])
    from minilora.lora.planning.ways import rehearsed
    full, held = (rehearsed(whole, CONFIG, (1, 8), way).weights for way in found[:2])
    n = 2 * 12 * 256 * 256
    inner = sum(m.weight.shape[0] for _, m in whole.named_modules() if isinstance(m, nn.Linear))
    expected = n * bits / 8 if base != "int8" else n + 4 * inner
    assert full - held == pytest.approx(4 * n - expected, rel=1e-4)


@pytest.mark.parametrize("more", [dict(use_dora=True), dict(init_lora_weights="pissa"), dict(init_lora_weights="olora"),
                                  dict(modules_to_save=["ln_f"]), dict(bias="all"), dict(lora_dropout=0.1)])
def test_kinds_of_adapters_in_every_way(more):
    config = dataclasses.replace(CONFIG, **more)
    whole = model()
    from minilora.lora.planning.ways import rehearsed
    for way in ways_for(whole):
        step = rehearsed(whole, config, (2, 8), way)
        assert min(step[:5]) >= 0 and step.peak > step.weights
    if "init_lora_weights" in more:
        real = nn.GPT2(SHAPE, rng=0)
        lora.inject(real, config, rng=0)
        assert rehearse(real, real.example(2, 8))[:5] == dict(lora.plan(whole, config, example=(2, 8)).steps)["LoRA"][:5]


def test_models_without_texts_without_blocks_and_with_adapters():
    images = nn.Sequential(nn.Conv2d(3, 4, 3, rng=0), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2, rng=0))
    steps = lora.plan(images, lora.Config(r=2, target_modules=["0"]), example=np.zeros((5, 3, 8, 8), "float32")).steps
    assert [name for name, _ in steps] == ["full fine-tuning", "LoRA", "QLoRA, nf4-double"]
    adapted = nn.GPT2(SHAPE, rng=0)
    lora.inject(adapted, CONFIG, rng=0)
    assert "full fine-tuning" not in [way.name for way in ways_for(adapted)]
    more = dict(lora.plan(adapted, CONFIG, example=(1, 8)).steps)
    assert more["LoRA"].weights > dict(lora.plan(model(), CONFIG, example=(1, 8)).steps)["LoRA"].weights


@pytest.mark.parametrize("asked", ["batch", "rank"])
def test_the_largest_that_fits(asked):
    whole = model()
    way = [way for way in WAYS if way.name == "LoRA"]
    from minilora.lora.planning.ways import rehearsed

    def peak(n):
        config = dataclasses.replace(CONFIG, r=n) if asked == "rank" else CONFIG
        return rehearsed(whole, config, (n, 16) if asked == "batch" else (1, 16), way[0]).peak

    for n in (1, 5, 40, 333):
        found = lora.what_fits(whole, CONFIG, peak(n), length=16, asked=asked, ways=way).ways[0]
        assert found.least == peak(1) and found.largest == n and found.peak == peak(n)
        almost = lora.what_fits(whole, CONFIG, peak(n + 1) - 1, length=16, asked=asked, ways=way).ways[0]
        assert almost.largest == n and almost.peak == peak(n)
    found = lora.what_fits(whole, CONFIG, peak(1) - 1, length=16, asked=asked, ways=way)
    assert found.first is None and found.nearest.name == "LoRA" and "nothing fits" in str(found)


def test_what_first_makes_it_fit():
    found = lora.what_fits(model(), CONFIG, 2 * 10 ** 7, length=8)
    assert found.first is found.ways[0] and "even full fine-tuning fits" in str(found)
    tight = lora.what_fits(model(), CONFIG, found.ways[2].least, length=8)
    assert tight.first.name == "LoRA" and "what first makes it fit" in str(tight)


def test_what_is_wrong():
    plain = nn.Sequential(nn.Linear(3, 2, rng=0))
    config = lora.Config(r=1, target_modules=["0"])
    for call, said in [
            (lambda: lora.plan(plain, config, example=(2, 3)), "does not say what its inputs look like"),
            (lambda: lora.plan(model(), CONFIG, example=(0, 3)), "ints >= 1"),
            (lambda: lora.plan([("0", (2, 3))], config, example=(1, 2)), "has no forward"),
            (lambda: lora.plan(model(), CONFIG, example=(1, 4), optimizer="lion"), "optimizer must be one of"),
            (lambda: lora.what_fits(model(), CONFIG, 10, length=4, asked="size"), "asked must be one of"),
            (lambda: lora.what_fits(model(), CONFIG, 0, length=4), "memory")]:
        with pytest.raises(ConfigError, match=said):
            call()
