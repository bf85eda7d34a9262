"""The numbers of a run: what they may be, and how they are written down."""

import json

import numpy as np
import pytest

from minilora.errors import ConfigError
from minilora.train import Settings


def test_they_are_pythons_own_and_come_back_from_json():
    made = Settings(steps=np.int64(5), learning_rate=np.float32(0.5), warmup=2, max_grad_norm=None, patience=np.int32(3))
    assert {type(value) for value in made.as_dict().values()} <= {int, float, str, type(None)}
    assert Settings.read(json.loads(json.dumps(made.as_dict()))) == made


def test_all_faults_in_one_message():
    with pytest.raises(ConfigError) as caught:
        Settings(steps=0, epochs=1.0, batch_size=True, learning_rate=float("nan"), schedule=["cosine"], warmup=-1, keep=1.5)
    for word in ("steps must", "batch_size must", "learning_rate must", "schedule must", "warmup must", "keep must",
                 "steps and epochs were both given"):
        assert word in str(caught.value)
    for name in ("batch_size", "seed", "steps_per_report"):
        with pytest.raises(ConfigError, match=f"{name} must be an int"):
            Settings(**{name: None})


def test_a_misspelt_name():
    with pytest.raises(ConfigError, match=r"none called 'lerning_rate' \(do you mean 'learning_rate'\?\), 'zzz'"):
        Settings.read({"lerning_rate": 1.0, "zzz": 2})
