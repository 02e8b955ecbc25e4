"""Composition of Axolotl's config: recipe, profiles, overrides, rehearsal."""

import hashlib
import json
import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..base import hardware, paths, processes, yamlfiles
from ..base.errors import UserError
from ..base.yamlfiles import Config
from ..data.sample import default_sample
from . import datafiles, gpus, merging, models, numerics, substitution, variants
from .datafiles import DataFile
from .gpus import Gpu
from .merging import Difference, Override, Source
from .profiles import ADAPTED, Incompatible, adapted
from .training_settings import SEED
from .variants import check_not_of_the_run

REHEARSAL = "rehearsal"
MIRROR = "mirror"  # the profile that replaces the base model by an ungated copy
TRACKERS = {"tensorboard", "trackio", "mlflow", "wandb"}  # profiles that do not affect training


@dataclass
class Request:
    """Request of `recipe run`."""

    name: str
    profiles: list[str] = field(default_factory=list)
    overrides: list[Override] = field(default_factory=list)
    rehearse: bool = False
    gpus: int = 1  # on each node
    dry_run: bool = False
    force: list[str] = field(default_factory=list)
    nodes: int = 1

    @property
    def ranks(self) -> int:
        """Number of training processes, one for each GPU."""
        return self.gpus * self.nodes


@dataclass
class Composed:
    """A config and its origin.

    Attributes:
        origin: the shipped recipe from which a variant or edited copy derives.
        differences: changes from the recipe file to the composed config.
        files: for each key changed by a file, such as a variant or profile, the path of this file.
        data: the data files; empty until they are read.
        incompatible: profile keys that do not suit the config, grouped by reason; see `profiles.adapted`.
        of_variant: changes from the origin to the recipe file.
    """

    recipe: str
    recipe_file: Path
    origin: str | None
    config: Config
    differences: list[Difference]
    files: dict[str, Path]
    profiles: list[str]
    rehearsal: bool
    data: list[DataFile] = field(default_factory=list)
    incompatible: Incompatible = field(default_factory=dict)
    of_variant: list[Difference] = field(default_factory=list)

    @property
    def from_origin(self) -> list[Difference]:
        """Changes from the origin to the composed config."""
        return merging.chained(self.of_variant, self.differences)

    @property
    def digest(self) -> str:
        """Hash of the config without tracker keys, and of the files that it names."""
        return self._hash(merging.TRACKING)

    @property
    def rows_digest(self) -> str:
        """Hash of the keys that may affect the tokenized rows, the files that they name, and Axolotl's version."""
        return self._hash(merging.NOT_OF_ROWS, processes.package_version("axolotl"))

    def _hash(self, without: re.Pattern[str], *more: str | None) -> str:
        cfg = {key: value for key, value in self.config.items() if not without.match(key)}
        content = [cfg, [file.sha256 for file in [*self.data, *datafiles.named_files(cfg)]], *more]
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


@dataclass
class _Draft:
    """A config under composition, changed step by step.

    Attributes:
        sources: source and file of the last change of each key.
        sample: the rehearsal profile's keys for the shipped sample.
        given: the user's changes merged after the rehearsal profile, by dotted key.
        incompatible: see `Composed`.
    """

    config: Config
    sources: dict[str, tuple[Source, Path | None]] = field(default_factory=dict)
    sample: Config = field(default_factory=dict)
    given: Config = field(default_factory=dict)
    incompatible: Incompatible = field(default_factory=dict)

    def take(self, changed: Config, source: Source, file: Path | None = None) -> None:
        """Adopt a changed config, and record the source of each changed key."""
        self.sources.update(dict.fromkeys(merging.differences(self.config, changed), (source, file)))
        self.config = changed

    def differences(self, before: Config) -> list[Difference]:
        """Differences from an earlier config."""
        differing = merging.differences(before, self.config).items()
        return [Difference(key=key, recipe=old, run=new, source=self.sources[key][0]) for key, (old, new) in differing]

    def rehearsal_changes(self, fragment: Config) -> Config:
        """Return the rehearsal profile's changes, except its keys for the sample; store those in `sample`."""
        folders = {"stand_in": str(substitution.folder()), "sample": str(default_sample())}
        fragment = filled(fragment, folders) | {"bf16": hardware.cpu_has_bf16()}
        self.sample = {key: fragment.pop(key) for key in substitution.OF_SAMPLE}
        own_model = substitution.OF_MODEL if models.is_small(self.config) else ()
        kept = {*own_model, *datafiles.missing_paths(self.config)}  # the check reports a missing path
        return {key: value for key, value in fragment.items() if key not in kept}


