"""The studies on GSM8K, Tulu 3, OASST1 and Spider have the tokens and loss masks that their authors' code makes."""

import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import SHARED

from qlora_recipes.base import paths, yamlfiles
from qlora_recipes.base.hub import importing_axolotl
from qlora_recipes.config import substitution
from qlora_recipes.config.datafiles import DatasetRef
from qlora_recipes.data import studies
from qlora_recipes.data.raw_rows import RowMaker
from qlora_recipes.training.losses import MASKED

with importing_axolotl(offline=True):
    from qlora_recipes.training import preferences
    from qlora_recipes.training.tokens import Tokenizer, Tokens

FIRST = DatasetRef("datasets", 0, {})
ROWS = 500  # of GSM8K's 7,473 training rows, where they are here
TASK = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
LOFTQS_QUESTION = "\nAnswer the above question. First think step by step and then answer the final number.\n"


def rows() -> list[dict[str, str]]:
    files = [paths.RECIPES / "loftq-gsm8k/sample/train.jsonl", SHARED / "gsm8k/train.jsonl"]
    lines = [line for file in files if file.is_file() for line in file.read_text().splitlines()[:ROWS]]
    return [json.loads(line) for line in lines]


def tokenizer_of(name: str, model: Path) -> Tokenizer:
    config = yamlfiles.read_yaml(paths.RECIPES / f"{name}.yaml") | {"base_model": str(model)}
    for key in ("revision_of_model", "special_tokens", "bf16"):  # the model's own, and what a CPU may lack
        config.pop(key, None)
    return Tokenizer(config)


def ours(tokenizer: Tokenizer, rows: list[dict[str, str]], question: str, answer: str) -> list[Tokens]:
    """Rows as the recipe trains on them; question and answer are templates of the raw row's fields."""
    messages = [
        [{"role": "user", "content": question.format(**row)}, {"role": "assistant", "content": answer.format(**row)}]
        for row in rows
    ]
    return tokenizer.tokenize(FIRST, [{"messages": of_row} for of_row in messages])


def encoded(tokenizer: Any, text: str) -> list[int]:
    """A text as the authors' code tokenizes it for a Llama, whose tokenizer begins with BOS; SmolLM2's does not."""
    ids = list(tokenizer(text).input_ids)
    return ids if ids[0] == tokenizer.bos_token_id else [tokenizer.bos_token_id, *ids]


def check_row(row: Tokens, tokenizer: Any, question: str, answer: str) -> None:
    """A row is question, answer and EOS, tokenized as one, with loss on what is behind the question alone."""
    ids, masked = encoded(tokenizer, question + answer + tokenizer.eos_token), len(encoded(tokenizer, question))
    assert row.ids == ids
    assert row.labels == [MASKED] * masked + ids[masked:]


@pytest.mark.parametrize("family", ["llama-2-7b", "llama-3-8b"])
def test_loftqs_rows_have_the_authors_tokens_and_loss(family, sentencepiece):
    model = sentencepiece if family == "llama-2-7b" else substitution.model_folder()  # Llama 3's is BPE of bytes, too
    loaded = tokenizer_of(f"loftq-gsm8k/{family}-lora", model)
    raw = [row | {"answer": row["answer"].replace("####", "The final answer is: ")} for row in rows()]
    assert len(raw) >= 40
    for row, tokens in zip(raw, ours(loaded, raw, "{question}" + LOFTQS_QUESTION, "{answer}"), strict=True):
        check_row(tokens, loaded.tokenizer, row["question"] + LOFTQS_QUESTION, row["answer"])


def test_pefts_rows_have_the_authors_tokens_and_loss():
    loaded = tokenizer_of("peft-metamathqa/lora-rank32", substitution.model_folder())
    question = "Question: {question} Think step by step.\nAnswer:"
    for row, tokens in zip(rows(), ours(loaded, rows(), question, "{answer}"), strict=True):
        ids = encoded(loaded.tokenizer, question.format(**row) + row["answer"])
        assert tokens.ids == [*ids, loaded.tokenizer.eos_token_id]
        assert tokens.labels[1:] == tokens.ids[1:]  # no model predicts the first


