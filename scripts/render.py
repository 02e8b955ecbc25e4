"""Recipes from templates: the only way a shipped recipe is written."""

import difflib
from pathlib import Path

import jinja2
from jinja2.sandbox import SandboxedEnvironment

from . import config, paths
from .errors import UserError
from .files import write_atomically


def rendered(templates: Path = paths.TEMPLATES) -> dict[str, str]:
    """The text of every recipe by its name, from the templates of one folder.

    Raises:
        UserError: a template is broken or uses a variable that nothing sets.
    """
    environment = SandboxedEnvironment(
        loader=jinja2.FileSystemLoader(templates),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    models = config.read_yaml(templates / "models.yaml")
    recipes = {}
    for file in sorted(templates.rglob("*.yaml.j2")):
        if file.name.startswith("_"):
            continue
        template = file.relative_to(templates).as_posix()
        name = template.removesuffix(".yaml.j2")
        try:
            text = environment.get_template(template).render(name=name, template=f"templates/{template}", models=models)
        except Exception as error:  # an expression in a template can raise anything
            raise UserError(f"{_where(error, templates, file)}: {error}") from None
        recipes[name] = text
    return recipes


def _where(error: Exception, templates: Path, file: Path) -> str:
    """The template and line in which an error arose, which may be a base that `file` extends."""
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f"{error.filename}:{error.lineno}"
    trace, place = error.__traceback__, str(file)
    while trace:
        if trace.tb_frame.f_code.co_filename.startswith(str(templates)):
            place = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place


def drift(recipes: dict[str, str]) -> str:
    """A unified diff from the recipes on disk to the rendered ones; empty where they agree."""
    lines: list[str] = []
    on_disk = {name: paths.RECIPES / f"{name}.yaml" for name in {*paths.recipe_names(), *recipes}}
    for name, file in sorted(on_disk.items()):
        old = file.read_text(encoding="utf-8") if file.exists() else ""
        new = recipes.get(name, "")
        before, after = f"recipes/{name}.yaml (on disk)", f"recipes/{name}.yaml (from its template)"
        lines += difflib.unified_diff(old.splitlines(), new.splitlines(), before, after, lineterm="")
    return "\n".join(lines)


def write(recipes: dict[str, str]) -> list[Path]:
    """Write each recipe that is not on disk as rendered; the files written."""
    written = []
    for name, text in recipes.items():
        file = paths.RECIPES / f"{name}.yaml"
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, text)
            written.append(file)
    return written
