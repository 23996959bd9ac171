"""Random sequences of what people do with an optimizer never part from the plain one."""

import copy
import pickle

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch.nn import Parameter
from torch.optim import SGD, Adam, AdamW, RAdam, RMSprop

from optstate_wrap import ConfigurablePolicy, OptimizerWrapper, wrap

KINDS = {
    "Adam": lambda p: Adam(p, lr=1e-2, amsgrad=True),
    "AdamW": lambda p: AdamW(p, lr=1e-2, weight_decay=0.1),
    "SGD": lambda p: SGD(p, lr=1e-2, momentum=0.9),
    "RAdam": lambda p: RAdam(p, lr=1e-2),
    "RMSprop": lambda p: RMSprop(p, lr=1e-2, momentum=0.5),
}
SIZES = st.sampled_from([(), (3,), (17, 31), (600,)])


class Sequences(RuleBasedStateMachine):
    """A wrapped optimizer and a plain one, which everything is done to alike."""

    @initialize(
        kind=st.sampled_from(sorted(KINDS)),
        chunk=st.sampled_from([256, 300, 10_000]),
        store=st.sampled_from(["device", "host"]),
        dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    )
    def begin(self, kind, chunk, store, dtype) -> None:
        self.dtype, self.chunk, self.store, self.count = dtype, chunk, store, 0
        self.params = [[Parameter(t) for t in self.tensors(((17, 31), (5,)))] for _ in range(2)]
        self.ours, self.plain = [KINDS[kind](params) for params in self.params]
        self.wrapped()
        self.saved = None

    def tensors(self, shapes):
        generator = torch.Generator().manual_seed(len(shapes))
        return [torch.randn(shape, generator=generator).to(self.dtype) for shape in shapes]

    def wrapped(self) -> None:
        self.ours = wrap(self.ours, ConfigurablePolicy({}), self.chunk, store=self.store)

    @property
    def is_wrapped(self) -> bool:
        return isinstance(self.ours, OptimizerWrapper)

    @rule(missing=st.sets(st.integers(0, 4), max_size=2))
    def step(self, missing) -> None:
        self.count += 1
        generator = torch.Generator().manual_seed(self.count)
        for number, pair in enumerate(zip(*self.params, strict=True)):
            noise = torch.randn(pair[0].shape, generator=generator).to(self.dtype)
            for param in pair:
                param.grad = None if number in missing else noise.clone()
        self.ours.step()
        self.plain.step()

    @rule(lr=st.floats(1e-4, 1e-1))
    def change_lr(self, lr) -> None:
        for optimizer in (self.ours, self.plain):
            optimizer.param_groups[-1]["lr"] = lr

    @rule(shape=SIZES)
    def add_group(self, shape) -> None:
        if len(self.plain.param_groups) == 3:
            return
        for optimizer, params in zip((self.ours, self.plain), self.params, strict=True):
            params.append(Parameter(*self.tensors((shape,))))
            optimizer.add_param_group({"params": params[-1:], "lr": 3e-3})
        self.saved = None

    @rule(number=st.integers(0, 4), key=st.integers(0, 5), how=st.integers(0, 3))
    def write_state(self, number, key, how) -> None:
        """Somebody changes a value of a parameter's state, or puts one there."""
        for optimizer, params in zip((self.ours, self.plain), self.params, strict=True):
            param = params[number % len(params)]
            state = optimizer.state.get(param, {})
            keys = sorted(k for k, v in state.items() if torch.is_tensor(v))
            if not keys:
                return
            name = keys[key % len(keys)]
            if how == 0:
                state[name].mul_(0.5)
            elif how == 1:
                state[name] = state[name] * 0.25
            elif how == 2:
                state.setdefault("slow", torch.zeros_like(param)).add_(param.detach())
            else:
                del optimizer.state[param]

    @rule()
    def save(self) -> None:
        packed = self.is_wrapped and self.count % 2
        ours = self.ours.packed_state_dict() if packed else self.ours.state_dict()
        params = [[p.detach().clone() for p in params] for params in self.params]
        self.saved = copy.deepcopy((ours, self.plain.state_dict(), params, bool(packed)))

    @rule()
    def load(self) -> None:
        if not self.saved or (self.saved[3] and not self.is_wrapped):
            return
        # torch's own loading keeps the very step counts of what it loads, and counts on in them
        ours, plain, values, _ = copy.deepcopy(self.saved)
        self.ours.load_state_dict(ours)
        self.plain.load_state_dict(plain)
        for params, old in zip(self.params, values, strict=True):
            for param, value in zip(params, old, strict=True):
                param.data.copy_(value)

    @rule(swap=st.booleans())
    def exchange(self, swap) -> None:
        """Each loads what the other has saved."""
        ours, plain = copy.deepcopy((self.ours.state_dict(), self.plain.state_dict()))
        self.ours.load_state_dict(plain)
        if swap:
            self.plain.load_state_dict(ours)

    @rule(pickled=st.booleans())
    def copy(self, pickled) -> None:
        both = (self.ours, self.params[0])
        self.ours, self.params[0] = (
            pickle.loads(pickle.dumps(both)) if pickled else copy.deepcopy(both)
        )

    @rule()
    def wrap_or_unwrap(self) -> None:
        if self.is_wrapped:
            self.ours = self.ours.unwrap()
        else:
            self.wrapped()

    @invariant()
    def nothing_differs(self) -> None:
        if not hasattr(self, "plain"):
            return
        for ours, plain in zip(*self.params, strict=True):
            assert torch.equal(ours, plain)
            left, right = self.ours.state.get(ours, {}), self.plain.state.get(plain, {})
            assert left.keys() == right.keys()
            for key, value in left.items():
                if torch.is_tensor(value):
                    assert torch.equal(value, right[key]), key
                    assert value.dtype == right[key].dtype, key
                else:
                    assert value == right[key]
        rates = [[g["lr"] for g in o.param_groups] for o in (self.ours, self.plain)]
        assert rates[0] == rates[1]


THOROUGH = settings.get_current_profile_name() == "thorough"
Sequences.TestCase.settings = settings(
    max_examples=1000 if THOROUGH else 15,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestSequences = Sequences.TestCase