CUT = 513  # tokens, where the recipes of QLoRA's study end a row
WORDS = ("rain", " two  spaces ", "Größe", "日本", "🙂", "", "x\n\ny", "User:", "\ttab", "don't", "<b>", "3.14", "\n")


def text_of(chance: random.Random) -> str:
    """A dialogue, in some cases longer than that."""
    return "### Human:" + "### Assistant:".join(
        " ".join(chance.choices(WORDS, k=chance.choice((3, 400)))) for _ in "ab"
    )


def test_qloras_rows_have_the_authors_tokens_and_loss(model):
    loaded = tokenizer_of("qlora-guanaco/llama-7b", model)
    tokenizer = loaded.tokenizer
    assert loaded.cfg.sequence_len == CUT
    assert loaded.cfg.excess_length_strategy == "truncate"
    segments = studies.find("qlora-guanaco").data.fields["segments"]
    expression = segments.replace("</s>", tokenizer.eos_token).replace("<s>", tokenizer.bos_token)
    texts = [text_of(random.Random(seed)) for seed in range(200)]
    maker = RowMaker({"segments": expression}, {}, {}, "0")
    tokenized = loaded.tokenize(FIRST, [maker.make({"text": text})[0] for text in texts])
    assert 0 < sum(len(row.ids) > CUT for row in tokenized) < len(tokenized)
    for text, row in zip(texts, tokenized, strict=True):
        limits: dict[str, Any] = {"truncation": True, "add_special_tokens": False}
        source = tokenizer(tokenizer.bos_token, max_length=16, **limits).input_ids
        target = tokenizer(text + tokenizer.eos_token, max_length=512, **limits).input_ids
        assert row.ids[:CUT] == source + target
        assert row.labels[:CUT] == [MASKED] * len(source) + target


def test_birbals_rows_have_the_authors_tokens_and_loss(model):
    loaded = tokenizer_of("birbal/mistral-7b-qlora", model)
    tokenizer = loaded.tokenizer
    segments = studies.find("birbal").data.fields["segments"]
    expression = segments.replace("</s>", tokenizer.eos_token).replace("<s>", tokenizer.bos_token)
    texts = [text_of(random.Random(seed)).partition("### Assistant:") for seed in range(200)]
    rows = [{"question": f"### Input:\n{text}\n\n### Response:\n", "answer": answer} for text, _, answer in texts]
    maker = RowMaker({"segments": expression}, {}, {}, "0")
    tokenized = loaded.tokenize(FIRST, [maker.make(row)[0] for row in rows])
    for row, tokens in zip(rows, tokenized, strict=True):
        prompt = encoded(tokenizer, row["question"])
        target = [*encoded(tokenizer, row["answer"])[1:], tokenizer.eos_token_id]
        assert tokens.ids == prompt + target
        assert tokens.labels == [MASKED] * len(prompt) + target


