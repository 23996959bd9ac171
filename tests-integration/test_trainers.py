"""Hugging Face's Trainer, PEFT and TRL drive these optimizers as they drive torch's AdamW."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
import trl
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor, nn
from torch.optim import Optimizer

import lowbit_adam
import stochbf16
import turboadam
from optstate_codecs import CodedOptimizer, GradientRelease, offload, offloaded_class
from optstate_wrap import (
    ConfigurablePolicy,
    CPUOffloadOptimizer,
    OptimizerWrapper,
    WarmupPolicy,
    wrapped_class,
)

VOCABULARY, CONTEXT, STEPS = 61, 16, 6
#: every moment in float32: the steps of torch's AdamW, bit for bit
EXACT = {"formats": {"exp_avg": "fp32", "exp_avg_sq": "fp32"}}
LR = {"lr": 3e-3}

pytestmark = pytest.mark.filterwarnings("ignore")


def gpt2() -> nn.Module:
    """Two layers with random weights, always the same; the head is the embedding (tied)."""
    sizes = {"n_positions": CONTEXT, "n_embd": 32, "n_layer": 2, "n_head": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = transformers.GPT2Config(vocab_size=VOCABULARY, **sizes, **ends, **dropout)
    return seeded(lambda: transformers.GPT2LMHeadModel(config))


def llama() -> nn.Module:
    """Two layers with random weights, of RMS norms and without biases."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, max_position_embeddings=CONTEXT, pad_token_id=0, **sizes, **heads
    )
    return seeded(lambda: transformers.LlamaForCausalLM(config))


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def texts(count: int = 64) -> list[dict[str, Tensor]]:
    """Sequences that count upwards, from different starts: easy to learn."""
    rows = [torch.arange(i, i + CONTEXT) % VOCABULARY for i in range(count)]
    return [{"input_ids": row, "labels": row} for row in rows]


def trainer_of(folder: Path, model: nn.Module, *, given: Any = None, **options: Any) -> Any:
    """A Trainer of ``STEPS`` steps; ``given`` are its arguments about the optimizer."""
    args = transformers.TrainingArguments(
        output_dir=str(folder),
        **{
            "max_steps": STEPS,
            "per_device_train_batch_size": 4,
            "learning_rate": LR["lr"],
            "weight_decay": 0.1,
            "lr_scheduler_type": "linear",
            "warmup_steps": 2,
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "logging_steps": 1,
            "save_strategy": "no",
            **options,
        },
    )
    return transformers.Trainer(model, args, train_dataset=texts(), **(given or {}))


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trained(folder: Path, cls: Any, arguments: dict[str, Any], model: Any = gpt2, **more: Any):
    trainer = trainer_of(
        folder, model(), given={"optimizer_cls_and_kwargs": (cls, dict(arguments))}, **more
    )
    trainer.train()
    return trainer


def assert_equal_weights(ours: nn.Module, theirs: nn.Module) -> None:
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other), name


def assert_learns_alike(ours: Any, theirs: Any, within: float = 0.02, fall: float = 0.1) -> None:
    """The losses of two trainers stay together; the second's, of torch's AdamW, falls enough."""
    found, expected = losses(ours), losses(theirs)
    assert expected[-1] < expected[0] - fall
    for one, other in zip(found, expected, strict=True):
        assert abs(one - other) < within, (found, expected)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """What torch's AdamW learns, by model and options of the trainer."""
    found: dict[Any, Any] = {}

    def reference(model: Any = gpt2, **more: Any) -> Any:
        key = model, tuple(more.items())
        if key not in found:
            folder = tmp_path_factory.mktemp("reference")
            found[key] = trained(folder, torch.optim.AdamW, LR, model, **more)
        return found[key]

    return reference


def coded(params: Any, **arguments: Any) -> Optimizer:
    return lowbit_adam.AdamW8bit(params, **arguments)


