"""The way to the hub: a proxy, the hub's answer, and the token for it. No address, token or user is in a line."""

import os
import socket
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from ..base import paths, yamlfiles
from ..data import hub
from .line import Line


def proxy() -> Line | None:
    """Whether the proxy answers that the environment names for the hub; None where it names none."""
    from huggingface_hub.constants import ENDPOINT

    address = urlsplit(ENDPOINT)
    chosen = getproxies()
    scheme = next((name for name in (address.scheme, "all") if name in chosen), None)
    if scheme is None or proxy_bypass(address.netloc):
        return None
    variable = next((name for name in (f"{scheme}_proxy", f"{scheme}_proxy".upper()) if name in os.environ), "")
    to = urlsplit(chosen[scheme] if "//" in chosen[scheme] else f"//{chosen[scheme]}")
    try:
        port = to.port or (443 if to.scheme == "https" else 80)
        hub.within(hub.PATIENCE, lambda: socket.create_connection((to.hostname or "", port), hub.PATIENCE).close())
    except (OSError, ValueError) as error:
        # what a ValueError says has parts of the address, which can be a password
        reason = hub.reason(error) if isinstance(error, OSError) else "its address is none"
        text = f"the one that {variable} names does not answer: {reason}"
        return Line("proxy", "wrong", text, "correct its address, or do without", f"unset {variable}")
    return Line("proxy", "ok", f"the one that {variable} names answers")


def hub_lines() -> list[Line]:
    """Whether the hub answers and gives the recipes' models to this user, and what it says of the token."""
    if hub.is_offline():
        text = "not asked, as HF_HUB_OFFLINE is set: models and data come from the cache alone"
        return [Line("hub", "note", text, "to ask it", "unset HF_HUB_OFFLINE")]
    answers = {name: hub.access(name) for name in _models()}
    silent = next((answer for answer in answers.values() if answer.access == "unknown"), None)
    if silent:
        text = f"{'unexpected' if silent.says.startswith('status') else 'no'} answer: {silent.says}"
        return [Line("hub", "note", text, "cached models still work; to skip the hub", "export HF_HUB_OFFLINE=1")]
    gated = [name for name, answer in answers.items() if answer.access == "gated"]
    missing = [name for name, answer in answers.items() if answer.access == "missing"]
    refused = any(answer.access == "refused" for answer in answers.values())
    return [_hub_line(len(answers), gated, missing, refused), _token_line(refused)]


def _hub_line(count: int, gated: list[str], missing: list[str], refused: bool) -> Line:
    if refused:
        return Line("hub", "note", "answers, and rejects this token", "see the line on it")
    if gated:
        text = f"answers; {len(gated)} of the recipes' {count} models are closed to you: {', '.join(gated)}"
        remedy = f"ask for access on their pages, as {hub.page(gated[0])}, with the account of the token"
        return Line("hub", "note", text, remedy, "" if hub.has_token() else "hf auth login")
    if missing:
        return Line("hub", "note", f"answers, and has not these of the recipes' models: {', '.join(missing)}")
    return Line("hub", "ok", f"answers; all of the recipes' {count} models can be had")


def _models() -> list[str]:
    """The base models of the shipped recipes."""
    files = map(paths.recipe_file, paths.recipe_names())
    contents = (yamlfiles.read_yaml(file) for file in files if file.is_relative_to(paths.RECIPES))
    return sorted({str(content["base_model"]) for content in contents if "/" in str(content.get("base_model"))})


def _token_line(refused: bool) -> Line:
    """Whether there is a token, and the hub knows it.

    Args:
        refused: whether the hub has taken no request with it.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    if not hub.has_token():
        text = "none: gated models, and `recipe publish --push`, need one"
        return Line("hub token", "note", text, "log in, if you need these", "hf auth login")
    variable = next((name for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if os.environ.get(name)), None)
    where = f"in {variable}" if variable else "from `hf auth login`"
    try:
        hub.within(hub.PATIENCE, lambda: HfApi().whoami())
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403) or refused:
            text = f"the one {where} is refused (status {status}): it has expired, was revoked, or is not whole"
            login = "hf auth login --force"
            return Line("hub token", "wrong", text, "make another on the hub's page of tokens, and log in with it",
                        f"unset {variable} && {login}" if variable else login)  # fmt: skip
        return Line("hub token", "note", f"one {where}; whether it is valid is not known: status {status}")
    except Exception as error:  # of the network, which httpx has many of
        return Line("hub token", "note", f"one {where}; whether it is valid is not known: {hub.reason(error)}")
    return Line("hub token", "ok", f"the one {where} is accepted")
