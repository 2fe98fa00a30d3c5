"""Compares a memory with the window alone and a GRU of equal size as agents that must remember what they saw.

A corridor with a sign at its entrance (the T-maze of Bakker 2002, section 4, with two exits): the sign names the exit
to take at the end. Agents see noise on the way, and only at the end that it is reached. They are trained by policy
gradient with a learned baseline (REINFORCE, Williams 1992), on batches of streams that are reset where an episode ends,
and evaluated by acting step by step. In a long corridor the sign has left the window; in a short one it has not, and a
memory is not needed.

    python scripts/compare_agents.py --json agents.json --markdown agents.md --plot agents.png
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from sequence_peers import add_options, build_models, compare
from torch import Tensor, nn
from torch.nn import functional as F

from memtx.models.sequence_model import SequenceModel

NUM_EXITS, NOISE_DIM = 2, 2
NUM_ACTIONS = NUM_EXITS + 1  # to walk on, or to take an exit
OBSERVATION_DIM = NUM_EXITS + 1 + NOISE_DIM
CORRIDORS = {"long": (8, 12), "short": (2, 4)}
"""Least and greatest number of steps by name."""
WINDOW, BATCH_SIZE, ROLLOUT, SEGMENT_LENGTH, DISCOUNT, PENALTY = 4, 64, 32, 32, 0.5, -0.2
LEARNING_RATE, ENTROPY_WEIGHT = 3e-3, 0.1
MODELS = ("compressed memory", "window", "GRU")


class PolicyHead(nn.Module):
    """Maps hidden states to the logits of the actions and the expected return, the last number."""

    def __init__(self, dim: int, output_dim: int) -> None:
        super().__init__()
        self.out = nn.Linear(dim, output_dim)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(..., output_dim)``."""
        out: Tensor = self.out(x)
        return out