EXACT_CLASSES = {
    "AdamW8bit": (lowbit_adam.AdamW8bit, EXACT),
    "AdamW8": (lowbit_adam.AdamW8, EXACT),
    "TurboAdam": (turboadam.TurboAdam, {"compress_m": False, "compress_v": False}),
    "offloaded": (offloaded_class(lowbit_adam.AdamW8bit, chunk_bytes=4096), EXACT),
    "wrapped": (wrapped_class(torch.optim.AdamW, ConfigurablePolicy({}), chunk_size=256), {}),
    "wrapped on the host": (
        wrapped_class(torch.optim.AdamW, ConfigurablePolicy({}), store="host"),
        {},
    ),
    "CPUOffloadOptimizer": (
        CPUOffloadOptimizer,
        # its default is torch's fused step, which differs from the reference's in last bits
        {"optimizer_class": torch.optim.AdamW, "foreach": False},
    ),
}
CODED_CLASSES = {
    "AdamW8bit": (lowbit_adam.AdamW8bit, {}),
    "AdamW4bit": (lowbit_adam.AdamW4bit, {}),
    "AdamWFp8": (lowbit_adam.AdamWFp8, {}),
    "TurboAdam": (turboadam.TurboAdam, {}),
    "offloaded": (offloaded_class(lowbit_adam.AdamW8bit, chunk_bytes=4096), {}),
    "wrapped": (
        wrapped_class(torch.optim.AdamW, WarmupPolicy(2, min_int8_elements=64), chunk_size=256),
        {},
    ),
}
exact_classes = pytest.mark.parametrize(
    ("cls", "arguments"), EXACT_CLASSES.values(), ids=EXACT_CLASSES
)
coded_classes = pytest.mark.parametrize(
    ("cls", "arguments"), CODED_CLASSES.values(), ids=CODED_CLASSES
)


