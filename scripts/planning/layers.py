"""The trace of a deep model from those of two shallow ones, where all of its layers are alike.

Some events of a step come once for each layer: while it is loaded, in its forward and its backward pass, in the
optimizer. Two traces, one of a layer more than the other, show which these are; a deeper model repeats them. `trace`
gives the memory that `memory.trace` gives, five times as fast.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .steps import Step
from .traces import Events, MemoryTrace, Shape, ordered, rounded

SHALLOW = 4
"""The layers of the shallower one, so that there are some that neither the first nor the last one touches."""
_ALIKE = ("llama", "mistral", "qwen2", "qwen3", "gemma", "granite", "olmo2", "phi3")
"""Model types whose layers are all alike where their config's layer_types are."""
_BEGIN = (0, 0)  # of the step, after what is loaded; no storage has this id or this size
_BLOCK = 512  # bytes; sizes that depend on the number of layers, as norms of gradients, are within one


class Irregular(Exception):
    """Two traces differ otherwise than by what comes once for each layer."""


def trace(step: Step, shape: Shape) -> MemoryTrace:
    """What a step allocates, for micro batches of a shape; see `memory.trace`, which is asked where this cannot."""
    from . import memory

    layers = _alike(step)
    if layers > SHALLOW + 1:
        fewer = memory.trace(_with_layers(step, SHALLOW), shape)
        shallow = memory.trace(_with_layers(step, SHALLOW + 1), shape)
        try:
            return _grown(fewer, shallow, layers - SHALLOW - 1)
        except Irregular:
            pass
    return memory.trace(step, shape)


def _alike(step: Step) -> int:
    """How many layers a model has, if all are alike and are adapted alike; else 0."""
    by_pattern = isinstance(step.targets, str) and step.targets != "all-linear"  # which may tell layers apart
    by_number = any(re.search(r"\d", name) for name in (*step.targets, *step.saved_modules))
    return 0 if by_pattern or by_number else alike(json.loads(step.model))


def _with_layers(step: Step, layers: int) -> Step:
    return replace(step, model=json.dumps(having(json.loads(step.model), layers)))


def alike(model: dict[str, Any]) -> int:
    """How many layers a model has, by the content of its config.json, if all are alike; else 0."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(**model)
    types = getattr(config, "layer_types", None) or [""]
    return int(config.num_hidden_layers) if config.model_type in _ALIKE and len(set(types)) == 1 else 0


def having(model: dict[str, Any], layers: int) -> dict[str, Any]:
    """The config of a model like another, with the first so many of its layers."""
    types = model.get("layer_types")
    return model | {"num_hidden_layers": layers} | ({"layer_types": types[:layers]} if types else {})


def _grown(fewer: MemoryTrace, shallow: MemoryTrace, more: int) -> MemoryTrace:
    """The trace of a model with so many layers more than that of one, which has a layer more than that of another.

    Raises:
        Irregular: it does not follow from them.
    """
    events = [*shallow.loaded, _BEGIN, *shallow.step]
    sections = _sections(_tokens([*fewer.loaded, _BEGIN, *fewer.step]), _tokens(events))
    like, ids = _repeated(events, sections, more)
    begin = ids.index(_BEGIN[0])
    grown = ordered([(storage, events[at][1]) for storage, at in zip(ids, like, strict=True)])
    before = fewer.parameters
    return replace(
        shallow,
        loaded=grown[:begin],
        step=grown[begin + 1 :],
        kinds={new: shallow.kinds[events[at][0]] for new, at in zip(ids, like, strict=True) if new},
        parameters={
            layer: {key: n + more * (n - before[layer][key]) for key, n in counts.items()}
            for layer, counts in shallow.parameters.items()
        },
        sizes=shallow.sizes | {"layers": shallow.sizes["layers"] + more},
        paged=shallow.paged + more * (shallow.paged - fewer.paged),
    )


def _tokens(events: Events) -> list[int]:
    """For each event the blocks that it makes or, inverted, frees."""
    sizes = {storage: rounded(size, _BLOCK) for storage, size in events if size >= 0}
    return [sizes[storage] if size >= 0 else ~sizes[storage] for storage, size in events]


@dataclass(frozen=True)
class _Section:
    """Events that come once for each layer, one layer's after the other's: the index of the first, how many are each
    layer's, and how many layers there are."""

    start: int
    length: int
    layers: int

    @property
    def end(self) -> int:
        return self.start + self.length * self.layers


