"""Settings of predictions, their identity, and the engine that follows them."""

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel, FiniteFloat

from ..base.files import JsonObject, digest
from ..base.run_files import RunFile
from ..base.yamlfiles import Config
from ..data.studies import Decoding

BASE = "none"  # value of --adapter for the base model without an adapter
REFERENCE, VLLM, SERVER = "transformers", "vllm", "server"
COMPARED = 32  # number of rows in which an engine or a file is compared with the trained model
# Settings that describe the choice of rows, and the engine.
_SELECTION = ("data", "rows", "total_rows", "limit")
_ORIGIN = ("batch_tokens", "engine", "model", "agreement", "distance")


class Agreement(BaseModel):
    """Agreement of an engine with the reference engine, transformers.

    Attributes:
        rows: number of compared rows.
        equal: number of rows with equal answers.
    """

    rows: int
    equal: int

    def __str__(self) -> str:
        return f"{self.equal} of {self.rows} answers equal the reference's"


class ServedFile(BaseModel):
    """GGUF file that a llama.cpp server answers with.

    Attributes:
        name: name of the file.
        quantization: llama.cpp's name of the file's type, such as `Q4_K - Medium`; `unknown` from old servers.
        bits: bits per weight, over all tensors.
    """

    name: str
    quantization: str
    bits: FiniteFloat

    @property
    def is_quantized(self) -> bool:
        """True if weights have fewer than 16 bits."""
        return self.bits < 15.5

    def __str__(self) -> str:
        return f"{self.name} ({self.quantization}, {self.bits:.1f} bits)"


class Distance(BaseModel):
    """Distance of a served file from the trained model, on tokens of reference answers.

    The trained model's weights are the base model and adapter, merged by Axolotl. Merging rounds them.

    Attributes:
        rows: number of compared rows.
        tokens: number of compared tokens.
        kl: mean Kullback-Leibler divergence from the merged weights, in nats per token; a lower bound, see `llama.kl`.
        difference: mean absolute difference of the tokens' log-probabilities from the merged weights, in nats.
        loss: mean loss of the file per token.
        merged_loss: mean loss of the merged weights per token.
        trained_loss: mean loss of base model and adapter per token.
    """

    rows: int
    tokens: int
    kl: float
    difference: float
    loss: float
    merged_loss: float
    trained_loss: float

    def __str__(self) -> str:
        return (
            f"loss {self.losses} (adapter → merged → file), mean KL from the merged weights {self.kl:.4f} (a "
            f"quantized file is not refused for it), mean difference of log-probabilities {self.difference:.3f}, on "
            f"{self.tokens:,} tokens of {self.rows} rows"
        )

    @property
    def losses(self) -> str:
        """Losses of the adapter, of the merged weights and of the file."""
        return f"{self.trained_loss:.3f} → {self.merged_loss:.3f} → {self.loss:.3f}"


