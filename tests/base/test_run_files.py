"""Names of the files of a run, in the code and in the documentation."""

import re
from pathlib import Path

from qlora_recipes.base.run_files import RunFile

ROOT = Path(__file__).parents[2]


def test_the_documentation_lists_all_files_of_a_run_and_no_others():
    _, _, table = (ROOT / "docs" / "files.md").read_text().partition("| file | content |\n| --- | --- |\n")
    table, _, _ = table.partition("\n\n")
    listed = set[str]()
    for row in table.splitlines():
        for path in re.findall("`(.+?)`", row.split("|")[1]):
            listed.update(re.sub("[A-Z]+", "{}", path).strip("/").split("/"))
    assert listed == set(RunFile)


# Names of other things, too: values of options, trackers' profiles, the manifest and locks of prepared rows and sweeps.
OTHERS = {"output", "merged", "gguf", "tensorboard", "wandb", "manifest.json", ".lock"}


def test_the_code_spells_each_name_once():
    sources = {file.name: file.read_text() for file in (ROOT / "scripts").rglob("*.py")}
    for name in set(RunFile) - OTHERS:
        literal = re.compile(f"""["']{re.escape(name).replace(re.escape("{}"), "{[^}]*}")}["']""")
        assert [file for file, text in sources.items() if literal.search(text)] == ["run_files.py"], name
