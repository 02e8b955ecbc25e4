"""The GPUs that a recipe can be checked for."""

import re
from dataclasses import dataclass
from pathlib import Path

from . import config, provenance
from .errors import UserError, did_you_mean

FILE = Path(__file__).with_name("gpus.yaml")


@dataclass(frozen=True)
class Gpu:
    """A GPU's name and its compute capability, as (8, 6)."""

    name: str
    capability: tuple[int, int]

    @property
    def sm(self) -> str:
        """The capability as Axolotl writes it: sm_86."""
        return f"sm_{self.capability[0]}{self.capability[1]}"

    def __str__(self) -> str:
        return f"{self.name} ({self.sm})"


def find(name: str) -> Gpu:
    """A GPU by its name, however it is spelt, or by its compute capability.

    Raises:
        UserError: there is none of that name.
    """
    if match := re.fullmatch(r"sm_?(\d{1,2})(\d)|(\d{1,2})\.(\d)", name, re.IGNORECASE):
        return Gpu(name, (int(match[1] or match[3]), int(match[2] or match[4])))
    known = {
        _plain(listed): Gpu(listed, _capability(number))
        for number, names in config.read_yaml(FILE).items()
        for listed in names
    }
    plain = _plain(name)
    if plain in known:
        return known[plain]
    hint = did_you_mean(plain, known) or f"; there are {', '.join(gpu.name for gpu in known.values())}"
    raise UserError(f"--gpu {name}: no GPU of that name{hint}; a compute capability such as sm_86 does as well")


def here() -> Gpu | None:
    """This machine's first NVIDIA GPU."""
    found = provenance.gpus()
    return Gpu(found[0]["name"], _capability(found[0]["compute_capability"])) if found else None


def _plain(name: str) -> str:
    """A name without what is spelt now one way and now another."""
    return re.sub(r"nvidia|geforce|tesla|-?(pcie|sxm\d?|hbm\d?e?)|\d+ ?gi?b|[^a-z0-9]", "", name.lower())


def _capability(text: str) -> tuple[int, int]:
    major, minor = text.split(".")
    return int(major), int(minor)