CHATML = (  # of OpenHermes 2.5's tokenizer
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def some_text(chance: random.Random) -> str:
    return " ".join(chance.choices(WORDS, k=chance.randint(1, 9)))


def test_neuralhermes_pairs_have_the_authors_texts_between_bos_and_eos(sentencepiece):
    loaded = tokenizer_of("neuralhermes-dpo/mistral-7b-qlora", sentencepiece)
    tokenizer = loaded.tokenizer
    write = partial(tokenizer.apply_chat_template, chat_template=CHATML, tokenize=False)
    pairs = []
    for seed in range(50):
        chance = random.Random(seed)
        texts = {name: some_text(chance) for name in ("question", "chosen", "rejected")}
        pairs.append(texts | {"system": chance.choice(("", some_text(chance)))})
    written = prepared("neuralhermes-dpo", "train", pairs)
    tokenized = preferences.tokenize(loaded.cfg, DatasetRef("datasets", 0, {}, "dpo"), tokenizer, written)
    for pair, texts, ids in zip(pairs, written, tokenized, strict=True):
        system = write([{"role": "system", "content": pair["system"]}]) if pair["system"] else ""
        prompt = system + write([{"role": "user", "content": pair["question"]}], add_generation_prompt=True)
        answers = {name: f"{pair[name]}<|im_end|>\n" for name in ("chosen", "rejected")}
        assert texts == {"prompt": prompt, **answers}
        for name, answer in (("chosen", ids.chosen), ("rejected", ids.rejected)):
            assert ids.prompt + answer == [*encoded(tokenizer, prompt + answers[name]), tokenizer.eos_token_id]


def chat(chance: random.Random) -> list[dict[str, str]]:
    """A chat with or without a system message, of one to four turns."""
    roles = ["system"] * chance.randint(0, 1) + ["user", "assistant"] * chance.randint(1, 4)
    return [{"role": role, "content": " ".join(chance.choices(WORDS, k=chance.randint(1, 9)))} for role in roles]


def test_tinkers_rows_have_the_authors_tokens_and_loss(model):
    loaded = tokenizer_of("tinker-tulu3/llama-3.2-1b-lora", model)
    fields = studies.find("tinker-tulu3").data.fields
    expressions = {name: text.replace("<|begin_of_text|>", loaded.tokenizer.bos_token) for name, text in fields.items()}
    assert expressions != fields
    chats = [chat(random.Random(seed)) for seed in range(200)]
    maker = RowMaker(expressions, {}, {}, "0")
    tokenized = loaded.tokenize(FIRST, [maker.make({"messages": messages})[0] for messages in chats])
    for messages, tokens in zip(chats, tokenized, strict=True):
        pieces = [(loaded.tokenizer.bos_token, False)]  # renderers/base.py and role_colon.py, each encoded alone
        for message in messages:
            answers = message is messages[-1]
            pieces += [(f"{message['role'].capitalize()}:", False), (f" {message['content']}\n\n", answers)]
        pieces.append(("User:", True))
        parts = [(loaded.tokenizer.encode(text, add_special_tokens=False), loss) for text, loss in pieces]
        assert tokens.ids == [token for ids, _ in parts for token in ids]
        assert tokens.labels == [token if loss else MASKED for ids, loss in parts for token in ids]
    joined = [loaded.tokenizer.encode("".join(text for text, _ in pieces), add_special_tokens=False)]
    assert joined != [tokenized[-1].ids]  # that they are cut apart is seen in the tokens


def raw_maths() -> list[dict[str, str]]:
    """GSM8K's rows in the form of MetaMathQA's, beside their own fields."""
    return [
        row | {"query": row["question"], "response": f"{row['answer']}\nThe answer is: {row['answer'].split()[-1]}"}
        for row in rows()[:200]
    ]


def prepared(name: str, split: str, raw: list[dict[str, Any]], **fields: str) -> list[dict[str, Any]]:
    """Rows as `recipe data prepare` makes them for a study, with other expressions for some fields."""
    data = studies.find(name).data
    maker = RowMaker(data.fields_of(split, next(iter(data.formats))) | fields, {}, {}, "0")
    return [maker.make(row)[0] for row in raw]


def test_pissas_rows_have_the_authors_tokens_and_a_newline_before_eos(sentencepiece):
    loaded = tokenizer_of("pissa-metamathqa/llama-2-7b-lora", sentencepiece)
    newline, eos = loaded.tokenizer.convert_tokens_to_ids("<0x0A>"), loaded.tokenizer.eos_token_id
    raw = raw_maths()
    trained = loaded.tokenize(FIRST, prepared("pissa-metamathqa", "train", raw))
    scored = loaded.tokenize(FIRST, prepared("pissa-metamathqa", "test", raw))
    for row, tokens, test in zip(raw, trained, scored, strict=True):
        source = f"{TASK}\n\n### Instruction:\n{row['query']}\n\n### Response:"
        check_row(tokens, loaded.tokenizer, source, f"{row['response']}\n")
        assert tokens.ids[-2:] == [newline, eos]
        assert test.ids[: test.labels.count(MASKED)] == encoded(loaded.tokenizer, source)


def test_loragas_rows_have_the_authors_tokens_and_loss(sentencepiece):
    loaded = tokenizer_of("loraga-metamathqa/llama-2-7b-lora", sentencepiece)
    raw = raw_maths()
    trained = loaded.tokenize(FIRST, prepared("loraga-metamathqa", "train", raw))
    scored = loaded.tokenize(FIRST, prepared("loraga-metamathqa", "test", raw))
    for row, tokens, test in zip(raw, trained, scored, strict=True):
        question = f"Q: {row['query']}\nA: "
        check_row(tokens, loaded.tokenizer, question, f" {row['answer']}")
        assert test.ids[: test.labels.count(MASKED)] == encoded(loaded.tokenizer, f"{question} ")


TERMINAL = "I want you to act as a SQL terminal in front of an example database, "
ONLY = "you need only to return the sql command to me.Below is an instruction that describes a task, "
WRITE = "Write a response that appropriately completes the request.\n"
SYSTEM = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)