def compose(request: Request, gpu: Gpu | None = None) -> Composed:
    """Compose a request's config, for a GPU if known, without checking it.

    Raises:
        UserError: a name or file is wrong, or a change cannot be merged into the recipe.
    """
    name, file = paths.find_recipe(request.name)
    recipe = yamlfiles.read_yaml(file)
    origin = variants.origin_of(name, file)
    base = recipe if origin in (name, None) else yamlfiles.read_yaml(paths.recipe_file(origin or name))
    profiles = [paths.find_profile(profile) for profile in request.profiles]
    if request.rehearse and REHEARSAL not in dict(profiles):
        profiles.append(paths.find_profile(REHEARSAL))  # last, to override other profiles' GPU features
    rehearsal = REHEARSAL in dict(profiles)
    draft = _Draft(base)
    own = recipe | {key: base.get(key) for key in merging.OF_THE_RUN}
    draft.take(
        {key: value for key, value in own.items() if value is not None}, Source("recipe", paths.shown(file)), file
    )
    of_variant, of_file = draft.differences(base), draft.config
    if MIRROR in dict(profiles):
        draft.take(_mirrored(draft.config), Source("profile", MIRROR))
    others = [profile for profile in profiles if profile[0] != MIRROR]
    begun = draft.config
    for profile, source in others:
        fragment = yamlfiles.read_yaml(source)
        if profile in ADAPTED:
            remaining = [path for other, path in others if other not in (profile, REHEARSAL)]
            whole = _preview(begun, remaining, request.overrides)
            fragment = adapted(fragment, draft.config, whole, gpu, draft.incompatible)
        if profile == REHEARSAL:
            fragment = draft.rehearsal_changes(fragment)
        elif draft.sample:
            draft.given |= dict(merging.flatten(fragment))
        draft.take(merging.merge(draft.config, fragment), Source("profile", profile), source)
    for override in request.overrides:
        check_not_of_the_run(override.key, f"--set {override.text}")
        draft.take(merging.override(draft.config, override.key, override.value), override.source)
        draft.given |= dict(merging.flatten({override.key: override.value}))
    if rehearsal and request.ranks == 1:
        engine = set(gpus.ENGINE_KEYS).difference(datafiles.missing_paths(draft.config))
        without = merging.merge(draft.config, dict.fromkeys(engine))
        reason = "the rehearsal uses one process; --gpus 2 rehearses the engine too"
        draft.take(without, Source("default", detail=reason))
    several = f"--gpus {request.gpus}" + (f" --nodes {request.nodes}" if request.nodes > 1 else "")
    draft.take(
        gpus.divided(draft.config, request.ranks, several), Source("gpus", several, "keeps the number of rows per step")
    )
    if rehearsal:
        for changes, reason in substitution.substitutions(draft.config, draft.sample, draft.given):
            draft.take(merging.merge(draft.config, changes), Source("rehearsal", detail=reason))
    stated = numerics.engine_precision(draft.config, on_gpu=not rehearsal)
    draft.take(stated, Source("default", detail="DeepSpeed reads auto too late for ZeRO-3"))
    if draft.config.get("seed") is None:
        reason = "without a seed, each run would begin differently"
        draft.take(draft.config | {"seed": SEED}, Source("default", detail=reason))
    return Composed(
        recipe=name,
        recipe_file=file,
        origin=origin,
        config=draft.config,
        differences=draft.differences(of_file),
        files={key: changed_by for key, (_, changed_by) in draft.sources.items() if changed_by},
        profiles=[*dict(profiles)],
        rehearsal=rehearsal,
        incompatible=draft.incompatible,
        of_variant=of_variant,
    )


def _preview(composed: Config, profiles: list[Path], overrides: list[Override]) -> Config:
    """Merge the other profiles and the overrides into a config, so that `fast` and `packed` can adapt to it."""
    for file in profiles:
        composed = merging.merge(composed, yamlfiles.read_yaml(file))
    for override in overrides:
        with suppress(UserError):  # `compose` reports the error
            composed = merging.override(composed, override.key, override.value)
    return composed


def is_rehearsal(request: Request) -> bool:
    """True if the request is for a rehearsal."""
    return request.rehearse or REHEARSAL in (paths.find_profile(profile)[0] for profile in request.profiles)


def _mirrored(composed: Config) -> Config:
    """Replace the gated base model, and a gated tokenizer, by ungated copies."""
    model, tokenizer = composed.get("base_model"), composed.get("tokenizer_config")
    entry = models.catalogue().get(str(model), {})
    if "mirror" not in entry:
        raise UserError(f"profile {MIRROR}: {paths.TEMPLATES / 'models.yaml'} lists no mirror for {model}")
    copy = models.catalogue().get(str(tokenizer), {}).get("mirror", tokenizer)
    return merging.merge(composed, {"base_model": entry["mirror"], "revision_of_model": None, "tokenizer_config": copy})


def filled(fragment: Any, values: dict[str, str]) -> Any:
    """Fill in {placeholders} in a part of a config; keep placeholders without a value."""
    if isinstance(fragment, dict):
        return {key: filled(value, values) for key, value in fragment.items()}
    if isinstance(fragment, list):
        return [filled(item, values) for item in fragment]
    if isinstance(fragment, str):
        return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), fragment)
    return fragment
