"""An optimizer whose update cannot be tried out is taken, but not without a word."""

from __future__ import annotations

import pytest
import torch
from torch.nn import Parameter
from torch.optim import SGD

from rankwise.optim.projected.probe import depends_on_values


class Demanding(SGD):
    """Wants what a trial cannot know."""

    def __init__(self, parameters: list[Parameter], secret: str) -> None:
        assert secret
        super().__init__(parameters, lr=0.1)


def test_what_cannot_be_tried_is_said(caplog: pytest.LogCaptureFixture) -> None:
    weight = Parameter(torch.zeros(2, 2))
    assert depends_on_values(SGD([weight], lr=0.1)) == ""
    assert caplog.text == ""
    assert depends_on_values(Demanding([weight], "known to the user")) == ""
    assert "Demanding could not be tried" in caplog.text
