"""Writes the tables of docs/how/migrated-keys.md from templates/old-axolotl.yaml."""

from pathlib import Path

from markdown_table import markdown

from qlora_recipes.base import yamlfiles
from qlora_recipes.base.files import Row
from qlora_recipes.writing.migrate import tables

PAGE = Path("docs/how/migrated-keys.md")
HEADING = "## All changes\n"


def keys() -> list[Row]:
    """A row for each renamed, removed or refused key; neighbours with the same change share a row."""
    rows: list[Row] = []
    for key, change in tables()["keys"].items():
        old = key
        if "only" in change:
            old = f"{key}: {yamlfiles.write_flow(change['only'])}"
        new, reason = "removed", change.get("why")
        if "to" in change:
            new = f"`{change['to']}`"
        if "value" in change:
            new = f"`{change['to']}: {yamlfiles.write_flow(change['value'])}`"
        if "gone" in change:
            new, reason = "refused", change["gone"]
        if reason == f"{key} was renamed":
            reason = "renamed"
        elif rows and (rows[-1]["new key"], rows[-1]["reason"]) == (new, reason):
            rows[-1]["old key"] += f", `{old}`"
            continue
        rows.append({"old key": f"`{old}`", "new key": new, "reason": reason})
    return rows


def defaults() -> list[Row]:
    """A row for each changed default."""
    rows = []
    for default in tables()["defaults"]:
        old, new = (f"`{yamlfiles.write_flow(default[name])}`" for name in ("old", "new"))
        rows.append({"key": f"`{default['key']}`", "before": default["before"], "old default": old, "new default": new})
        rows[-1]["reason"] = default["why"]
    return rows


def page(text: str) -> str:
    """The page with its tables written anew."""
    begin, _, rest = text.partition(HEADING)
    introduction = rest.split("\n|")[0].rstrip()
    meanings = [{"before": row["before"], "what changed": row["text"]} for row in tables()["meanings"]]
    parts = [
        introduction,
        markdown(keys()),
        "A key that the file leaves out gets its old default:",
        markdown(defaults()),
        "No key undoes these:",
        markdown(meanings),
    ]
    return begin + HEADING + "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
