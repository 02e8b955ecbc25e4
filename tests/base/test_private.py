"""What a text gives away, and what it does not."""

import getpass
import platform

import pytest

from qlora_recipes.base import private

NAMES = {"gpunode17.lab.example", "mmuster"}


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("/home/me/rows.jsonl", "a path"),
        ("~/rows", "a path"),
        ("from ../rows", "a path"),
        ("rows=./x", "a path"),
        ("C:\\Users\\me", "a path"),
        ("D:/rows", "a path"),
        ("\\\\server\\share", "a path"),
        ("secret/project/rows", "a path"),
        ("https://example.org", "a web address"),
        ("s3://bucket", "a web address"),
        ("me@example.org", "an address"),
        ("root@box", "an address"),
        ("hf_abcdefghijklmnopqrstuvwx12", "an access token"),
        ("sk-proj-abcdefgh12345678", "an access token"),
        ("sk_live_abcdefgh12345678", "an access token"),
        ("pk_test_abcdefgh12345678", "an access token"),
        ("ghp_16C7e42F292c6912E7", "an access token"),
        ("key AKIAIOSFODNN7EXAMPLE", "an access token"),
        ("0123456789abcdef0123456789abcdef01234567", "a long random text"),
        ("gpu07.cluster.example.com", "host"),
        ("node1.local", "host"),
        ("10.0.0.7", "host"),
        ("Xeon of gpunode17", "the name of a machine"),
        ("MMUSTER-adapter", "the name of a machine"),
    ],
)
def test_what_gives_something_away_is_named(text: str, what: str) -> None:
    assert what in (private.problem(text, NAMES) or "")


@pytest.mark.parametrize(
    "text",
    [
        *("owner/name", "haider2024/llama-3.2-3b", "adamw_bnb_8bit", "paged_adamw_32bit", "q_proj", "bfloat16"),
        *("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA A100-SXM4-80GB", "Quadro RTX 5000", "580.95.05", "2.14.1+cu130"),
        *("Intel(R) Xeon(R) CPU @ 2.20GHz", "AMD Ryzen 7 w/ Radeon 780M", "0.21.0.post1", "microsoft/deberta-xlarge"),
        *("A: ", "#### ", "The answer is: ", "test-subset-1", "…", "mmusterfrau", "gpunode171"),
        *("pk_fields_2024_of_the_table", "sk_learn_model_version_1_x"),
    ],
)
def test_names_of_hardware_models_packages_and_settings_do_not(text: str) -> None:
    assert private.problem(text, NAMES) is None


def test_names_that_everybody_has_give_nothing_away() -> None:
    assert private.problem("NVIDIA L4", {"nvidia", "root", "l4"}) is None
    assert private.names_here() >= {platform.node(), getpass.getuser()}


def test_texts_are_found_everywhere_with_their_place() -> None:
    found = list(private.texts({"a": [{"b": "x"}], "datasets.0.path": 1}))
    assert found == [("a key", "a"), ("a.0, a key", "b"), ("a.0.b", "x"), ("a key", "datasets 0 path")]
