"""Small environments whose right answers are known; `--env toys:Drift-v0` imports this module."""

import os
import signal

import gymnasium
import numpy as np
import torch
from gymnasium.envs.classic_control import CartPoleEnv
from gymnasium.spaces import Box, Dict, Discrete, Graph, MultiDiscrete, Sequence
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space


class OneState(gymnasium.Env):
    """One state, two actions that change nothing, reward 1; ends after `terminate_after` steps."""

    observation_space = Box(1.0, 1.0, (1,))
    action_space = Discrete(2)

    def __init__(self, terminate_after=None):
        self.terminate_after = terminate_after

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.ones(1, np.float32), {}

    def step(self, action):
        self.steps += 1
        return np.ones(1, np.float32), 1.0, self.steps == self.terminate_after, False, {}


class AnySpaces(gymnasium.Env):
    """Refuses every action outside its action space; episodes of 5 steps."""

    def __init__(self, observation_space, action_space):
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.steps = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        self.steps += 1
        return self.observation_space.sample(), 0.5, self.steps == 5, False, {}


class OverwritesAction(AnySpaces):
    """Scales the action that it is given in place."""

    def step(self, action):
        action *= 0.0
        return super().step(action)


class Drift(VectorEnv):
    """A vector environment that resets on the next step.

    If `absurd`, there is NaN wherever nobody may read: in the rewards of resets and in the last
    observations of episodes that terminate.

    Environment n ends episodes after 3 + n steps, by termination where n is even, by truncation
    where it is odd. The state drifts by −0.1 or +0.1; the reward is the state. `steps` counts the
    real steps taken. `info` holds the key that Gymnasium's statistics of episodes would take.
    """

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}
    steps = 0

    def __init__(self, num_envs=1, absurd=False, metadata=metadata, **_):
        self.num_envs, self.absurd, self.metadata = num_envs, absurd, metadata
        self.single_observation_space, self.single_action_space = (
            Box(-np.inf, np.inf, (2,)),
            Discrete(2),
        )
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def observe(self):
        return np.stack([self.state, self.age / 10], axis=1).astype(np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = self.np_random.uniform(-1, 1, self.num_envs)
        self.age = np.zeros(self.num_envs, int)
        self.done = np.zeros(self.num_envs, bool)
        Drift.steps = 0
        return self.observe(), {}

    def step(self, actions):
        resets = self.done
        # Drawn for every environment, so that absurd and sane ones share their random numbers.
        fresh = self.np_random.uniform(-1, 1, self.num_envs)
        self.state = np.where(resets, fresh, self.state + 0.2 * actions - 0.1)
        self.age = np.where(resets, 0, self.age + 1)
        rewards = np.where(resets, 0.0, self.state)
        self.done = ~resets & (self.age >= 3 + np.arange(self.num_envs))
        even = np.arange(self.num_envs) % 2 == 0
        Drift.steps += int((~resets).sum())
        obs = self.observe()
        if self.absurd:
            rewards[resets] = np.nan
            obs[self.done & even] = np.nan
        return obs, rewards, self.done & even, self.done & ~even, {"episode": self.age}


def register(name, entry_point, **kwargs):
    gymnasium.register(f"{name}-v0", entry_point, **kwargs)


class OwnSpace(gymnasium.Space):
    """A space of somebody's own; Gymnasium knows nothing of it."""

    def sample(self, **_):
        return 1

    def contains(self, x):
        return x == 1

    def __repr__(self):
        return "OwnSpace()"


image = Box(0, 255, (4, 4, 3), np.uint8)
register("OneStateTruncated", OneState, max_episode_steps=10)
register("OneStateTerminated", OneState, kwargs={"terminate_after": 4})
dictionary = Dict({"image": image, "speed": Box(-1, 1, (2,)), "gear": Discrete(3)})
graph = Graph(node_space=Box(0, 1, (2,)), edge_space=None)
small, unbounded = Box(-0.1, 0.2, (3,), np.float64), Box(-np.inf, np.inf, (2,))
SPACES = {
    "StartAtThree": (Discrete(4), Discrete(3, start=3)),
    "NegativeStart": (image, Discrete(2, start=-1)),
    "StartAtOne": (image, Discrete(3, start=1)),
    "Int32Action": (image, Discrete(3, dtype=np.int32)),
    "NoAction": (image, Box(-1, 1, (0,))),
    "MatrixAction": (image, Box(-0.1, 0.2, (2, 3))),
    "ScalarAction": (image, Box(-0.1, 0.2, ())),
    "Float64": (small, small),
    "DictObservation": (dictionary, Discrete(2)),
    "MultiDiscreteAction": (image, MultiDiscrete([2, 2])),
    "IntegerBox": (image, Box(0, 5, (2,), np.int64)),
    "GraphObservation": (graph, Discrete(2)),
    "OverwritesAction": (unbounded, unbounded),
    "SequenceObservation": (Sequence(Box(0, 1, (2,))), Discrete(2)),
    "OwnObservation": (OwnSpace((), np.int64), Discrete(2)),
    "OwnInDict": (Dict({"own": OwnSpace((), np.int64), "image": image}), Discrete(2)),
    "OwnAction": (image, OwnSpace((), np.int64)),
}
for name, (observations, actions) in SPACES.items():
    kind = OverwritesAction if name == "OverwritesAction" else AnySpaces
    register(name, kind, kwargs={"observation_space": observations, "action_space": actions})
register("Drift", None, vector_entry_point=Drift)
register("AbsurdDrift", None, vector_entry_point=Drift, kwargs={"absurd": True})
same_step = {"autoreset_mode": AutoresetMode.SAME_STEP}
register("SameStep", None, vector_entry_point=Drift, kwargs={"metadata": same_step})
register("NoMode", None, vector_entry_point=Drift, kwargs={"metadata": {}})


class Delayed(VectorEnv):
    """Six steps; each pays noise of deviation 1, and the last also the first action, 0 or 1."""

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}
    single_observation_space, single_action_space = Box(0.0, 6.0, (1,)), Discrete(2)

    def __init__(self, num_envs=1, **_):
        self.num_envs = num_envs
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def observe(self):
        return np.full((self.num_envs, 1), self.age, np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.age = 0
        return self.observe(), {}

    def step(self, actions):
        resets = self.age == 6
        self.age = 0 if resets else self.age + 1
        rewards = self.np_random.standard_normal(self.num_envs) * (not resets)
        if self.age == 1:
            self.first_actions = actions
        if self.age == 6:
            rewards += self.first_actions
        return (
            self.observe(),
            rewards,
            np.full(self.num_envs, self.age == 6),
            np.zeros(self.num_envs, bool),
            {},
        )


register("Delayed", None, vector_entry_point=Delayed)
register("OneStateEndless", OneState)


class Faulty(gymnasium.Env):
    """Episodes of 10 steps; does what `fault` says from its 50th step on, or in its first reset."""

    observation_space, action_space = Box(-1.0, 1.0, (3,)), Discrete(2)
    OBSERVATIONS = {
        "nan": np.array([0, np.nan, 0], np.float32),
        "infinite": np.array([0, 0, -np.inf], np.float32),
        "huge": np.full(3, 1e39),  # too large for float32
    }
    REWARDS = {"nan reward": np.nan, "infinite reward": np.inf, "huge reward": 1e200}

    def __init__(self, fault):
        self.fault, self.steps = fault, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if self.fault == "reset raises":
            raise KeyError("no such level")
        return np.zeros(3, np.float32), {}

    def step(self, action):
        self.steps += 1
        fault = self.fault if self.steps >= 50 else None
        if fault == "raises":
            raise ZeroDivisionError("the physics exploded")
        if fault == "dies":
            os._exit(7)
        obs = self.OBSERVATIONS.get(fault, np.zeros(3, np.float32))
        return obs, self.REWARDS.get(fault, 1.0), False, self.steps % 10 == 0, {}


for fault in (*Faulty.OBSERVATIONS, *Faulty.REWARDS, "reset raises", "raises", "dies"):
    register(f"Faulty-{fault.replace(' ', '-')}", Faulty, kwargs={"fault": fault})


class Seeds(OneState):
    """Notes the seeds with which it is reset."""

    seen = []

    def reset(self, *, seed=None, options=None):
        Seeds.seen.append(seed)
        return super().reset(seed=seed)


register("Seeds", Seeds, max_episode_steps=10)


class Restive(OneState):
    """Draws from torch's generator in its resets; its rewards count those since it was seeded."""

    resets = 0

    def reset(self, *, seed=None, options=None):
        torch.rand(3)
        self.resets = 1 if seed is not None else self.resets + 1
        return super().reset(seed=seed)

    def step(self, action):
        obs, _, *rest = super().step(action)
        return obs, float(self.resets), *rest


register("Restive", Restive, max_episode_steps=30)


class OneRankFails(CartPoleEnv):
    """CartPole; its 50th step raises on rank 1, or kills rank 1 if no file `killed` is there."""

    def __init__(self, fault):
        super().__init__()
        self.fault, self.all_steps = fault, 0

    def step(self, action):
        self.all_steps += 1
        if self.all_steps == 50 and os.environ.get("RANK") == "1":
            if self.fault == "raises":
                raise ZeroDivisionError("the physics of rank 1")
            if not os.path.exists("killed"):
                open("killed", "w").close()
                os.kill(os.getpid(), signal.SIGKILL)
        return super().step(action)


register("OneRankRaises", OneRankFails, kwargs={"fault": "raises"})
register("OneRankIsKilled", OneRankFails, kwargs={"fault": "killed"})


class RankPays(OneState):
    """Each step pays the rank of the process, under torchrun."""

    def step(self, action):
        obs, _, *rest = super().step(action)
        return obs, float(os.environ.get("RANK", 0)), *rest


register("RankPays", RankPays, max_episode_steps=10)


class Target(OneState):
    """Notes and checks its actions; each costs the distance to 30 % of the range, over the range.

    Components that lack a bound cost nothing.
    """

    seen = []

    def __init__(self, box):
        super().__init__()
        self.action_space, self.bounded = box, np.isfinite(box.high - box.low)

    def step(self, action):
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        assert action.dtype == self.action_space.dtype
        Target.seen.append(action.copy())
        obs, _, *rest = super().step(action)
        bounds = self.action_space.low, self.action_space.high
        action, low, high = (x[self.bounded] for x in (action, *bounds))
        return obs, -float(np.abs((action - low) / (high - low) - 0.3).sum()), *rest


boxes = {"100To200": Box(100, 200, (1,)), "To1000": Box(0, 1000, (1,)), "Tiny": Box(-0.01, 0.01)}
low, high = np.array([-5, -5, -np.inf, -np.inf]), np.array([15, np.inf, 5, np.inf])
boxes["Mixed"] = Box(low.astype(np.float32), high.astype(np.float32))
for name, box in boxes.items():
    register(f"Target{name}", Target, max_episode_steps=10, kwargs={"box": box})
register("Target", Target, max_episode_steps=10)  # takes its box from who makes it


class LastMovePays(OneState):
    """Of 400 steps the last pays, 1 or 2, as its action says; the observation tells the last."""

    observation_space = Box(0, 1, (1,))

    def reset(self, *, seed=None, options=None):
        obs, info = super().reset(seed=seed)
        return 0 * obs, info

    def step(self, action):
        obs, _, _, *rest = super().step(action)
        is_over = self.steps == 400
        return (self.steps == 399) * obs, is_over * (1.0 + action), is_over, *rest


register("LastMovePays", LastMovePays)


class Informs(OneState):
    """OneState with things to say in `info`, at resets and at steps; they differ by environment."""

    def __init__(self, what):
        super().__init__()
        self.what, self.all_steps = what, 0

    def info(self):
        self.all_steps += 1
        number = int(self.np_random.integers(1, 4))
        return {
            "episode": {"episode": self.all_steps},
            "winner": {"winner": 1 if number == 1 else None},
            "lengths": {"visited": np.arange(number)},
            "recorded": {},
        }[self.what]

    def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed)[0], self.info()

    def step(self, action):
        *rest, _ = super().step(action)
        return *rest, self.info()


