"""GGUF files of a run: their disk space, and a Modelfile of Ollama for them."""

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from ..base.errors import UserError
from ..base.files import free_bytes, write_atomically
from ..base.hub import importing_axolotl
from ..base.terminal import say
from ..config import models
from .card import Card
from .run_result import RunResult

if TYPE_CHECKING:
    from ..training.tokens import PromptText
    from ..training.validation import GgufTools

_OVERHEAD = 1.5  # bits a weight of the scales, and of layers that keep more bits than the type's name says
_QUOTES = '"""'  # of a Modelfile; nothing inside is escaped
_MODELFILE = '''\
FROM ./{file}
TEMPLATE """{template}"""
PARAMETER num_ctx {context}
PARAMETER num_predict {decoding.max_new_tokens}
PARAMETER temperature {temperature}
PARAMETER top_p {decoding.top_p}
PARAMETER top_k {decoding.top_k}
PARAMETER repeat_penalty 1
'''  # Ollama takes none of these from a GGUF file, and its own defaults sample with a penalty


def require_space(result: RunResult, tools: "GgufTools") -> None:
    """Check that the disk of a run has space for the merged model and the GGUF files.

    If the base model is not on this machine, its size is unknown and the check does nothing.

    Raises:
        UserError: the space is missing.
    """
    bits = 32.0  # of the merged model and the f16 file
    for name in tools.types:
        bits += int(re.findall(r"\d+", name)[0]) + _OVERHEAD
    needed = models.weights_bytes(models.folder_of(result.config)) * bits / 16 / 1e9
    free = free_bytes(result.folder.output) / 1e9
    if free < needed:
        problem = f"{free:.1f} GB free, but the merged model and its GGUF files need {needed:.1f} GB"
        raise UserError(problem, file=result.folder.output, remedy="delete other files there, or give fewer types")


def write_modelfile(result: RunResult, file: Path, exact: Path) -> list[Path]:
    """Write a Modelfile beside a GGUF file, and log how to compare the exact file of 16 bits.

    Returns:
        The Modelfile; nothing if Ollama cannot give the prompts of the run.
    """
    card, output = Card(result, merged=True, repository="."), result.folder.output
    decoding, modelfile = card.decoding, file.with_name("Modelfile")
    context = int(result.config.get("sequence_len") or 0) + decoding.max_new_tokens
    alias = shlex.quote(exact.stem)
    say(f"to serve f16: llama-server -m {shlex.quote(str(exact))} --alias {alias} -np 4 -c {4 * context}")
    say(f"to compare it: recipe evaluate {result.folder.quoted} --engine http://localhost:8080 --served-model {alias}")
    with importing_axolotl(offline=True):
        from ..training.tokens import prompt_text

        prompt = prompt_text(result.config, output, card.constant_fields)
    template = prompt and ollama_template(prompt)
    if not (prompt and template):
        say(f"{file.parent}: no Modelfile, because no TEMPLATE of Ollama gives the prompts of this run")
        return []
    temperature = decoding.temperature if decoding.do_sample else 0
    text = _MODELFILE.format(
        file=file.name, template=template, decoding=decoding, temperature=temperature, context=context
    )
    text += "".join(f"PARAMETER stop {_QUOTES}{stop}{_QUOTES}\n" for stop in prompt.ends)
    write_atomically(modelfile, text)
    say(f"to chat: ollama create {file.stem} -f {shlex.quote(str(modelfile))}; ollama run {file.stem}")
    return [modelfile]


def ollama_template(prompt: "PromptText") -> str | None:
    """Go template of Ollama for a prompt; None if Ollama lacks variables for its fields, or cannot quote it.

    The last field is what a user types. Ollama fills a field before it with the system prompt.
    """
    variables = ["System", "Prompt"][-len(prompt.fields) :]
    if len(prompt.fields) != len(variables) or _QUOTES in "".join([prompt.text, "\n", *prompt.ends]):
        return None
    template = prompt.text.replace("{{", '{{ "{{" }}')
    for field, variable in zip(prompt.fields, variables, strict=True):
        template = template.replace(f"{{{field}}}", f"{{{{ .{variable} }}}}")
    return template
