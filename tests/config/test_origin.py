"""The block at the head of a recipe states its origin; comments decide nothing."""

import re
from pathlib import Path

import pytest

from qlora_recipes.base import paths, yamlfiles
from qlora_recipes.base.errors import UserError
from qlora_recipes.config import compose
from qlora_recipes.config.compose import Request
from qlora_recipes.config.origin import Header, header_of, origin_of, parent_of
from qlora_recipes.data import studies
from qlora_recipes.writing import migrate, new

BASE = "haider2024/code-llama-7b"
OTHER = "haider2024/llama-3-8b"
PLANTED = (
    f"# {OTHER}: I looked up the learning rate there",
    f"# mine: a variant of {OTHER}",
    f'# name = "{OTHER}"',
    f'# parent = "{OTHER}"',
    "# axolotl version: `0.3.0`",
    "# Axolotl   written for 0.3.0",
    "# paper",
)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def decisions(name: str, file: Path) -> tuple[object, ...]:
    """Relatives, release, config and reported settings of a file."""
    old, composed = migrate.of_file(str(file), None), compose.compose(Request(str(file)))
    study = studies.usable_study_of(composed.origin)
    reported = study.reported_settings(study.origin(composed.origin)) if study else None
    return (
        *(origin_of(name, file), parent_of(name, file), old.release, old.is_current, old.sign),
        *(composed.origin, composed.config, composed.differences, reported),
    )


@pytest.mark.parametrize("with_header", [True, False])
def test_sentences_in_comments_decide_nothing(place, with_header):
    recipes = [name for name in paths.recipe_names() if not name.startswith("start/")][::5]
    for number, recipe in enumerate(recipes * 2):
        text = yamlfiles.read_text(paths.recipe_file(recipe))
        if not with_header:
            text = re.sub("(?s)# /// recipe.*?# ///\n", "", text)
        file = place / f"mine{number}.yaml"
        file.write_text(text)
        before = decisions(file.stem, file)
        assert before[0] == (recipe if with_header else None)
        head = "\n".join(PLANTED)
        planted = re.sub(r"(?m)^(\w+: .*?)(  #.*)?$", rf"\1  # {PLANTED[number % len(PLANTED)][2:]}", text)
        file.write_text(f"{head}\n{planted}{head}\n")
        assert decisions(file.stem, file) == before


def test_a_header_is_written_and_read_alike(place):
    header = Header(name='a "b" \\ é', parent="cards/read me.md", parent_sha256="0" * 64, axolotl="0.21.0")
    (place / "a.yaml").write_text("\n".join(["# yaml", *header.lines(), "#", "lora_r: 8\n"]))
    assert header_of(place / "a.yaml") == header


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("lora_r: 8\n{block}", id="after a key"),
        pytest.param("#\n{block}".replace("{block}", "{indented}"), id="indented"),
        pytest.param("{unclosed}lora_r: 8\n", id="unclosed"),
    ],
)
def test_only_a_block_at_the_head_counts(place, text):
    block = "\n".join(Header(name=BASE).lines()) + "\n"
    parts = {"block": block, "indented": block.replace("# ", " # "), "unclosed": block.replace("# ///\n", "")}
    (place / "a.yaml").write_text(text.format(**parts))
    assert header_of(place / "a.yaml") == Header()


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ("# name = mine", "not TOML: Invalid value (at line 1, column 8)"),
        ("# nam = 'mine'", "nam is unknown; did you mean name?"),
        ("# name = 3", "name: not text"),
    ],
)
def test_a_malformed_header_is_refused(place, lines, problem):
    (place / "a.yaml").write_text(f"# yaml\n# /// recipe\n{lines}\n# ///\nlora_r: 8\n")
    with pytest.raises(UserError) as raised:
        header_of(place / "a.yaml")
    assert (raised.value.problem, raised.value.line) == (f"header: {problem}", 2)


def test_a_variant_of_a_variant_keeps_its_origin_without_the_one_between(place):
    new.write("wide", BASE, [])
    new.write("wider", "wide", [])
    file = place / "variants/wider.yaml"
    assert (origin_of("wider", file), parent_of("wider", file)) == (BASE, "wide")
    (place / "variants/wide.yaml").unlink()
    assert (origin_of("wider", file), parent_of("wider", file)) == (BASE, None)
    copy = file.rename(place / "copy.yaml")
    assert (origin_of("copy", copy), parent_of("copy", copy)) == (BASE, None)


def test_diff_says_that_the_parent_has_changed(place, recipe):
    new.write("wide", BASE, [])
    new.write("wider", "wide", [])
    assert recipe.ok("diff", "wider").stderr == ""
    file = place / "variants/wide.yaml"
    file.write_text(file.read_text() + "lora_bias: none\n")
    assert recipe.ok("diff", "wider").stderr == (
        "wide has changed since wider was written; the differences include these changes\n"
    )
