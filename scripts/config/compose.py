"""Composition of Axolotl's config: recipe, profiles, overrides, rehearsal."""

import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..base import hardware, paths, processes, yamlfiles
from ..base.errors import UserError
from ..base.files import digest
from ..base.yamlfiles import Config
from . import datafiles, gpus, keys, merging, models, numerics, substitution
from .datafiles import DataFile
from .gpus import Gpu
from .merging import Difference, Override, Source
from .origin import Base, header_of, origin_of
from .profiles import ADAPTED, Incompatible, adapted, incompatible_keys
from .training_settings import SEED

REHEARSAL = "rehearsal"
MIRROR = "mirror"  # the profile that replaces the base model by an ungated copy
OF_REHEARSAL = Source("profile", REHEARSAL)
TRACKERS = {"tensorboard", "trackio", "mlflow", "wandb"}  # profiles that do not affect training


@dataclass
class Request:
    """Request for a recipe with changes, from `recipe run` and the commands that prepare or preview it."""

    name: str
    profiles: list[str] = field(default_factory=list)
    overrides: list[Override] = field(default_factory=list)
    rehearse: bool = False
    gpus: int = 1  # on each node
    dry_run: bool = False
    force: list[str] = field(default_factory=list)
    nodes: int = 1
    base: Path | None = None  # run of the recipe that the header names as base; by default the newest

    @property
    def ranks(self) -> int:
        """Number of training processes, one for each GPU."""
        return self.gpus * self.nodes

    @property
    def options(self) -> list[str]:
        """Arguments --profile and --set for a command."""
        words = []
        for profile in self.profiles:
            words += ["--profile", profile]
        for override in self.overrides:
            words += ["--set", override.text]
        return words

    @property
    def gpu_options(self) -> str:
        """Options that request the GPUs."""
        if self.nodes > 1:
            return f"--gpus {self.gpus} --nodes {self.nodes}"
        return f"--gpus {self.gpus}"


@dataclass
class Composed:
    """A config and its origin.

    Attributes:
        origin: the built-in recipe from which a variant or edited copy derives; otherwise the recipe itself.
        differences: changes from the recipe file to the composed config.
        data: the data files; empty until they are read.
        incompatible: profile keys that do not suit the config, grouped by reason; see `profiles.incompatible_keys`.
        of_variant: changes from the origin to the recipe file.
        base: run whose merged model is the base model, if the recipe's header names a base.
    """

    recipe: str
    recipe_file: Path
    origin: str
    config: Config
    differences: list[Difference]
    profiles: list[str]
    rehearsal: bool
    data: list[DataFile] = field(default_factory=list)
    incompatible: Incompatible = field(default_factory=dict)
    of_variant: list[Difference] = field(default_factory=list)
    base: Base | None = None

    @property
    def from_origin(self) -> list[Difference]:
        """Changes from the origin to the composed config."""
        return merging.chained(self.of_variant, self.differences)

    @property
    def digest(self) -> str:
        """Hash of the config without tracker keys, and of the files that it names."""
        return self._hash(("tracking",))

    @property
    def rows_digest(self) -> str:
        """Hash of the keys that may affect the tokenized rows, the files that they name, and Axolotl's version."""
        return self._hash(keys.NOT_PREPARED, processes.package_version("axolotl"))

    def _hash(self, without: tuple[str, ...], *more: str | None) -> str:
        cfg = {key: value for key, value in self.config.items() if keys.affects(key) not in without}
        return digest([cfg, [file.sha256 for file in [*self.data, *datafiles.named_files(cfg)]], *more])


def compose(request: Request, gpu: Gpu | None = None) -> Composed:
    """Compose a request's config, for a GPU if known, without checking it.

    Raises:
        UserError: a name or file is wrong, or a change cannot be merged into the recipe.
    """
    recipe, file = paths.find_recipe(request.name)
    content = yamlfiles.read_recipe(file)
    origin = origin_of(recipe, file) or recipe
    built_in = content
    if origin != recipe:
        built_in = yamlfiles.read_yaml(paths.recipe_file(origin))
    composition = _Composition(request, gpu, _profiles(request), built_in)
    composition.derive(content, file)
    of_variant, of_file = composition.differences(built_in), composition.config
    base = composition.start_from(header_of(file).base)
    composition.mirror()
    composition.apply_profiles()
    composition.apply_overrides()
    composition.drop_parallelism()
    composition.divide_batch()
    composition.substitute()
    composition.state_precision()
    composition.state_seed()
    return Composed(
        recipe=recipe,
        recipe_file=file,
        origin=origin,
        config=composition.config,
        differences=composition.differences(of_file),
        profiles=[*dict(composition.profiles)],
        rehearsal=composition.is_rehearsal,
        incompatible=composition.incompatible,
        of_variant=of_variant,
        base=base,
    )