class EvaluationSettings(BaseModel):
    """Settings of predictions, without package versions.

    Attributes:
        data: file of the rows, or a description of several sources.
        data_sha256: hash of the file, or of the rows.
        rows: number of evaluated rows; 0 without predictions.
        total_rows: number of rows in the data.
        limit: maximum number of rows, if it left out rows of the data or of a benchmark.
        test_set: name of the study's test set with this content (`test` is the complete test set); None for other rows.
        batch_size: maximum number of rows in a batch; None lets the engine choose.
        batch_tokens: maximum number of tokens in a batch of the reference engine, set by free memory; None for other
            engines, and where `transformers_engine.FIXED` applies.
        built_with: further config keys that change predictions, with their values; see `evaluate.BUILT_WITH`.
        engine: `REFERENCE` (in this process), `VLLM` (a server started for the evaluation) or `SERVER` (a vLLM
            or llama.cpp server started by a user).
        model: name of the model on the server.
        agreement: agreement with the reference engine; None without a comparison.
        file: GGUF file that answers in place of base model and adapter; None for other engines.
        distance: distance of this file from the trained model; None without a comparison.
    """

    base_model: str
    adapter: str
    adapter_sha256: str | None
    data: str
    data_sha256: str
    test_set: str | None = None
    rows: int
    total_rows: int
    limit: int | None = None
    decoding: Decoding
    batch_size: int | None
    batch_tokens: int | None = None
    quantized: bool
    built_with: Config
    dtype: str
    engine: str = REFERENCE
    model: str | None = None
    agreement: Agreement | None = None
    file: ServedFile | None = None
    distance: Distance | None = None

    @property
    def data_name(self) -> str:
        """File name, or description, of the rows."""
        return Path(self.data).name if Path(self.data).is_absolute() else self.data

    @property
    def rows_in_words(self) -> str:
        if self.rows < self.total_rows:
            return f"{self.rows:,} of {self.total_rows:,} rows"
        return f"{self.rows:,} rows"

    @property
    def note(self) -> str | None:
        """Note on the engine; None for the reference engine."""
        if self.engine == REFERENCE:
            return None
        if self.file:
            return f"generated by {self.file}: {self.distance or 'not compared with the adapter'}"
        name = f" ({self.model})" if self.model else ""
        return f"generated by {self.engine}{name}: {self.agreement or 'not compared with the reference'}"

    def engine_stands_for(self, other: "EvaluationSettings") -> bool:
        """True if the engine of these predictions can stand in for that of `other`, which has the same `identity`.

        Predictions of the reference or of the requested engine always qualify. Those of another engine qualify if they
        were decoded greedily, and at least half of the compared answers equalled the reference engine's.
        """
        if self.engine == REFERENCE or (self.engine, self.model) == (other.engine, other.model):
            return True
        if self.agreement is None or self.decoding.do_sample:
            return False
        return 2 * self.agreement.equal >= self.agreement.rows

    def with_engine_of(self, other: "EvaluationSettings") -> "EvaluationSettings":
        """These settings with the engine and batches of others."""
        return self.model_copy(update={key: getattr(other, key) for key in ("batch_size", *_ORIGIN)})

    def identity(self) -> JsonObject:
        """Settings that determine a prediction, except the engine.

        Batches and engines change predictions only by rounding, see `engine_stands_for`.
        """
        return self.model_dump(exclude={"adapter", "test_set", "batch_size", *_SELECTION, *_ORIGIN})

    def differing_keys(self, other: "EvaluationSettings") -> list[str]:
        """Keys of `identity` that have another value in other settings."""
        identity = other.identity()
        return [key for key, value in self.identity().items() if value != identity[key]]

    def folder(self, run: Path) -> Path:
        """Folder for an evaluation with these settings, if they are not the default, in a run folder."""
        return run / RunFile.EVALUATIONS / digest(self.identity())[:12]


@dataclass
class Example:
    """Prompt and expected answer of a test row.

    Attributes:
        prompt: tokens of the prompt.
        reference: text of the answer.
        answer: tokens of the answer, with the token that ends it if training puts loss on it.
        messages: messages of the prompt, with `role` and `content`; None if the row is no chat, or calls tools.
    """

    prompt: list[int]
    reference: str
    answer: list[int]
    messages: list[JsonObject] | None = None


@dataclass(frozen=True)
class Completion:
    """Answer of a model, as stripped text without special tokens, and as tokens without padding."""

    text: str
    tokens: list[int]

    @classmethod
    def of(cls, tokenizer: Any, tokens: list[int]) -> "Completion":
        """Answer with these tokens."""
        return cls(str(tokenizer.decode(tokens, skip_special_tokens=True)).strip(), tokens)


def until_end(tokens: list[int], ends: Container[int]) -> list[int]:
    """Tokens of an answer up to the first that ends it, without padding."""
    for i, token in enumerate(tokens):
        if token in ends:
            return tokens[: i + 1]
    return tokens


class Engine(Protocol):
    """Loaded model of a run, ready to answer.

    Attributes:
        ends: tokens that end an answer.
        settings: decoding and other settings, read at each call of `generate`.
    """

    ends: list[int]
    settings: EvaluationSettings

    def check(self, examples: Sequence[Example], reference_runs_here: bool) -> Distance | None:
        """Check tokens and log-probabilities of the engine's own file before it answers, if it has one.

        Returns:
            Distance of the file from the trained model; None without a file, or if the reference does not run here.

        Raises:
            UserError: the file does not answer like the trained model.
            WorkFailed: the check cannot continue.
        """
        return None

    def generate(self, prompts: Sequence[list[int]], done: Container[int]) -> Iterator[dict[int, Completion]]:
        """Generate missing answers, in groups.

        Args:
            prompts: tokens of the prompts of all rows.
            done: positions in `prompts` that have an answer.

        Yields:
            Answers by position in `prompts`.

        Raises:
            WorkFailed: generation cannot continue; yielded answers are kept.
        """


def sampled[T](items: Sequence[T]) -> list[T]:
    """At most `COMPARED` items; they are evenly spaced, to cover all kinds of rows."""
    return [items[i] for i in sorted({i * len(items) // COMPARED for i in range(COMPARED)})]
