"""What `recipe verify` can show: each line with its bound, what it needs, and what a failure means for a user."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from .bench import Bench
from .trainings import ENGINES, LAYERS, SHAPES, short

GPU = "needs a GPU"


@dataclass(frozen=True)
class Line:
    """A statement that a figure bears out or not.

    Attributes:
        name: its own, and that of its figure among those of the job.
        job: what measures it, see `jobs.JOBS`.
        what: what is compared with what.
        bound: see `verified.Outcome`.
        means: what a failure means for a user.
        unit: of the figure.
        lacks: why it cannot be shown on this machine; empty where it can.
    """

    name: str
    job: str
    what: str
    bound: float
    means: str
    unit: str = ""
    lacks: str = ""


def all_lines(bench: Bench) -> list[Line]:
    """Every line, in the order of their jobs."""
    return [
        *_of_training(bench),
        *_of_resume(),
        *_of_adapter(),
        *_of_numerics(bench),
        *_of_packing(bench),
        *_of_generation(bench),
        *_of_precision(bench),
        *_of_profiles(bench),
        *_of_shapes(bench),
        *_of_engines(bench),
    ]


def _of_training(bench: Bench) -> Iterator[Line]:
    line = partial(Line, job="training")
    yield line(
        name="trained parameters",
        what="LoRA's parameters, as PEFT counts them in Axolotl, and planned",
        bound=0,
        means="LoRA is on other layers than the recipe says, or `recipe plan` counts others",
    )
    yield line(
        name="weights in memory",
        what="the stand-in's weights and adapters before a step, and planned",
        # 0.0005 % off on a CPU: Axolotl keeps a few small tensors less than planned
        bound=0.001,
        unit="MiB",
        means="weights are not quantized as the recipe says, or `recipe plan` is wrong about what they take",
    )
    yield line(
        name="step, allocated",
        what="the peak of the stand-in's step through Axolotl, and planned",
        # on a CPU, storage by storage, 0.0003 % off; on a T4 at most 0.9 %, by 39 published runs of a plain loop
        bound=0.02 if bench.gpu else 0.001,
        unit="MiB",
        means="`recipe plan` and `recipe check` misjudge memory: a config that they let pass may run out of it",
    )
    yield line(
        name="adapter scale, in training",
        what="the factor of B A in Axolotl's process, and the recipe's lora_alpha / lora_r",
        bound=0,
        means="adapters train with another strength than the recipe states: results are not the recipe's",
    )


def _of_resume() -> Iterator[Line]:
    line = partial(Line, job="resume")
    yield line(
        name="resumed after step",
        what="the step that a training was broken off after, and resumed from",
        bound=0,
        means="`recipe resume` repeats or skips steps",
    )
    yield line(
        name="resumed losses",
        what="the largest difference of a loss or gradient norm from the undisturbed training's",
        bound=0,  # the same numbers are added in the same order
        means="a resumed training is not the one that was interrupted: do not compare its results with others'",
    )
    yield line(
        name="resumed adapter",
        what="values of the adapter that differ from the undisturbed training's",
        bound=0,
        means="a resumed training ends with another adapter: optimizer, schedule, scaler or random state is lost",
    )


def _of_adapter() -> Iterator[Line]:
    line = partial(Line, job="adapter")
    yield line(
        name="adapter scale, as saved",
        what="the factor of B A in the outputs of the saved adapter's layers, and the recipe's lora_alpha / lora_r",
        bound=1e-9,  # in fp64, over sums of thousands of products
        means="evaluations, and whoever loads a published adapter, get another model than was trained",
    )
    yield line(
        name="merged adapter",
        what="the largest difference of a logit once the adapter is merged, as a share of the largest logit",
        bound=1e-6,  # Llama's norms round to fp32, by 6e-8
        means="`recipe publish --merge` makes another model than base model and adapter together",
    )


def _of_numerics(bench: Bench) -> Iterator[Line]:
    line = partial(Line, job="numerics")
    pairs = (
        ("NF4", "through bitsandbytes' layers, and through plain layers of the weights that the format defines", ""),
        ("bf16", "in bf16, and in fp32", "" if bench.bf16 else "needs a processor, or a GPU, that computes in bf16"),
        ("NF4 on GPU and CPU", "of the same batch on the GPU, and on the CPU", "" if bench.gpu else GPU),
    )
    # NF4: fp32 rounds by 6e-8 in each of some 200 sums one after the other; GPUs add in another order than CPUs.
    # bf16: rounds by 4e-3, of which the mean over a few hundred tokens keeps little, and a norm more.
    bounds = {"NF4": (1e-5, 1e-4), "bf16": (0.01, 0.05), "NF4 on GPU and CPU": (1e-3, 1e-2)}
    means = {
        "NF4": "4-bit layers compute something else than their weights: losses and adapters are wrong",
        "bf16": "bf16 loses more than rounding here: train in fp16 or fp32",
        "NF4 on GPU and CPU": "bitsandbytes' kernels for this GPU and for CPUs disagree: rehearsals show another model",
    }
    for name, compared, lacks in pairs:
        for what, bound in zip(("loss", "gradient norm"), bounds[name], strict=True):
            yield line(
                name=f"{name}, {what}", what=f"the {what} {compared}", bound=bound, means=means[name], lacks=lacks
            )


def _of_generation(bench: Bench) -> Iterator[Line]:
    yield Line(
        job="generation",
        name="answers",
        what="how far the logit of any written token is below the best, in a pass without a cache",
        # nearly equal logits change places by rounding: in fp32 by 1e-5 of a logit of some 20, in fp16, which
        # rounds such logits to 1/64, by a few of these steps after 30 layers
        bound=0.25 if bench.gpu else 1e-3,
        means="`recipe evaluate` writes other answers than the model's: do not score them",
    )


def _of_packing(bench: Bench) -> Iterator[Line]:
    yield Line(
        name="packed rows, losses",
        job="numerics",
        what="the mean difference of a token's loss in rows that share a sequence from that in rows alone",
        # seen on a CPU: 1e-7 in fp32, 8e-4 in bf16, and 0.8 or more where rows see each other
        bound=0.01 if bench.gpu else 1e-5,
        means="packed rows see each other: do not train with `sample_packing`, or with the profile packed",
    )


def _of_profiles(bench: Bench) -> Iterator[Line]:
    yield Line(
        name="fast, losses",
        job="fast",
        what="the largest difference of a step's loss under the profile fast from that without, as a share",
        bound=0.01,  # other orders of adding, in half precision, as under an engine
        means="the profile fast changes more than rounding on this card: do not use it",
        lacks="" if bench.gpu else GPU,
    )
    for profile in ("fast", "packed"):
        yield Line(
            name=f"{profile}, tokens/s",
            job=profile,
            what=f"the share by which training under the profile {profile} is slower, of a model of {LAYERS} layers",
            bound=0.05,  # that much may be chance in a few steps
            means=f"the profile {profile} does not pay on this card",
            lacks="" if bench.gpu else GPU,
        )


def _of_precision(bench: Bench) -> Iterator[Line]:
    line = partial(Line, job="precision", lacks="" if bench.gpu else GPU)
    yield line(
        name="fp16 losses",
        what="the largest difference of a step's loss in fp16 from that in fp32, as a share",
        # fp16 rounds by 5e-4; a step that overflows leaves the adapter as it was, which a small rate hardly changes
        bound=0.02,
        means="training in fp16, as the study's recipes do, goes wrong on this GPU: set bf16: true where it has bf16",
    )
    if bench.bf16 or not bench.gpu:
        yield line(
            name="bf16 losses",
            what="the largest difference of a step's loss in bf16 from that in fp32, as a share",
            bound=0.02,  # bf16 rounds by 4e-3, of which the mean over a batch keeps a part
            means="training in bf16 goes wrong on this GPU",
        )
    yield line(
        name="fp16 steps that overflow",
        what="steps whose gradient is not finite, which the gradient scaler skips",
        bound=2,  # it begins with a factor of 65,536, and halves it each time
        means="the gradient scaler does not settle: steps are lost, and with them rows",
    )


def _of_shapes(bench: Bench) -> Iterator[Line]:
    for recipe in SHAPES[-1:] if bench.quick else SHAPES:
        name = short(recipe)
        line = partial(Line, job=f"shape:{recipe}", lacks="" if bench.gpu else GPU)
        yield line(
            name=f"{name}: allocated",
            what=f"the peak of {name}'s own step on random weights, by torch, and planned",
            bound=0.02,  # at most 0.9 % off in 39 published runs on a T4, of a simpler loop
            unit="MiB",
            means="`recipe plan` misjudges memory: a config that it lets pass may run out of it",
        )
        for what, source in (("reserved", "by torch's allocator"), ("in use, by the driver", "as nvidia-smi shows it")):
            yield line(
                name=f"{name}: {what}",
                what=f"the memory that {name}'s training takes {source}, and planned",
                bound=0.15,  # what is reserved was at most 14 % off in the same runs
                unit="MiB",
                means="`recipe check` lets configs pass that do not fit this GPU, or refuses some that do",
            )
        rate = "" if bench.gpu is None or bench.gpu.tflops else "the peak rate of this card is not listed"
        yield line(
            name=f"{name}: tokens/s",
            what=f"the speed of {name}'s training, and as `recipe plan` assumes it",
            bound=0.5,  # plans assume 30 % of a card's peak rate; with less than half or more than that half again
            means="times and costs of `recipe plan` are off by as much on this card until a run was measured",
            lacks=GPU if bench.gpu is None else rate,
        )


def _of_engines(bench: Bench) -> Iterator[Line]:
    for engine in ENGINES:
        yield Line(
            name=f"{engine} losses",
            job=f"engine:{engine}",
            what=f"the largest difference of a step's loss on two GPUs under {engine} from one GPU's, as a share",
            bound=0.01,  # other orders of adding, in half precision; as in tests/runs/test_engines.py
            means=f"`recipe run --profile {engine} --gpus 2` trains something else than one GPU does",
            lacks="" if bench.gpus >= 2 else "needs two GPUs",
        )
