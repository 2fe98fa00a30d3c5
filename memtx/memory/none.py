"""No memory: a position sees its document as far as the same call reaches back, and nothing is carried.

Here alone the cutting of a stream matters, by nature: it is the thing to compare memories with.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memtx.memory.base import ContentAttention, Losses, Memory, Places, Trace, View
from memtx.ops.visibility import Section, Visibility
from memtx.segment import Segment
from memtx.state import state


@state
class NoState:
    """Nothing."""


class NoMemory(Memory[NoState]):
    """Carries nothing from one call to the next."""

    depends_on = "nothing"
    padded = True
    lasting = False

    @property
    def cut_matters(self) -> bool:
        """True: what a token sees begins with the call."""
        return True

    def init_state(self, rows: int, *, like: Tensor) -> NoState:
        """Return nothing."""
        return NoState()

    def read(self, state: NoState, x: Tensor, segment: Segment, attention: ContentAttention) -> View:
        """Open the segment alone: every token is seen by the later ones of its document."""
        return View((x,), segment.once("none", lambda: _places(segment)), None)

    def write(self, view: View, segment: Segment, trace: Trace) -> tuple[NoState, Losses]:
        """Keep nothing."""
        return NoState(), {}


def _places(segment: Segment) -> Places:
    tick = torch.arange(segment.length, device=segment.position.device)[None]
    visibility = Visibility(
        tick.expand_as(segment.end), segment.end, segment.length, (Section(segment.length, 0, 1, None),)
    )
    return Places(tick.double(), visibility)
