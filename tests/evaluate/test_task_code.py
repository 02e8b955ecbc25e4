"""Task files of strangers: nothing that they name is run before its user agrees by name."""

from pathlib import Path
from typing import Any

import pytest
from lm_eval.api import metrics
from lm_eval.filters import extraction

from qlora_recipes.base import processes, yamlfiles
from qlora_recipes.base.errors import UserError
from qlora_recipes.evaluate import benchmarks
from qlora_recipes.metrics import registry

TASK: dict[str, Any] = {
    "task": "evil",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "rows.json"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": ["a", "b"],
    "doc_to_target": "label",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    "metadata": {"version": 3},
}


@pytest.fixture(autouse=True)
def only_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """A harness that lists the tasks of a folder, but not the thousands of its own, which takes seconds."""
    from lm_eval.tasks import TaskManager

    listed = TaskManager.initialize_tasks
    monkeypatch.setattr(
        TaskManager, "initialize_tasks", lambda self, include_path, **_: listed(self, include_path, False)
    )


@pytest.fixture
def ran(place: Path) -> Path:
    """The file that a task's module writes once it is imported."""
    mark = place / "ran"
    (place / "evil.py").write_text(f"open({str(mark)!r}, 'w')\ndef text(row):\n    return ''\n")
    return mark


def refused(place: Path, force: list[str] | None = None, name: str = "evil") -> str:
    benchmarks._tasks.cache_clear()
    columns = registry.requested([f"benchmark:{place / name}.yaml"])
    try:
        benchmarks.require(columns, force=force or [])
    except UserError as error:
        return str(error)
    return ""


def write(place: Path, more: str = "", name: str = "evil", **change: Any) -> None:
    (place / f"{name}.yaml").write_text(yamlfiles.write_yaml(TASK | change) + more)


FUNCTION = "process_docs: !function evil.text\n"


def test_a_task_without_code_needs_no_consent(place, ran):
    write(place)
    assert refused(place) == ""


def test_a_function_is_imported_only_with_consent(place, ran):
    write(place, FUNCTION)
    message = refused(place)
    assert "process_docs: !function evil.text" in message and "[task-code:evil]" in message
    assert not ran.exists()
    assert refused(place, ["task-code:evil"]) == ""
    assert ran.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"dataset_kwargs": {"trust_remote_code": True}},
        {"dataset_path": "pandas", "dataset_kwargs": {"data_files": "rows.pkl"}},
        {"dataset_path": "./rows.py"},
        {"metric_list": [{"metric": "./evil.py"}]},
        {"metric_list": [{"metric": "acc", "hf_evaluate": True}]},
        {"generation_kwargs": {"custom_generate": "owner/evil", "trust_remote_code": True}},
        {"use_prompt": "evil.yaml:prompt"},
        {"custom_dataset": "evil"},
    ],
    ids=str,
)
def test_a_key_that_is_on_no_list_needs_consent(place, change):
    write(place, **change)
    assert "[task-code:evil]" in refused(place)
    assert refused(place, ["task-code:evil"]) == ""


def test_an_included_file_is_read(place, ran):
    write(place, FUNCTION, "other")
    write(place, "include: other.yaml\n")
    assert "[task-code:evil]" in refused(place)
    assert not ran.exists()


def test_the_file_that_the_harness_takes_for_a_name_is_read(place, ran):
    write(place)
    write(place, FUNCTION, "a")  # it takes the first file with a task of this name
    assert "a.yaml" in refused(place)
    assert not ran.exists()


@pytest.mark.parametrize(
    ("members", "safe"),
    [
        ("[other]", True),
        ("[code]", False),
        ("[{task: other, process_docs: !function evil.text}]", False),
        ("[{task: other, num_fewshot: 2}]", True),
        ("[{group: inner, task: [{task: code}]}]", False),
    ],
)
def test_the_tasks_of_a_group_are_read(place, ran, members, safe):
    write(place)
    (place / "group.yaml").write_text(f"group: evil\ntask: {members}\n")  # it prefers the last group of a name
    write(place, "", "other", task="other")
    write(place, FUNCTION, "code", task="code")
    assert ("[task-code:evil]" in refused(place)) == (not safe)
    assert not ran.exists()


def test_objects_of_python_are_not_created_by_listing_a_folder(place, ran):
    write(place)
    (place / "beside.yaml").write_text(f"task: beside\nx: !!python/object/apply:builtins.open ['{ran}', w]\n")
    message = refused(place)
    assert "python/object/apply" in message
    assert not ran.exists()


def test_templates_cannot_leave_their_sandbox(place, ran):
    from jinja2.exceptions import SecurityError
    from lm_eval import utils

    write(place)
    assert refused(place) == ""
    assert utils.apply_template("{{ a.strip()|regex_replace('x', 'y') }}", {"a": " x "}) == "y"
    with pytest.raises(SecurityError):
        utils.apply_template(f"{{{{ cycler.__init__.__globals__.os.system('touch {ran}') }}}}", {})
    assert not ran.exists()
    with pytest.raises(UserError, match="takes more than 5 s or 256 MiB"):
        utils.apply_template("{{ 'a' * 9999999999 }}", {})


SLOW = r"(\w+\s?)+X"
ROW = "a" * 40


@pytest.mark.parametrize(
    "used",
    [
        pytest.param(lambda: extraction.RegexFilter(SLOW).apply([[ROW]], [{}]), id="regex"),
        pytest.param(
            lambda: extraction.MultiChoiceRegexFilter(regexes_to_ignore=[SLOW], ignore_case=True).apply(
                [["(A)"]], [{"choices": [ROW]}]
            ),
            id="ignored",
        ),
        pytest.param(lambda: metrics.exact_match_hf_evaluate([ROW], [ROW], regexes_to_ignore=[SLOW]), id="exact match"),
    ],
)
def test_patterns_of_a_task_are_bounded(used, monkeypatch):
    monkeypatch.setattr(processes, "SECONDS", 0.2)
    benchmarks.secure_harness()
    assert extraction.RegexFilter(r"#(\d+)").apply([["no", "#12"]], [{}]) == [["[invalid]", "12"]]
    with pytest.raises(UserError, match="takes more than"):
        used()