def informs(what):
    env = gymnasium.wrappers.TimeLimit(Informs(what), 10)
    return gymnasium.wrappers.RecordEpisodeStatistics(env) if what == "recorded" else env


for what in ("episode", "winner", "lengths", "recorded"):
    register(f"Informs-{what}", informs, kwargs={"what": what})
register("InformsNothing", OneState, max_episode_steps=10)


class SmallSeeds(OneState):
    """Takes seeds of 31 bits, as much of what is written in C does."""

    def reset(self, *, seed=None, options=None):
        assert seed is None or seed < 2**31
        return super().reset(seed=seed)


register("SmallSeeds", SmallSeeds, max_episode_steps=10)


class Pays(OneState):
    """Pays the action 1 so much, and the action 0 nothing."""

    def __init__(self, reward):
        super().__init__()
        self.reward = reward

    def step(self, action):
        obs, _, *rest = super().step(action)
        return obs, self.reward * float(action), *rest


register("PaysNothing", Pays, max_episode_steps=10, kwargs={"reward": 0.0})
register("PaysOne", Pays, max_episode_steps=10, kwargs={"reward": 1.0})


class Far(gymnasium.Env):
    """Observes `offset` + x, and x, which is −1 or +1; pays x for the action 1, else −x."""

    observation_space, action_space = Box(-np.inf, np.inf, (2,), np.float64), Discrete(2)

    def __init__(self, offset):
        self.offset = offset

    def observe(self):
        self.x = self.np_random.choice([-1.0, 1.0])
        return np.array([self.offset + self.x, self.x])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observe(), {}

    def step(self, action):
        reward = self.x if action == 1 else -self.x
        return self.observe(), reward, False, False, {}


register("Far1e6", Far, max_episode_steps=20, kwargs={"offset": 1e6})
register("Far1e9", Far, max_episode_steps=20, kwargs={"offset": 1e9})
gymnasium.register("ns/Env-v0", OneState, max_episode_steps=10)


class NeedsLevel(OneState):
    """Cannot be made without an argument."""

    def __init__(self, level):
        super().__init__()


register("NeedsLevel", NeedsLevel)