class Released(transformers.TrainerCallback):
    """Steps during backward, as the how-to on the 8B model does it."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.release = GradientRelease(given["optimizer"].optimizer, bucket_bytes=1000)
        self.release.attach()

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.release.detach()


def test_gradients_are_released_in_the_trainer(reference: Any, tmp_path: Path) -> None:
    given = {"optimizer_cls_and_kwargs": (lowbit_adam.AdamW8bit, {**LR, **EXACT})}
    trainer = trainer_of(tmp_path, gpt2(), given=given, max_grad_norm=0)
    trainer.add_callback(Released())
    with pytest.raises(RuntimeError, match=r"trainer\.accelerator\.clip_grad_norm_ = lambda"):
        trainer.train()  # it computes the norm for its log

    trainer = trainer_of(tmp_path, gpt2(), given=given, max_grad_norm=0)
    trainer.add_callback(Released())
    trainer.accelerator.clip_grad_norm_ = lambda *args, **options: None
    trainer.train()
    assert_equal_weights(trainer.model, reference(max_grad_norm=0).model)


@pytest.mark.parametrize("model", [gpt2, llama])
@exact_classes
def test_trainer_makes_the_optimizer(model, cls, arguments, reference, tmp_path) -> None:
    ours, theirs = trained(tmp_path, cls, {**LR, **arguments}, model), reference(model)
    assert_equal_weights(ours.model, theirs.model)
    assert losses(ours) == losses(theirs)
    decays = [group["weight_decay"] for group in ours.optimizer.param_groups]
    assert decays == [0.1, 0.0]
    sizes = [[len(g["params"]) for g in t.optimizer.param_groups] for t in (ours, theirs)]
    assert sizes[0] == sizes[1]
    assert all(sizes[0])


@coded_classes
def test_trainer_learns_with_coded_state(cls, arguments, reference, tmp_path) -> None:
    assert_learns_alike(trained(tmp_path, cls, {**LR, **arguments}), reference())


@pytest.mark.parametrize("cls", [stochbf16.AdamW, lowbit_adam.AdamW8bit])
def test_trainer_learns_in_pure_bfloat16(cls, reference, tmp_path) -> None:
    own = {} if cls is stochbf16.AdamW else {"bf16_stochastic_round": True}
    ours = trained(tmp_path, cls, {**LR, **own}, lambda: gpt2().bfloat16())
    assert {p.dtype for p in ours.model.parameters()} == {torch.bfloat16}
    assert_learns_alike(ours, reference(), 0.05)


@pytest.mark.parametrize("name", ["offloaded", "wrapped"])
def test_factory_classes_take_numbers_as_text(name, reference, tmp_path) -> None:
    cls, arguments = EXACT_CLASSES[name]
    texts = {"lr": "3e-3", "betas": "0.9,0.999", "eps": "1e-8"}
    assert_equal_weights(trained(tmp_path, cls, {**arguments, **texts}).model, reference().model)


@pytest.mark.parametrize("name", ["AdamW8bit", "wrapped"])
def test_trainer_accumulates_and_clips(name, reference, tmp_path) -> None:
    more = {"gradient_accumulation_steps": 3, "max_grad_norm": 0.3}
    cls, arguments = EXACT_CLASSES[name]
    ours = trained(tmp_path, cls, {**LR, **arguments}, **more)
    assert_equal_weights(ours.model, reference(**more).model)
    cls, arguments = CODED_CLASSES[name]
    assert_learns_alike(trained(tmp_path, cls, {**LR, **arguments}, **more), reference(**more))


@pytest.mark.parametrize("kind", ["AdamW8bit", "offloaded", "wrapped"])
def test_trainer_takes_an_optimizer_and_a_scheduler(kind, tmp_path) -> None:
    def finished(make: Callable[[Any], Optimizer]) -> Any:
        model = gpt2()
        optimizer = make(model.parameters())
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=STEPS + 1)
        trainer = trainer_of(tmp_path, model, given={"optimizers": (optimizer, scheduler)})
        trainer.train()
        return trainer

    makers = {
        "AdamW8bit": lambda params: coded(params, **LR, **EXACT),
        "offloaded": lambda params: offload(coded(params, **LR, **EXACT)),
        "wrapped": lambda params: OptimizerWrapper(
            torch.optim.AdamW(params, **LR), ConfigurablePolicy({}), 256
        ),
    }
    ours, theirs = finished(makers[kind]), finished(lambda p: torch.optim.AdamW(p, **LR))
    assert_equal_weights(ours.model, theirs.model)
    rates = [
        [e["learning_rate"] for e in t.state.log_history if "loss" in e] for t in (ours, theirs)
    ]
    assert rates[0] == rates[1]
    assert len(set(rates[0])) == STEPS


@pytest.mark.parametrize("name", [name for name in CODED_CLASSES if name != "wrapped"])
def test_trainer_resumes_with_the_same_bits(name, tmp_path) -> None:
    """A checkpoint continues to the weights of a run that was never interrupted."""
    cls, arguments = CODED_CLASSES[name]
    given = {"optimizer_cls_and_kwargs": (cls, {**LR, **arguments})}
    saving = {"save_strategy": "steps", "save_steps": 3}
    whole = trainer_of(tmp_path, gpt2(), given=given, **saving)
    whole.train()
    resumed = trainer_of(tmp_path / "again", gpt2(), given=given)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.state.global_step == STEPS
    assert_equal_weights(resumed.model, whole.model)
    assert losses(resumed)[-3:] == losses(whole)[-3:]


def test_trainer_resumes_a_wrapped_optimizer(tmp_path) -> None:
    """Its state dict is decoded: with exact state the bits are the same, with coded state close."""
    saving = {"save_strategy": "steps", "save_steps": 3}
    for name, classes in (("wrapped", EXACT_CLASSES), ("wrapped", CODED_CLASSES)):
        cls, arguments = classes[name]
        given = {"optimizer_cls_and_kwargs": (cls, {**LR, **arguments})}
        whole = trainer_of(tmp_path / str(id(cls)), gpt2(), given=given, **saving)
        whole.train()
        resumed = trainer_of(tmp_path / "again", gpt2(), given=given)
        resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-3")
        if classes is EXACT_CLASSES:
            assert_equal_weights(resumed.model, whole.model)
        for ours, theirs in zip(losses(resumed)[-3:], losses(whole)[-3:], strict=True):
            assert abs(ours - theirs) < 1e-3


def with_lora(model: nn.Module) -> nn.Module:
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return seeded(lambda: peft.get_peft_model(model, config))


def lora() -> nn.Module:
    return with_lora(llama())


@pytest.mark.parametrize("name", EXACT_CLASSES)
def test_trainer_of_lora_steps_adapters_alone(name, reference, tmp_path) -> None:
    arguments = {"learning_rate": 3e-2}
    cls, own = EXACT_CLASSES[name]
    ours = trained(tmp_path, cls, {"lr": 3e-2, **own}, lora, **arguments)
    theirs = trained(tmp_path, torch.optim.AdamW, {"lr": 3e-2}, lora, **arguments)
    assert_equal_weights(ours.model, theirs.model)
    before = dict(lora().named_parameters())
    moved = {n for n, p in ours.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert all("lora_" in n for n in moved)


def loraplus(model: nn.Module, cls: Any, **arguments: Any) -> Optimizer:
    return create_loraplus_optimizer(
        model, cls, lr=1e-2, loraplus_lr_ratio=8.0, loraplus_weight_decay=0.1, **arguments
    )


@pytest.mark.parametrize("cls", [lowbit_adam.AdamW8, offloaded_class(lowbit_adam.AdamW8bit)])
def test_loraplus_takes_names_that_are_not_bitsandbytes(cls, tmp_path) -> None:
    def finished(cls: Any, **arguments: Any) -> Any:
        model = lora()
        optimizer = loraplus(model, cls, **arguments)
        trainer = trainer_of(tmp_path, model, given={"optimizers": (optimizer, None)})
        trainer.train()
        return trainer

    ours, theirs = finished(cls, **EXACT), finished(torch.optim.AdamW)
    assert_equal_weights(ours.model, theirs.model)
    assert isinstance(ours.optimizer.optimizer, CodedOptimizer)
    assert len({g["initial_lr"] for g in ours.optimizer.param_groups}) > 1


def test_loraplus_takes_adamw8bit_for_that_of_bitsandbytes(monkeypatch) -> None:
    """The reason for the other names: PEFT compares the class's name."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ModuleNotFoundError, match="bitsandbytes"):
        loraplus(lora(), lowbit_adam.AdamW8bit)