def database(chance: random.Random, name: str) -> dict[str, Any]:
    """A schema of one to four tables, as in Spider's tables.json."""
    columns: list[list[Any]] = [[-1, "*"]]
    tables = [f"Table_{number}" for number in range(chance.randint(1, 4))]
    for number in range(len(tables)):
        columns += [[number, f"{chance.choice(('id', 'Full Name', 'größe', 'a(b)'))}_{place}"] for place in range(3)]
    keys = chance.sample(range(1, len(columns)), chance.randint(0, 3))
    pairs = [chance.sample(range(1, len(columns)), 2) for _ in range(chance.randint(0, 3))]
    schema = {"table_names_original": tables, "column_names_original": columns}
    return schema | {"db_id": name, "primary_keys": keys, "foreign_keys": pairs}


def in_words(schema: dict[str, Any]) -> str:
    """The schema in sql_data_process.py's words."""
    tables, columns = schema["table_names_original"], schema["column_names_original"]
    parts = [schema["db_id"], " contains tables such as ", ", ".join(tables), ". "]
    for number, table in enumerate(tables):
        of_table = ", ".join(name for place, name in columns if place == number)
        keys = [columns[key][1] for key in schema["primary_keys"] if columns[key][0] == number]
        parts += ["Table ", table, " has columns such as ", of_table, ". "]
        parts += [f"{name} is the primary key.\n" for name in keys]
    for pair in schema["foreign_keys"]:
        (at, name), (other_at, other) = (columns[key] for key in pair)
        parts.append(f"The {name} of {tables[at]} is the foreign key of {other} of {tables[other_at]}.\n")
    return "".join(parts)


@pytest.mark.parametrize("prompt", ["published-prompt", "trained-prompt"])
def test_dbgpts_rows_have_the_authors_prompts_tokens_and_loss(model, prompt):
    loaded = tokenizer_of("dbgpt-spider/llama-2-7b-chat-qlora", model)
    tokenizer, data = loaded.tokenizer, studies.find("dbgpt-spider").data
    encode = partial(tokenizer.encode, add_special_tokens=False)
    schemas = [database(random.Random(seed), f"db_{seed}") for seed in range(50)]
    raw = [
        {"db_id": schema["db_id"], "question": text_of(random.Random(seed))[:200], "query": f"SELECT  {seed} ;"}
        for seed, schema in enumerate(schemas)
    ]
    tokenized = {}
    for split in ("train", "test"):
        fields = data.fields_of(split, prompt)
        ends = {"segments": fields["segments"].replace("</s>", tokenizer.eos_token).replace("<s>", tokenizer.bos_token)}
        maker = RowMaker(fields | ends, {}, {}, "0", tables=schemas)
        tokenized[split] = loaded.tokenize(FIRST, [maker.make(row)[0] for row in raw])
    for row, schema, train, test in zip(raw, schemas, tokenized["train"], tokenized["test"], strict=True):
        instruction = f'{TERMINAL}{ONLY}{WRITE}"\n##Instruction:\n{in_words(schema)}\n'  # config.py
        question = f"###Input:\n{row['question']}\n\n###Response:"
        trained = scored = f"{instruction}\n{question}"  # construct_example in data_utils.py
        if prompt == "published-prompt":  # SQL_PROMPT_DICT in data_args.py
            before = (" " * 9).join((TERMINAL, ONLY, WRITE))
            scored = f"{before}##Instruction:\n{instruction}\n###Input:\n{question}\n\n###Response:"
        answer = [*encode(row["query"]), tokenizer.eos_token_id]
        for tokens, text in ((train, trained), (test, scored)):  # Llama2Template
            turn = f"[INST] <<SYS>>\n{SYSTEM}\n<</SYS>>\n\n{text} [/INST] "
            source = [tokenizer.bos_token_id, *encode(turn)]
            assert tokens.ids == source + answer
            assert tokens.labels == [MASKED] * len(source) + answer


