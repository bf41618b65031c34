"""Small environments whose right answers are known; `--env toys:Drift-v0` imports this module."""

import os
import signal

import gymnasium
import numpy as np
import torch
from gymnasium.envs.classic_control import CartPoleEnv
from gymnasium.spaces import Box, Dict, Discrete, Graph, MultiDiscrete
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space


class OneState(gymnasium.Env):
    """One state, two actions that change nothing, reward 1; ends after `terminate_after` steps, if at all."""

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
    """A vector environment that resets on the next step and, if `absurd`, fills whatever nobody may read with nonsense.

    Environment n ends episodes after 3 + n steps, by termination where n is even, by truncation where it is odd. The
    state drifts by −0.1 or +0.1; the reward is the state. `steps` counts the real steps taken.
    """

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}
    steps = 0

    def __init__(self, num_envs=1, absurd=False, metadata=metadata, **_):
        self.num_envs, self.absurd, self.metadata = num_envs, absurd, metadata
        self.single_observation_space, self.single_action_space = Box(-np.inf, np.inf, (2,)), Discrete(2)
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
            rewards[resets] = 1e9
            obs[self.done & even] = -1e6  # the last observation of a terminated episode
        return obs, rewards, self.done & even, self.done & ~even, {}


def register(name, entry_point, **kwargs):
    gymnasium.register(f"{name}-v0", entry_point, **kwargs)


image = Box(0, 255, (4, 4, 3), np.uint8)
register("OneStateTruncated", OneState, max_episode_steps=10)
register("OneStateTerminated", OneState, kwargs={"terminate_after": 4})
register("StartAtThree", AnySpaces, kwargs={"observation_space": Discrete(4), "action_space": Discrete(3, start=3)})
register("NegativeStart", AnySpaces, kwargs={"observation_space": image, "action_space": Discrete(2, start=-1)})
register("MatrixAction", AnySpaces, kwargs={"observation_space": image, "action_space": Box(-0.1, 0.2, (2, 3))})
register("ScalarAction", AnySpaces, kwargs={"observation_space": image, "action_space": Box(-0.1, 0.2, ())})
register(
    "Float64", AnySpaces, kwargs={k: Box(-0.1, 0.2, (3,), np.float64) for k in ("observation_space", "action_space")}
)
dictionary = Dict({"image": image, "speed": Box(-1, 1, (2,)), "gear": Discrete(3)})
register("DictObservation", AnySpaces, kwargs={"observation_space": dictionary, "action_space": Discrete(2)})
register("Drift", None, vector_entry_point=Drift)
register("AbsurdDrift", None, vector_entry_point=Drift, kwargs={"absurd": True})
same_step = {"autoreset_mode": AutoresetMode.SAME_STEP}
register("SameStep", None, vector_entry_point=Drift, kwargs={"metadata": same_step})
register("NoMode", None, vector_entry_point=Drift, kwargs={"metadata": {}})
register("Three", None, vector_entry_point=Drift, kwargs={"num_envs": 3})
unbounded = Box(-np.inf, np.inf, (2,))
register("OverwritesAction", OverwritesAction, kwargs={"observation_space": unbounded, "action_space": unbounded})
register("MultiDiscreteAction", AnySpaces, kwargs={"observation_space": image, "action_space": MultiDiscrete([2, 2])})
register("IntegerBox", AnySpaces, kwargs={"observation_space": image, "action_space": Box(0, 5, (2,), np.int64)})
graph = Graph(node_space=Box(0, 1, (2,)), edge_space=None)
register("GraphObservation", AnySpaces, kwargs={"observation_space": graph, "action_space": Discrete(2)})


class Delayed(VectorEnv):
    """Six steps; each pays noise of standard deviation 1, and the last one also what the first action chose: 0 or 1."""

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
        return self.observe(), rewards, np.full(self.num_envs, self.age == 6), np.zeros(self.num_envs, bool), {}


register("Delayed", None, vector_entry_point=Delayed)
register("OneStateEndless", OneState)


class Faulty(gymnasium.Env):
    """Episodes of 10 steps; from its 50th step on, or in its first reset, it does what `fault` says."""

    observation_space, action_space = Box(-1.0, 1.0, (3,)), Discrete(2)
    OBSERVATIONS = {
        "nan": np.array([0, np.nan, 0], np.float32),
        "infinite": np.array([0, 0, -np.inf], np.float32),
        "huge": np.full(3, 1e39),
        "long": np.zeros(4, np.float32),
        "short": np.zeros(1, np.float32),
        "complex": np.full(3, 1j),
        "text": np.array(["a", "b", "c"]),
        "none": None,
    }
    REWARDS = {"nan reward": np.nan, "infinite reward": np.inf, "two rewards": np.ones(2), "text reward": "x"}

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
            raise ZeroDivisionError("the physics\nexploded")
        if fault == "dies":
            os._exit(7)
        obs = self.OBSERVATIONS.get(fault, np.zeros(3, np.float32))
        result = obs, self.REWARDS.get(fault, 1.0), False, self.steps % 10 == 0, {}
        return result[:4] if fault == "four values" else result


class FaultyVector(Drift):
    """A vector environment whose step gives one array of another shape or dtype."""

    def __init__(self, num_envs=1, fault=None, **_):
        super().__init__(num_envs)
        self.fault = fault

    def step(self, actions):
        obs, rewards, terminations, truncations, infos = super().step(actions)
        if self.fault == "column of rewards":
            rewards = rewards[:, None]
        if self.fault == "one observation":
            obs = obs[0]
        if self.fault == "complex rewards":
            rewards = rewards * 1j
        return obs, rewards, terminations, truncations, infos


FAULTS = [*Faulty.OBSERVATIONS, *Faulty.REWARDS, "reset raises", "raises", "dies", "four values"]
for fault in FAULTS:
    register(f"Faulty-{fault.replace(' ', '-')}", Faulty, kwargs={"fault": fault})
for fault in ("column of rewards", "one observation", "complex rewards"):
    register(f"Faulty-{fault.replace(' ', '-')}", None, vector_entry_point=FaultyVector, kwargs={"fault": fault})


class Restless(OneState):
    """Has randomness of its own, which no seed reaches."""

    observation_space = Box(0.0, 1.0, (1,))

    def step(self, action):
        obs, *rest = super().step(action)
        return obs * np.float32(np.random.default_rng().random()), *rest


class Seeds(OneState):
    """Notes the seeds with which it is reset."""

    seen = []

    def reset(self, *, seed=None, options=None):
        Seeds.seen.append(seed)
        return super().reset(seed=seed)


register("Restless", Restless, max_episode_steps=10)
register("Seeds", Seeds, max_episode_steps=10)


class Restive(OneState):
    """Draws from torch's generator in its resets, and its rewards count those since it was seeded."""

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
    """CartPole; in its 50th step it raises on rank 1, or kills rank 1 if there is no file `killed` yet."""

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