def tokenizer() -> Any:
    """Words t0, t1, ... of the vocabulary, made here."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="t0", pad_token="t1", unk_token="t0"
    )


@pytest.mark.parametrize("name", ["AdamW8bit", "offloaded", "wrapped"])
def test_sft_trainer_with_lora(name, tmp_path) -> None:
    from datasets import Dataset

    rows = [" ".join(f"t{(i + j) % VOCABULARY}" for j in range(CONTEXT - 1)) for i in range(32)]

    def finished(cls: Any, arguments: dict[str, Any]) -> Any:
        args = trl.SFTConfig(
            output_dir=str(tmp_path),
            max_steps=STEPS,
            per_device_train_batch_size=4,
            learning_rate=3e-2,
            max_length=CONTEXT,
            use_cpu=True,
            bf16=False,
            report_to="none",
            disable_tqdm=True,
            logging_steps=1,
            save_strategy="no",
        )
        trainer = seeded(
            lambda: trl.SFTTrainer(
                llama(),
                args,
                train_dataset=Dataset.from_dict({"text": rows}),
                processing_class=tokenizer(),
                peft_config=peft.LoraConfig(r=4, task_type="CAUSAL_LM"),
                optimizer_cls_and_kwargs=(cls, {"lr": 3e-2, **arguments}),
            )
        )
        trainer.train()
        return trainer

    expected = finished(torch.optim.AdamW, {})
    assert_equal_weights(finished(*EXACT_CLASSES[name]).model, expected.model)
    assert_learns_alike(finished(*CODED_CLASSES[name]), expected, 0.005, 0.0)


@pytest.fixture(autouse=True)
def restored_random_state() -> Iterator[None]:
    """Trainers seed torch's generator."""
    with torch.random.fork_rng(devices=[]):
        yield
