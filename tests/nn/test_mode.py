"""A model in training or evaluation mode for a while: each module comes back to its own."""
import pytest

from minilora import nn
from minilora.nn.mode import in_mode


def modes(model):
    return [module.training for _, module in model.named_modules()]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_every_module_has_its_own_mode_again(training, fails):
    shared = nn.Dropout(0.5)
    model = nn.Sequential(nn.Linear(2, 2, rng=0), shared, nn.Sequential(shared, nn.Dropout(0.1)))
    model.train()[1].eval()
    before = modes(model)
    assert len(set(before)) == 2

    def used():
        with in_mode(model, training):
            assert set(modes(model)) == {training}
            if fails:
                raise KeyboardInterrupt

    if fails:
        with pytest.raises(KeyboardInterrupt):
            used()
    else:
        used()
    assert modes(model) == before


def test_one_inside_the_other():
    model = nn.Dropout(0.5).eval()
    with in_mode(model, training=True):
        with in_mode(model, training=False):
            assert not model.training
        assert model.training
    assert not model.training