PAD = " " * 16


def written(row: dict[str, str], spaces: str, empty: str) -> str:
    """A prompt of DoRA's code: the spaces behind its first line, and the line before the response."""
    rest = ("", f"{PAD}### Instruction:", f"{PAD}{row['instruction']}", empty, f"{PAD}### Response:", PAD)
    return "\n".join((TASK + spaces, *rest))


def test_doras_prompts_have_the_authors_bytes_and_tokens(model):
    loaded = tokenizer_of("dora-commonsense/llama-2-7b-dora", model)
    raw = [row | {"instruction": f"{row['question']}\n\nAnswer format: true/false"} for row in rows()[:200]]
    raw = [row | {"output": f"the correct answer is {row['answer']}"} for row in raw]
    ends = {"bos": repr(loaded.tokenizer.bos_token), "eos": repr(loaded.tokenizer.eos_token)}
    trained, scored = (prepared("dora-commonsense", split, raw, **ends) for split in ("train", "test"))
    tokens = loaded.tokenize(FIRST, trained)
    prompts = loaded.tokenize(FIRST, scored)
    for row, train, test, tokenized, prompt in zip(raw, trained, scored, tokens, prompts, strict=True):
        text = written(row, "  ", PAD) + row["output"]
        assert "".join(part["text"] for part in train["segments"][1:]) == text + loaded.tokenizer.eos_token
        assert test["segments"][1]["text"] == written(row, " ", "")
        assert tokenized.ids == [*encoded(loaded.tokenizer, text), loaded.tokenizer.eos_token_id]
        assert tokenized.labels == tokenized.ids
        answer = loaded.tokenizer(row["answer"], add_special_tokens=False).input_ids
        assert prompt.ids == encoded(loaded.tokenizer, written(row, " ", "")) + answer
    assert loaded.cfg.sequence_len == 256
    assert loaded.cfg.excess_length_strategy == "truncate"


TASK_WITH_INPUT = TASK.replace(". Write", ", paired with an input that provides further context. Write")


def instruction(chance: random.Random) -> dict[str, str]:
    """A row of Alpaca's form; half the rows have an input, and some are longer than 512 tokens."""
    texts = [" ".join(chance.choices(WORDS, k=chance.choice((1, 9, 300)))) for _ in range(3)]
    return {"instruction": texts[0], "input": chance.choice(("", texts[1])), "output": f"Yes{texts[2]}"}


def alpacas_prompt(row: dict[str, str]) -> str:
    """Alpaca's prompt, in Axolotl 0.4.0 (prompters.py) as in litgpt (prompts.py)."""
    if row["input"]:
        parts = (TASK_WITH_INPUT, f"### Instruction:\n{row['instruction']}", f"### Input:\n{row['input']}")
    else:
        parts = (TASK, f"### Instruction:\n{row['instruction']}")
    return "\n\n".join((*parts, "### Response:\n"))