def profile_file(source: Source) -> Path | None:
    """File of the profile that changed a value; None for other sources."""
    if source.kind != "profile" or source.name == MIRROR:
        return None
    return paths.find_profile(source.name)[1]


def is_rehearsal(request: Request) -> bool:
    """True if the request is for a rehearsal."""
    return REHEARSAL in dict(_profiles(request))


def _profiles(request: Request) -> list[tuple[str, Path]]:
    """Names and files of a request's profiles."""
    profiles = [paths.find_profile(profile) for profile in request.profiles]
    if request.rehearse and REHEARSAL not in dict(profiles):
        profiles.append(paths.find_profile(REHEARSAL))  # last, to override other profiles' GPU features
    return profiles


@dataclass
class _Composition:
    """A config under composition; its methods are the steps, in the order in which they apply.

    Attributes:
        config: the config so far, at first the origin's.
        sources: source of the last change of each key.
        sample: the rehearsal profile's keys for the built-in sample.
        user_settings: settings merged after the rehearsal profile, which a rehearsal keeps, by dotted key.
        incompatible: see `Composed`.
    """

    request: Request
    gpu: Gpu | None
    profiles: list[tuple[str, Path]]
    config: Config
    sources: dict[str, Source] = field(default_factory=dict)
    sample: Config = field(default_factory=dict)
    user_settings: Config = field(default_factory=dict)
    incompatible: Incompatible = field(default_factory=dict)

    @property
    def is_rehearsal(self) -> bool:
        return REHEARSAL in dict(self.profiles)

    def differences(self, before: Config) -> list[Difference]:
        """Differences from an earlier config."""
        differing = merging.differences(before, self.config).items()
        return [Difference(key=key, recipe=old, run=new, source=self.sources[key]) for key, (old, new) in differing]

    def derive(self, recipe: Config, file: Path) -> None:
        """Turn the origin's config into that of a variant or edited copy, except for the keys that a run sets."""
        derived = recipe | {key: self.config.get(key) for key in keys.affecting("run")}
        derived = {key: value for key, value in derived.items() if value is not None}
        self._adopt(derived, Source("recipe", paths.shown(file)))

    def start_from(self, recipe: str) -> Base | None:
        """Set the merged model of another recipe's run as base model; until it exists, that recipe's base model."""
        if not recipe:
            return None
        run = self.request.base
        base = Base.of_run(recipe, run) if run else Base.newest(recipe, self.is_rehearsal)
        self._adopt(merging.merge(self.config, base.changes), base.source)
        return base

    def mirror(self) -> None:
        """Replace a gated base model by its ungated copy, for the profile mirror."""
        if MIRROR in dict(self.profiles):
            self._adopt(_mirrored(self.config), Source("profile", MIRROR))

    def apply_profiles(self) -> None:
        """Merge all profiles except the mirror, which comes first."""
        before = self.config
        for name, file in self.profiles:
            if name == MIRROR:
                continue
            fragment = yamlfiles.read_yaml(file)
            if name in ADAPTED:
                fragment = self._adapted(fragment, self._preview(before, name))
            if name == REHEARSAL:
                fragment = self._rehearsal_changes(fragment)
            elif self.sample:
                self.user_settings |= dict(merging.flatten(fragment))
            self._adopt(merging.merge(self.config, fragment), Source("profile", name))

    def apply_overrides(self) -> None:
        """Set the keys of --set."""
        for override in self.request.overrides:
            if keys.affects(override.key) == "run":
                problem = f"`recipe run` sets {override.key}"
                remedy = "--runs selects the folder of runs, and `recipe resume` continues a run"
                raise UserError(problem, key=f"--set {override.text}", remedy=remedy)
            self._adopt(merging.override(self.config, override.key, override.value), override.source)
            self.user_settings |= dict(merging.flatten({override.key: override.value}))

    def drop_parallelism(self) -> None:
        """Remove DeepSpeed or FSDP from a rehearsal in one process; keep missing files, which the check reports."""
        if self.is_rehearsal and self.request.ranks == 1:
            parallelism = set(gpus.PARALLELISM_KEYS).difference(datafiles.missing_paths(self.config))
            reason = "the rehearsal uses one process; --gpus 2 rehearses DeepSpeed or FSDP too"
            self._adopt(merging.merge(self.config, dict.fromkeys(parallelism)), Source("default", detail=reason))

    def divide_batch(self) -> None:
        """Divide the rows of a step among the GPUs."""
        options = self.request.gpu_options
        divided = gpus.divided(self.config, self.request.ranks, options)
        self._adopt(divided, Source("gpus", options, "keeps the number of rows per step"))

    def substitute(self) -> None:
        """Replace what a rehearsal cannot use."""
        if self.is_rehearsal:
            for changes, reason in substitution.substitutions(self.config, self.sample, self.user_settings):
                self._adopt(merging.merge(self.config, changes), Source("rehearsal", detail=reason))

    def state_precision(self) -> None:
        """Replace DeepSpeed's automatic precision by the config's."""
        stated = numerics.parallelism_precision(self.config, on_gpu=not self.is_rehearsal)
        self._adopt(stated, Source("default", detail="DeepSpeed reads auto too late for ZeRO-3"))

    def state_seed(self) -> None:
        """Set Axolotl's default seed if the config has none."""
        if self.config.get("seed") is None:
            reason = "without a seed, each run would begin differently"
            self._adopt(self.config | {"seed": SEED}, Source("default", detail=reason))

    def _adopt(self, changed: Config, source: Source) -> None:
        """Adopt a changed config, and record the source of each changed key."""
        self.sources |= dict.fromkeys(merging.differences(self.config, changed), source)
        self.config = changed

    def _preview(self, before: Config, profile: str) -> Config:
        """Config with the overrides and all profiles except one, to which that one is adapted."""
        config = before
        for name, file in self.profiles:
            if name not in (profile, MIRROR, REHEARSAL):
                config = merging.merge(config, yamlfiles.read_yaml(file))
        for override in self.request.overrides:
            with suppress(UserError):  # `apply_overrides` reports the error
                config = merging.override(config, override.key, override.value)
        return config

    def _adapted(self, fragment: Config, config: Config) -> Config:
        """Adapt a profile of `ADAPTED` to a config and the GPU."""
        incompatible = incompatible_keys(fragment, config, self.gpu)
        for reason, changes in incompatible.items():
            self.incompatible.setdefault(reason, {}).update(changes)
        return adapted(fragment, self.config, incompatible)

    def _rehearsal_changes(self, fragment: Config) -> Config:
        """Changes of the rehearsal profile; its keys about the built-in sample go to `sample` instead."""
        from ..data.prepare import default_sample  # only a rehearsal needs what prepares rows

        folders = {"small_model": str(substitution.folder()), "sample": str(default_sample())}
        fragment = filled(fragment, folders) | {"bf16": hardware.cpu_has_bf16()}
        self.sample = {key: fragment.pop(key) for key in substitution.OF_SAMPLE}
        fragment = dict.fromkeys(keys.of_one_model()) | fragment
        unchanged = datafiles.missing_paths(self.config)  # the check reports a missing path
        if models.is_small(self.config):
            unchanged += keys.of_one_model()
        return {key: value for key, value in fragment.items() if key not in unchanged}


def _mirrored(config: Config) -> Config:
    """Replace the gated base model, and a gated tokenizer, by ungated copies."""
    model, tokenizer = config.get("base_model"), config.get("tokenizer_config")
    entry = models.catalogue().get(str(model), {})
    if "mirror" not in entry:
        raise UserError(f"profile {MIRROR}: {paths.TEMPLATES / 'models.yaml'} lists no mirror for {model}")
    copy = models.catalogue().get(str(tokenizer), {}).get("mirror", tokenizer)
    return merging.merge(config, {"base_model": entry["mirror"], "revision_of_model": None, "tokenizer_config": copy})


def filled(fragment: Any, values: dict[str, str]) -> Any:
    """Fill in {placeholders} in a part of a config; keep placeholders without a value."""
    return yamlfiles.with_texts(
        fragment, lambda text: re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), text)
    )