def _sections(fewer: Sequence[int], tokens: Sequence[int]) -> list[_Section]:
    """What comes once for each layer in a trace, from one of a layer less.

    Where the two part, the longer one repeats what it had just before, for its additional layer.

    Raises:
        Irregular: they part otherwise.
    """
    sections: list[_Section] = []
    i = j = end = 0
    while True:
        agree = _agreement(fewer[i:], tokens[j:])
        i, j = i + agree, j + agree
        if (i, j) == (len(fewer), len(tokens)):
            return sections
        lengths = [n for n in range(1, min(j - end, len(tokens) - j) + 1) if tokens[j - n : j] == tokens[j : j + n]]
        if not lengths:
            raise Irregular
        length = max(lengths, key=lambda n: _agreement(fewer[i:], tokens[j + n :]))
        one, end = tokens[j : j + length], j + length
        start = j
        while start - length >= (sections[-1].end if sections else 0) and tokens[start - length : start] == one:
            start -= length
        sections.append(_Section(start, length, (end - start) // length))
        j = end


def _agreement(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens agree from the first on."""
    return next((i for i, (one, other) in enumerate(zip(a, b, strict=False)) if one != other), min(len(a), len(b)))


_Place = tuple[int, int, int]
"""A section (-1: none), a layer of it, and which event of the layer's; or which of those that are in no section."""


def _repeated(events: Events, sections: list[_Section], more: int) -> tuple[list[int], list[int]]:
    """A trace with more layers: for each event the index of the one that it is like, and its storage.

    Where later layers free what later layers of a section made, as in the same pass, an added layer frees as many
    layers before itself; where they free what earlier ones made, as backward and forward, it counts from the end.

    Raises:
        Irregular: what an event frees does not follow.
    """
    places = _places(sections, 0, len(events))
    index = {place: i for i, place in enumerate(places)}
    makers = {storage: place for place, (storage, size) in zip(places, events, strict=True) if size >= 0}
    slopes = _slopes(
        [(place, makers[storage]) for place, (storage, size) in zip(places, events, strict=True) if size < 0]
    )
    like: list[int] = []
    ids: list[int] = []
    living: dict[_Place, int] = {}
    for place in _places(sections, more, len(events)):
        section, layer, offset = place
        middle = (sections[section].layers - 1) // 2 if section >= 0 else 0
        shallow = layer - min(max(layer - middle, 0), more)
        source = index[section, shallow, offset]
        storage, size = events[source]
        like.append(source)
        if size >= 0:
            living[place] = len(like) if storage else _BEGIN[0]
            ids.append(living[place])
            continue
        of, made, event = makers[storage]
        if section >= 0 and of >= 0:
            made = made + layer - shallow if slopes[section, of] >= 0 else made + more - layer + shallow
        elif of >= 0 and made > (sections[of].layers - 1) // 2:
            made += more
        if (of, made, event) not in living:
            raise Irregular
        ids.append(living.pop((of, made, event)))
    return like, ids


def _slopes(frees: Iterable[tuple[_Place, _Place]]) -> Counter[tuple[int, int]]:
    """For each two sections whether later layers of the first free what later (above 0) or earlier ones of the second
    made."""
    slopes: Counter[tuple[int, int]] = Counter()
    before: dict[tuple[int, ...], int] = {}
    for (section, _, offset), (of, made, event) in frees:
        key = section, offset, of, event
        slopes[section, of] += made - before.get(key, made)
        before[key] = made
    return slopes


def _places(sections: Sequence[_Section], more: int, count: int) -> list[_Place]:
    """The place of each event, in order, where each section has some layers more than in a trace of so many events."""
    places: list[_Place] = []
    end = 0
    for number, section in enumerate(sections):
        places += [(-1, 0, i) for i in range(end, section.start)]
        layers = range(section.layers + more)
        places += [(number, layer, event) for layer in layers for event in range(section.length)]
        end = section.end
    return places + [(-1, 0, i) for i in range(end, count)]