@pytest.mark.parametrize(
    ("recipe", "loss_on_prompt", "limit"),
    [
        pytest.param("evolcodellama/codellama-7b-qlora", False, None, id="Axolotl's"),
        pytest.param("axolotl-alpaca2k/tinyllama-qlora", False, None, id="Axolotl's examples"),
        pytest.param("litgpt-alpaca2k/llama-2-7b-lora", True, 512, id="litgpt's"),
        pytest.param("litgpt-alpaca2k/llama-3.2-1b-lora", True, 512, id="litgpt's without BOS"),
    ],
)
def test_alpacas_rows_have_their_authors_tokens_and_loss(model, recipe, loss_on_prompt, limit):
    loaded = tokenizer_of(recipe, model)
    study = studies.find(recipe.partition("/")[0])
    without_bos = "3.2" in recipe
    begin = []
    if (model / "tokenizer.model").is_file() and not without_bos:
        begin = [loaded.tokenizer.bos_token_id]  # the BPE tokenizer adds none
    fields = {
        name: text.replace("<|end_of_text|>", loaded.tokenizer.eos_token) for name, text in study.data.fields.items()
    }
    encode = partial(loaded.tokenizer.encode, add_special_tokens=False)
    raw = [instruction(random.Random(seed)) for seed in range(200)]
    maker = RowMaker(fields, {}, {}, "0")
    tokenized = loaded.tokenize(FIRST, [maker.make(row)[0] for row in raw])
    cut = 0
    for row, tokens in zip(raw, tokenized, strict=True):
        shown = row if "input" in fields else row | {"input": ""}
        prompt = begin + encode(alpacas_prompt(shown))
        answer = [*encode(row["output"]), loaded.tokenizer.eos_token_id]
        ids, labels = prompt + answer, [MASKED] * len(prompt) + answer
        assert tokens.ids[:limit] == ids[:limit]
        assert tokens.labels[:limit] == (ids if loss_on_prompt else labels)[:limit]
        cut += len(ids) > 512
    assert 0 < cut < len(raw)


ZEPHYR = (  # src/alignment/data.py, DEFAULT_CHAT_TEMPLATE
    "{% for message in messages %}\n"
    "{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)


def test_zephyrs_chats_and_pairs_have_the_authors_texts_and_tokens(sentencepiece):
    sft = tokenizer_of("zephyr/sft-qlora", sentencepiece)
    dpo = tokenizer_of("zephyr/dpo-qlora", sentencepiece)
    tokenizer = sft.tokenizer
    write = partial(tokenizer.apply_chat_template, chat_template=ZEPHYR, tokenize=False)
    chats = [chat(random.Random(seed)) for seed in range(50)]
    refusals = [[*messages[:-1], {"role": "assistant", "content": "No."}] for messages in chats]
    texts = prepared("zephyr", "train", [{"messages": messages} for messages in chats])
    pairs = prepared(
        "zephyr", "train_pairs", [{"chosen": a, "rejected": b} for a, b in zip(chats, refusals, strict=True)]
    )
    rows = sft.tokenize(FIRST, texts)
    ids = preferences.tokenize(dpo.cfg, DatasetRef("datasets", 0, {}, "dpo"), dpo.tokenizer, pairs)
    for i, messages in enumerate(chats):
        empty = [] if messages[0]["role"] == "system" else [{"role": "system", "content": ""}]
        text = write(empty + messages)
        answers = write(messages[-1:]), write(refusals[i][-1:])
        assert texts[i] == {"text": text}
        assert pairs[i] == dict(
            zip(("prompt", "chosen", "rejected"), (write(empty + messages[:-1]), *answers), strict=True)
        )
        assert rows[i].ids == rows[i].labels == [*encoded(tokenizer, text), tokenizer.eos_token_id]
        for answer, tokens in zip(answers, (ids[i].chosen, ids[i].rejected), strict=True):
            assert ids[i].prompt + tokens == [*encoded(tokenizer, pairs[i]["prompt"] + answer), tokenizer.eos_token_id]