class Corridors:
    """A batch of corridors, each followed by another one; the walker moves on by itself, so that only exits matter.

    Args:
        name: Name in ``CORRIDORS``.
        batch_size: Number of agents.
        seed: Seed of signs, lengths and noise.
    """

    def __init__(self, name: str, batch_size: int, seed: int) -> None:
        self.low, self.high = CORRIDORS[name]
        self.generator = torch.Generator().manual_seed(seed)
        self.step = torch.zeros(batch_size, dtype=torch.int64)
        self.length, self.sign = self._sample(batch_size)

    def _sample(self, count: int) -> tuple[Tensor, Tensor]:
        length = torch.randint(self.low, self.high + 1, (count,), generator=self.generator)
        return length, torch.randint(NUM_EXITS, (count,), generator=self.generator)

    def observe(self) -> tuple[Tensor, Tensor]:
        """Return observations ``(batch, OBSERVATION_DIM)`` and the agents whose episode begins, ``(batch,)`` bool."""
        begins = self.step == 0
        sign = F.one_hot(self.sign, NUM_EXITS) * begins[:, None]
        noise = torch.randn(len(begins), NOISE_DIM, generator=self.generator)
        return torch.cat([sign, (self.step == self.length)[:, None], noise], dim=1), begins

    def act(self, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Take actions ``(batch,)``: 0 walks on, others take an exit. Return rewards and the episodes that ended."""
        is_end = self.step == self.length
        reward = rewards_of(actions, self.sign, is_end)
        length, sign = self._sample(len(is_end))
        self.step = torch.where(is_end, 0, self.step + 1)
        self.length, self.sign = torch.where(is_end, length, self.length), torch.where(is_end, sign, self.sign)
        return reward, is_end


def rewards_of(actions: Tensor, sign: Tensor, is_end: Tensor) -> Tensor:
    """Return 1 for the right exit, 0 for another one, and a penalty for an exit on the way or none at the end."""
    is_exit = actions > 0
    return torch.where(is_end == is_exit, ((actions == sign + 1) & is_end).float(), PENALTY)


def discounted_returns(rewards: Tensor, ends: Tensor) -> Tensor:
    """Return the discounted rewards from each step to the end of its episode, all ``(batch, length)``."""
    total, returns = torch.zeros(len(rewards)), []
    for step in reversed(range(rewards.shape[1])):
        total = rewards[:, step] + DISCOUNT * torch.where(ends[:, step], 0.0, total)
        returns.append(total)
    return torch.stack(returns[::-1], dim=1)


def train(name: str, make: Callable[[], SequenceModel], seed: int, num_updates: int) -> tuple[float, float]:
    """Train an agent; return the rate of right exits when it acts, and the seconds of training."""
    torch.manual_seed(seed)
    model, corridors = make(), Corridors(name, BATCH_SIZE, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    state, start = model.init_state(BATCH_SIZE), time.process_time()
    for update in range(num_updates):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (update + 1) / 20) * (1.0 - 0.9 * update / num_updates)
        # What an agent sees does not depend on its actions here, so a rollout is read in calls of many steps.
        walk = [(*corridors.observe(), corridors.step == corridors.length, corridors.sign) for _ in _walk_on(corridors)]
        observations, begins, ends, signs = (torch.stack(column, dim=1) for column in zip(*walk, strict=True))
        outputs = []
        for first in range(0, ROLLOUT, SEGMENT_LENGTH):
            part = slice(first, first + SEGMENT_LENGTH)
            output = model(observations[:, part], state, document_starts=begins[:, part])
            state = output.state
            outputs.append(output.logits)
        state = state.detach()
        log_probs, values = F.log_softmax(torch.cat(outputs, dim=1)[..., :-1], -1), torch.cat(outputs, dim=1)[..., -1]
        actions = torch.multinomial(log_probs.detach().exp().flatten(0, 1), 1).view(begins.shape)
        rewards = rewards_of(actions, signs, ends)
        returns = discounted_returns(rewards, ends)
        advantage = (returns - values).detach()
        log_prob = log_probs.gather(-1, actions[..., None])[..., 0]
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        # Falling to zero: without it, agents settle on one exit before they have learned to read the sign.
        entropy_weight = ENTROPY_WEIGHT * (1.0 - update / num_updates)
        loss = (-log_prob * advantage + 0.5 * (returns - values) ** 2 - entropy_weight * entropy).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    seconds = time.process_time() - start
    return evaluate(name, model), seconds


def _walk_on(corridors: Corridors) -> Iterator[None]:
    for _ in range(ROLLOUT):
        yield
        corridors.act(torch.zeros(BATCH_SIZE, dtype=torch.int64))


@torch.inference_mode()
def evaluate(name: str, model: SequenceModel, num_agents: int = 256, num_steps: int = 120) -> float:
    """Return the rate of right exits of agents that act step by step, with the most likely action."""
    corridors, state = Corridors(name, num_agents, 10**6), model.eval().init_state(num_agents)
    num_right = num_episodes = 0.0
    for _ in range(num_steps):
        observations, begins = corridors.observe()
        output = model(observations[:, None], state, document_starts=begins[:, None])
        state = output.state
        reward, ends = corridors.act(output.logits[:, 0, :-1].argmax(-1))
        num_right += float((reward[ends] == 1).sum())
        num_episodes += float(ends.sum())
    return num_right / num_episodes


def main() -> None:
    """Compare the agents."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--updates", type=int, default=700)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    models = build_models(
        MODELS, lambda backbone: SequenceModel(OBSERVATION_DIM, NUM_ACTIONS + 1, backbone, head=PolicyHead), WINDOW
    )
    compare(
        arguments, CORRIDORS, models, partial(train, num_updates=arguments.updates),
        names=("corridor", "agent", "right exits"), keys=("corridor", "agent", "right_exits"),
        title="Agents", unit="rate of right exits (chance 0.5)", lower_is_better=False,
    )  # fmt: skip


if __name__ == "__main__":
    main()
