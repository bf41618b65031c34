"""Small tasks that the recipes of docs/recipes.md are shown on.

python ppo_clip.py --env benchmarks.recipe_tasks:NoVelocities-v0
"""

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete
from gymnasium.wrappers import TransformObservation


class Lock(gymnasium.Env):
    """Set three dials of 3, 5 and 7 positions to the code that is shown; 20 codes an episode.

    An observation is the code, as three numbers from 0. The reward is the share of dials that are
    right: 20 an episode at most, 4.5 by chance.
    """

    action_space = MultiDiscrete([3, 5, 7])
    observation_space = Box(0.0, 6.0, (3,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.codes = self.np_random.integers(self.action_space.nvec, size=(21, 3))
        self.time = 0
        return self.codes[0].astype(np.float32), {}

    def step(self, action):
        reward = float((self.codes[self.time] == action).mean())
        self.time += 1
        return self.codes[self.time].astype(np.float32), reward, False, self.time == 20, {}


class JammedLock(Lock):
    """Lock, but each dial has positions that are jammed; to try one ends the episode.

    The mask has a number for each position: 3 of the first dial, then 5, then 7.
    """

    observation_space = Dict({"action_mask": Box(0, 1, (15,)), "code": Box(0, 6, (3,))})

    def observe(self, code):
        free = [self.np_random.random(n) < 0.5 for n in self.action_space.nvec]
        for positions, right in zip(free, code):
            positions[int(right)] = True
        self.free = free
        return {"action_mask": np.concatenate(free).astype(np.float32), "code": code}

    def reset(self, *, seed=None, options=None):
        code, info = super().reset(seed=seed)
        return self.observe(code), info

    def step(self, action):
        is_valid = all(positions[a] for positions, a in zip(self.free, action))
        code, reward, _, truncated, info = super().step(action)
        return self.observe(code), reward * is_valid, not is_valid, truncated, info


class Hand(gymnasium.Env):
    """Play a card of the hand that is near the card on the table; 20 cards an episode.

    There are 12 kinds of cards, and the hand has 3 of them. To play another kind is against the
    rules, and ends the episode. The reward is 1 for the same kind, less 1/11 for each kind between.
    """

    action_space = Discrete(12)
    observation_space = Dict({"action_mask": Box(0, 1, (12,)), "table": Box(0, 1, (12,))})

    def observe(self):
        self.table = self.np_random.integers(12)
        table = np.eye(12, dtype=np.float32)[self.table]
        return {"action_mask": self.hand.astype(np.float32), "table": table}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.hand = self.np_random.permutation(12) < 3
        self.time = 0
        return self.observe(), {}

    def step(self, action):
        is_valid = bool(self.hand[action])
        reward = 1 - abs(int(action) - self.table) / 11 if is_valid else 0.0
        if is_valid:
            others = np.flatnonzero(~self.hand)
            self.hand[action], self.hand[self.np_random.choice(others)] = False, True
        self.time += 1
        return self.observe(), float(reward), not is_valid, self.time == 20, {}


class Catch(gymnasium.Env):
    """Catch ten balls, one after the other, that fall in a picture of 72 × 72 pixels in colour.

    A ball falls eight rows and moves to one side in all of them, which a single picture does not
    show. The paddle moves to the left, not at all or to the right. The reward is 1 for a ball that
    is caught: 10 an episode at most, about 1 by chance.
    """

    action_space = Discrete(3)
    observation_space = Box(0, 255, (72, 72, 3), np.uint8)

    def observe(self):
        cells = np.zeros((9, 9, 3), np.uint8)
        cells[self.row, self.column] = 255, 128, 0
        cells[8, self.paddle] = 0, 255, 255
        return cells.repeat(8, axis=0).repeat(8, axis=1)

    def throw(self):
        self.row, self.column = 0, self.np_random.integers(9)
        self.drift = self.np_random.choice((-1, 1))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.paddle, self.balls = 4, 0
        self.throw()
        return self.observe(), {}

    def step(self, action):
        self.paddle = min(max(self.paddle + int(action) - 1, 0), 8)
        self.row += 1
        self.drift = -self.drift if not 0 <= self.column + self.drift <= 8 else self.drift
        self.column += self.drift
        reward = 0.0
        if self.row == 8:
            reward = float(self.column == self.paddle)
            self.balls += 1
            self.throw()
        return self.observe(), reward, False, self.balls == 10, {}


def no_velocities(**options):
    """CartPole-v1 with the position of the cart and the angle of the pole alone."""
    env = gymnasium.make("CartPole-v1", **options)
    space = Box(env.observation_space.low[::2], env.observation_space.high[::2])
    return TransformObservation(env, lambda obs: obs[::2], space)


gymnasium.register("Lock-v0", Lock)
gymnasium.register("JammedLock-v0", JammedLock)
gymnasium.register("Hand-v0", Hand)
gymnasium.register("Catch-v0", Catch)
gymnasium.register("NoVelocities-v0", no_velocities)
