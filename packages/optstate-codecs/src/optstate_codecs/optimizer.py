"""The base optimizer: groups, state, validation, hooks and closures. No arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from optstate_codecs import checks, engine
from optstate_codecs.arguments import arguments_of, unknown_argument
from optstate_codecs.custom_op import call_step_op, register_step, traced_params
from optstate_codecs.engine.capture import capturing
from optstate_codecs.engine.request import ParamStep
from optstate_codecs.flat_params import check_not_gathered
from optstate_codecs.formats import Format, as_format
from optstate_codecs.gradients.centralization import centralization_means
from optstate_codecs.gradients.grad_norm import gradient_factor, nonfinite
from optstate_codecs.one_parameter import refuse_parts, step_one
from optstate_codecs.param_checks import check_formats, check_group_params
from optstate_codecs.parameters import ParameterTable
from optstate_codecs.plain import plain_value
from optstate_codecs.rounding_keys import check_random
from optstate_codecs.rules import Rule
from optstate_codecs.state import checkpoint
from optstate_codecs.state.building import counts_on_device
from optstate_codecs.state.checkpoint import StepCopy
from optstate_codecs.state.owner import OffloadOptions
from optstate_codecs.writes import WRITES

__all__ = ["CodedOptimizer"]

# by parameter index; None for those in ``param.grad``
GivenGrads = Mapping[int, Tensor] | None
# attributes that are pickled beside the rule, with values for those that an older pickle lacks
KEPT: dict[str, Any] = {"write": "nearest", "skip_nonfinite": False, "backend": "auto"}
KEPT |= {"max_grad_norm": None, "offloaded": None}


class CodedOptimizer(torch.optim.Optimizer):
    """An optimizer assembled from an update rule, a format per moment and a parameter write.

    A step is the exact rule (Adam, say) on decoded moments; only the rounding of stored moments
    and parameters differs. State is plain tensors in ``optimizer.state``.

    Args:
        params: tensors, ``named_parameters()``, or dicts of param groups.
        rule: the mathematics, e.g. ``optstate_codecs.rules.Adam(decoupled=True)``.
        formats: a format or its text for each of the rule's moments; can be set per group.
        write: "nearest"; "stochastic" for unbiased bfloat16 parameters; "split24" or "split32" to
            keep the rounding error of bfloat16 and float16 parameters, in 1 or 2 bytes each, so
            that both together hold a master weight of 24 or 32 bits (see ``master_weights``).
        backend: "auto", "eager", "compile" or "triton", see ``optstate_codecs.engine``; the
            environment variable OPTSTATE_BACKEND replaces "auto".
        rounding_seed: keys every random number, 0 to 2^63 - 1.
        rounding_key: int or text; tells optimizers apart whose parameters have no names.
        skip_nonfinite: skip the step when any gradient holds a NaN or Inf.
        max_grad_norm: above 0: step as after ``torch.nn.utils.clip_grad_norm_`` over all
            parameters, without rewriting gradients; None: do not clip.
        **options: the rule's hyper-parameters; ``centralization``, the share from 0 to 1 of its
            mean over all dimensions but the first that is subtracted from a gradient of two
            dimensions or more (Yong et al., arXiv:2004.01461); and the flags ``foreach``,
            ``fused``, ``capturable``, ``differentiable`` of ``torch.optim``.

    Numbers of other libraries, such as numpy scalars, are kept and saved as plain Python numbers.
    0-d tensors stay tensors.

    Attributes:
        max_grad_norm: as given; may be changed between steps.
        offloaded: how state is offloaded, see ``optstate_codecs.offload``; or None.
        grad_norm: norm of the last step's gradients before clipping, 0-d on their device; None
            without ``max_grad_norm``.

    Raises:
        TypeError, ValueError: an argument has a wrong type or value; the message names it.

    Examples:
        >>> formats = {"exp_avg": "bf16", "exp_avg_sq": "fp32"}
        >>> optimizer = CodedOptimizer(model.parameters(), Adam(), formats, lr=3e-4)
    """

    #: group keys that decide how state is stored; loading a checkpoint never changes them
    storage_options: ClassVar[tuple[str, ...]] = ("formats",)
    #: options besides the rule's hyper-parameters, with their defaults; the flags are torch.optim's
    shared_options: ClassVar[Mapping[str, Any]] = {
        "centralization": 0.0,
        "foreach": None,
        "capturable": False,
        "differentiable": False,
        "fused": None,
    }
    #: the class of the rule, which decides the hyper-parameters
    rule_type: ClassVar[type[Rule]] = Rule  # type: ignore[type-abstract]
    #: set while a ``GradientRelease`` steps parameters during backward
    steps_in_parts = False

    def __init__(
        self,
        params: Iterable[Any],
        rule: Rule,
        formats: Mapping[str, Format | str] | None = None,
        write: str = "nearest",
        *,
        backend: str = "auto",
        rounding_seed: int = 0,
        rounding_key: str | int | None = None,
        skip_nonfinite: bool = False,
        max_grad_norm: float | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(rule, self.rule_type):
            wanted, got = self.rule_type.__name__, type(rule).__name__
            raise TypeError(f"rule={rule!r}: must be an instance of {wanted}, got {got}")
        checks.one_of("write", write, WRITES)
        checks.one_of("backend", backend, engine.BACKENDS)
        rounding_seed = checks.whole_number("rounding_seed", rounding_seed)
        self.skip_nonfinite = checks.flag("skip_nonfinite", skip_nonfinite)
        if max_grad_norm is not None:
            max_grad_norm = checks.positive("max_grad_norm", max_grad_norm)
        self.rule, self.write, self.backend = rule, write, backend
        self.max_grad_norm = max_grad_norm
        self.offloaded: OffloadOptions | None = None
        self.executor: engine.Executor = engine.ResidentExecutor(backend)
        self._reset_caches()
        known = {**rule.defaults(), **self.shared_options, "rounding_seed": rounding_seed}
        known |= {} if rounding_key is None else {"rounding_key": rounding_key}
        if formats is not None and "formats" not in self.storage_options:
            options["formats"] = formats
        elif formats is not None:
            known["formats"] = {k: as_format(f).spec for k, f in formats.items()}
        storage = {key: options.pop(key) for key in self.storage_options if key in options}
        if unknown := sorted(set(options) - set(known)):
            raise unknown_argument(type(self), unknown[0], arguments_of(type(self), type(rule)))
        super().__init__(params, plain_value({**known, **storage, **options}))
        # under the name param_groups, torch.compile would guard on every value in the list
        self.traced_groups = self.param_groups

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether GradScaler passes grad_scale and found_inf to ``step`` and does not unscale."""
        return self.steps_in_parts or bool(self.defaults.get("fused"))

    @property
    def state(self) -> Any:
        """Each parameter's state as plain tensors; reading it waits until all of it is stored.

        It may be edited: a moment assigned in plain numbers under its own name is encoded at the
        next step or save. Keys that the optimizer does not know are kept and saved.
        """
        self.executor.synchronize()
        self._adopt_copies()
        return self.__dict__["state"]

    @state.setter
    def state(self, value: Any) -> None:
        self.__dict__["state"] = value

    @property
    def state_device(self) -> torch.device | None:
        """The device on which state is created and loaded; None: each parameter's."""
        return None if self.offloaded is None else torch.device("cpu")

    def _reset_caches(self) -> None:
        """Drop what was cached in earlier steps."""
        self.grad_norm: Tensor | None = None
        self._handle = register_step(self._traced_params, self._step)
        self._table = ParameterTable()
        self._copies: list[StepCopy] = []

    def _adopt_copies(self) -> None:
        """Adopt what was loaded in place into the last state dict."""
        if self._copies:
            copies, self._copies = self._copies, []
            checkpoint.adopt_copies(copies, self._table.forget)

    def group_formats(self, group: Mapping[str, Any]) -> dict[str, Format]:
        """The format of each moment of ``group``, in the rule's order."""
        given = group.get("formats", {})
        names = [moment.name for moment in self.rule.moments(self.rule.hyper(group))]
        if missing := [name for name in names if name not in given]:
            raise ValueError(f"formats: needs one for {missing[0]!r}; moments are {names}")
        return {name: as_format(given[name]) for name in names}

    def group_of(self, param: Tensor) -> dict[str, Any]:
        """The group that holds ``param``.

        Raises:
            KeyError: no group does.
        """
        for group in self.param_groups:
            if any(param is p for p in group["params"]):
                return group
        raise KeyError(f"param of shape {tuple(param.shape)}: not a parameter of this optimizer")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; an invalid one leaves the optimizer unchanged."""
        count = len(self.param_groups)
        super().add_param_group(param_group)
        try:
            self.check_group(self.param_groups[-1])
        except Exception:
            del self.param_groups[count:]
            raise

    def check_group(self, group: dict[str, Any]) -> None:
        """Raise unless ``group`` is valid; its hyper-parameters become plain Python values."""
        group.update({key: plain_value(group[key]) for key in self.defaults if key in group})
        hyper = self.rule.hyper(group)
        check_random(group)
        checks.share("centralization", group["centralization"])
        check_formats(self.rule.moments(hyper), self.group_formats(group))
        if group["differentiable"]:
            raise ValueError("differentiable=True: not supported; leave it False")
        check_group_params(group["params"], self.max_grad_norm)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step with the gradients in ``param.grad``.

        Args:
            closure: re-evaluates the model and returns the loss; called once, with gradients on.

        Returns:
            The closure's loss, or None.

        Raises:
            TypeError, ValueError: a gradient or hyper-parameter is unusable; nothing has changed.
            RuntimeError: a CUDA graph is being captured, and the step cannot be part of it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            call_step_op(self._handle, self.traced_groups)
        else:
            self._step()
        return loss

    def _traced_params(self) -> list[Tensor]:
        return traced_params(self.traced_groups, self.param_groups)

    def refuse_parts(self) -> None:
        """Raise if the step of one parameter depends on the gradients of others."""
        advice = "which takes it itself: GradientRelease(optimizer, max_grad_norm=...)"
        refuse_parts(self.skip_nonfinite, self.max_grad_norm, "GradientRelease", advice)

    @torch.no_grad()
    def step_part(
        self, params: Sequence[Tensor], factor: Tensor | None = None, last: bool = False
    ) -> None:
        """Step these parameters, with their gradients multiplied by ``factor``."""
        groups = self.param_groups
        given = {self._table.index_of(groups, p): p.grad for p in params if p.grad is not None}
        self._step(given, factor, last)

    def step_parameter(
        self, param: Tensor, group: dict[str, Any] | None = None, index: int | None = None
    ) -> None:
        """Step one parameter with its gradient, as ``step`` would, for instance during backward.

        Nothing happens without a gradient. Step hooks are not called.

        Args:
            param: one of the parameters.
            group: its param group; checked if given.
            index: its position in ``group``; checked if given.

        Raises:
            TypeError, ValueError, KeyError: an argument or the gradient is unusable, or
                ``max_grad_norm`` or ``skip_nonfinite`` needs all gradients; nothing has changed.
            RuntimeError: a ``GradientRelease`` is attached, which steps the parameter itself.
        """
        step_one(self, param, group, index)

    def join_parts(self) -> None:
        """Have the current CUDA stream wait for earlier ``step_part`` calls."""
        self.executor.join()

    def _step(
        self, given: GivenGrads = None, factor: Tensor | None = None, last: bool = True
    ) -> None:
        """Step with the gradients ``given`` by index, or with ``param.grad`` of all parameters.

        They are multiplied by ``factor``; ``last``: this completes the step.
        """
        try:
            request = self._request(given, factor)
            if request is not None:
                request.asynchronous = not last
                self.executor.step(request)
        except BaseException:
            self.executor.finish(False)
            raise
        if last:
            self.executor.finish()

    def _request(self, given: GivenGrads, factor: Tensor | None) -> engine.StepRequest | None:
        """The request for a step; None without gradients, or if non-finite ones are skipped."""
        self._opt_called = True
        self.traced_groups = self.param_groups
        if capturing() and not all(group["capturable"] for group in self.param_groups):
            raise RuntimeError("capturable=False: must be True for steps in a CUDA graph")
        self._adopt_copies()
        hypers = [self.rule.hyper(group) for group in self.param_groups]
        found = self._table.gradients(self.param_groups, given)
        grads = found.grads
        if not grads:
            return None
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if self.skip_nonfinite:
            found_inf = nonfinite(grads, found.params, found_inf)
            if not any(map(counts_on_device, self.param_groups)) and bool(found_inf):
                return None
        # not through the property, which would wait until all state is stored
        spec = self._table.state_spec(self, hypers, self.__dict__["state"])
        param_steps = self._table.cached_param_steps(found, spec)
        if factor is None:
            factor, self.grad_norm = gradient_factor(grads, scale, self.max_grad_norm, found.params)
        means = centralization_means(self.param_groups, found.groups, found.params, grads)
        columns = found.addresses, found.layouts
        request = engine.StepRequest(
            self.rule, param_steps, grads, hypers, *columns, factor, found_inf, means
        )
        if not param_steps[0].param.is_cuda:  # where there is nothing to choose
            request.total = engine.trainable(self.param_groups)
        return request

    def stored_param_steps(self, params: Collection[Tensor] | None = None) -> list[ParamStep]:
        """The ``ParamStep`` of each parameter that has state, in order; or of those in ``params``.

        State that was assigned by hand is converted to the optimizer's formats first.

        Raises:
            TypeError, ValueError, RuntimeError, KeyError: state cannot be converted; the message
                names it.
        """
        return self._table.stored(self, self.__dict__["state"], params)

    def state_dict(self) -> dict[str, Any]:
        """The packed state: tensors and plain Python values, about as large as the state.

        It is ``torch.optim``'s layout with each group's formats added, and loads with
        ``torch.load(weights_only=True)``. Tensors may be loaded in place
        (``torch.distributed.checkpoint.load``) until the next step.

        Raises:
            RuntimeError: FSDP1 asks for it to gather it, and only decoded state can be gathered.
        """
        check_not_gathered(self)
        self.stored_param_steps()
        saved, self._copies = checkpoint.packed(self, super().state_dict())
        return saved

    def full_state_dict(self) -> dict[str, Any]:
        """The state decoded to float32, in the layout that ``torch.optim`` loads."""
        return checkpoint.full(self, super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a packed or full state dict, or that of the ``torch.optim`` class of the rule.

        State in other formats is converted to this optimizer's. Nothing in ``state_dict`` is
        aliased, and ``param_groups`` stay the same objects.

        Raises:
            TypeError, ValueError, KeyError: something does not fit; the message names it, and
                nothing has changed.
        """
        with torch.inference_mode(False), torch.no_grad():
            state_dict = dict(state_dict)
            for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
                state_dict = pre_hook(self, state_dict) or state_dict
            checkpoint.load(self, state_dict)
            for post_hook in self._optimizer_load_state_dict_post_hooks.values():
                post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: getattr(self, name) for name in ("rule", *KEPT)}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in KEPT.items():
            self.__dict__.setdefault(name, value)
        alive = "executor" in self.__dict__
        if alive:
            self.executor.synchronize()
        super().__setstate__(state)
        if not alive:
            self.executor = engine.ResidentExecutor(self.backend)
            if self.offloaded is not None:
                self.offloaded.again(self)
        self._reset_caches()
        self.traced_groups = self.param_groups
        for group in self.param_groups:
            group.update({**self.shared_options, **group})


# A learning rate scheduler wraps ``step`` to record that it was called, which breaks a compiler's
# graph. ``_request`` records it, and this tells the scheduler that wrapping is not needed.
CodedOptimizer.step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
