"""The trace of a deep model from those of two shallow ones, where all of its layers are alike.

Some events of a step come once for each layer: while it is loaded, in its forward and its backward pass, in the
optimizer. Two traces, one of a layer more than the other, show which these are and to which layer belongs what they
free; a deeper model repeats them. `trace` gives the events that `memory.trace` gives, many times as fast.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from .traces import Events, MemoryTrace, Shape, Step, ordered

SHALLOW = (3, 4, 5)
"""The layers of the two: the first and second of these, or else, as with DoRA, the second and third. From four layers
on there are some that neither the first nor the last one touches."""
_ALIKE = ("llama", "mistral", "qwen2", "qwen3", "gemma", "granite", "olmo2", "phi3")
"""Model types whose layers are all alike where their config's layer_types are."""
_BEGIN = (0, 0)  # of the step, after what is loaded; no storage has this id or this size


class Irregular(Exception):
    """Two traces differ otherwise than by what comes once for each layer."""


def trace(step: Step, shapes: list[Shape]) -> MemoryTrace:
    """What a step allocates, for micro batches of some shapes; see `memory.trace`, which is asked where this cannot."""
    from . import memory

    layers = _alike(step)
    if layers > SHALLOW[-1]:
        shallower = memory.trace(_with_layers(step, SHALLOW[0]), shapes[:1])
        for depth in SHALLOW[1:]:
            shallow = memory.trace(_with_layers(step, depth), shapes)
            try:
                return _grown(shallower, shallow, layers - depth)
            except Irregular:
                shallower = shallow
    return memory.trace(step, shapes)


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


def _grown(shallower: MemoryTrace, shallow: MemoryTrace, more: int) -> MemoryTrace:
    """The trace of a model with so many layers more than that of one, which has a layer more than that of another.

    Raises:
        Irregular: it does not follow from them.
    """
    steps = {shape: [*shallow.loaded, _BEGIN, *events] for shape, events in shallow.steps.items()}
    first = next(iter(steps.values()), [*shallow.loaded, _BEGIN])
    if any([_what(event) for event in events] != [_what(event) for event in first] for events in steps.values()):
        raise Irregular
    grown = _growth([*shallower.loaded, _BEGIN, *next(iter(shallower.steps.values()), [])], first, more)
    begin = grown.ids.index(_BEGIN[0])
    kinds = {new: shallow.kinds[first[at][0]] for new, at in zip(grown.ids, grown.like, strict=True) if new}
    before = shallower.parameters
    return replace(
        shallow,
        loaded=grown.events(first)[:begin],
        steps={shape: grown.events(events)[begin + 1 :] for shape, events in steps.items()},
        kinds=kinds,
        parameters={
            layer: {key: n + more * (n - before[layer][key]) for key, n in counts.items()}
            for layer, counts in shallow.parameters.items()
        },
        sizes=shallow.sizes | {"layers": shallow.sizes["layers"] + more},
        paged=shallow.paged + more * (shallow.paged - shallower.paged),
    )


def _what(event: tuple[int, int]) -> tuple[int, bool]:
    """What an event does, whatever its size."""
    return event[0], event[1] >= 0


@dataclass(frozen=True)
class _Growth:
    """A deep trace in terms of a shallow one.

    Attributes:
        like: for each of its events, the index of the shallow trace's that it is like.
        ids: the storage of each.
        larger: by how many bytes it is larger than its like, by the index of that.
    """

    like: list[int]
    ids: list[int]
    larger: dict[int, int]

    def events(self, shallow: Events) -> Events:
        """The deep trace, from a shallow one that differs in sizes only from the one that this was found with."""
        sizes = [size + self.larger.get(at, 0) for at, (_, size) in enumerate(shallow)]
        return ordered([(storage, sizes[at]) for storage, at in zip(self.ids, self.like, strict=True)])


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

    @property
    def middle(self) -> int:
        """The layer behind which others are added."""
        return (self.layers - 1) // 2


_Place = tuple[int, int, int]
"""A section (-1: none), a layer of it, and which event of the layer's; or which of those that are in no section."""


class _Shallow:
    """A shallow trace: a token for each event, which is the size that is made or, inverted, freed; and the index of the
    event that made the storage of each."""

    def __init__(self, events: Events) -> None:
        at: dict[int, int] = {}
        self.made = [at.setdefault(storage, i) for i, (storage, _) in enumerate(events)]
        self.tokens = [events[made][1] if made == i else ~events[made][1] for i, made in enumerate(self.made)]

    def blur(self, index: int) -> int:
        """The size that an event makes; from here on it and what frees it are like any such."""
        size = self.tokens[index]
        for i, made in enumerate(self.made):
            if made == index:
                self.tokens[i] = -1
        return size


def _growth(fewer_events: Events, events: Events, more: int) -> _Growth:
    """How a trace continues with more layers, from two traces that differ by one layer.

    What an event frees is looked up in both. Where that is as far from the first layer in one as in the other, it moves
    on with each layer that is added; where it is as far from the last, it moves the other way.

    Raises:
        Irregular: that does not follow from them.
    """
    fewer, shallow = _Shallow(fewer_events), _Shallow(events)
    sections, larger = _sections(fewer, shallow)
    places, before = _places(sections, 0, len(events)), _places(sections, -1, len(events))
    if len(before) != len(fewer_events):
        raise Irregular
    index, index_before = ({place: i for i, place in enumerate(those)} for those in (places, before))
    like: list[int] = []
    ids: list[int] = []
    living: dict[_Place, int] = {}
    for place in _places(sections, more, len(events)):
        number, layer, offset = place
        middle = sections[number].middle if number >= 0 else 0
        added = min(max(layer - middle, 0), more)  # layers that lie between the place and the one that it is like
        source = index[number, layer - added, offset]
        like.append(source)
        if events[source] == _BEGIN:
            ids.append(_BEGIN[0])
        elif events[source][1] >= 0:
            living[place] = len(like)
            ids.append(len(like))
        else:
            counterpart = index_before[number, layer - added - (layer - added > middle), offset]
            among = places[shallow.made[source]], before[fewer.made[counterpart]]
            storage = living.pop(_moved(*among, more, added if layer - added == middle else 0), None)
            if storage is None:
                raise Irregular
            ids.append(storage)
    return _Growth(like, ids, {at: more * size for at, size in larger.items()})


def _moved(freed: _Place, before: _Place, more: int, added: int) -> _Place:
    """Where what an event frees stands in the deep trace, if it is in one place of the shallow trace and another of
    that of a layer less, and so many of the added layers lie before the event."""
    section, layer, offset = freed
    from_last = layer - before[1]
    if (section, offset) != (before[0], before[2]) or from_last not in (0, 1):
        raise Irregular
    return section, layer + (more - added if from_last else added), offset


def _places(sections: Sequence[_Section], more: int, count: int) -> list[_Place]:
    """The place of each event, in order, where each section has some layers more than in a trace of so many events."""
    places: list[_Place] = []
    outside = end = 0
    for number, section in enumerate(sections):
        places += [(-1, 0, outside + i) for i in range(section.start - end)]
        outside, end = outside + section.start - end, section.end
        layers = range(section.layers + more)
        places += [(number, layer, event) for layer in layers for event in range(section.length)]
    return places + [(-1, 0, outside + i) for i in range(count - end)]


def _sections(fewer: _Shallow, shallow: _Shallow) -> tuple[list[_Section], dict[int, int]]:
    """What comes once for each layer in a trace, and by how much other events are larger than in one of a layer less,
    by their index.

    Where the two part, the longer one either repeats what it had just before, for its additional layer, or makes
    something whose size depends on the number of layers: whichever lets them agree for longest.
    """
    a, b = fewer.tokens, shallow.tokens
    sections: list[_Section] = []
    larger: dict[int, int] = {}
    i = j = end = 0
    while (i, j) != (len(a), len(b)):
        agree = _agreement(a[i:], b[j:])
        i, j = i + agree, j + agree
        if (i, j) == (len(a), len(b)):
            break
        lengths = [n for n in range(1, min(j - end, len(b) - j) + 1) if b[j - n : j] == b[j : j + n]]
        length = max(lengths, key=lambda n: _agreement(a[i:], b[j + n :], at_a_size=True), default=0)
        if _agreement(a[i:], b[j:], at_a_size=True) > (length and _agreement(a[i:], b[j + length :], at_a_size=True)):
            larger[j] = shallow.blur(j) - fewer.blur(i)
        elif length:
            one, j = b[j : j + length], j + length
            layers = 1
            while j - (layers + 1) * length >= end and b[j - (layers + 1) * length : j - layers * length] == one:
                layers += 1
            sections.append(_Section(j - layers * length, length, layers))
            end = j
        else:
            raise Irregular
    return sections, larger


def _agreement(a: Sequence[int], b: Sequence[int], at_a_size: bool = False) -> int:
    """How many tokens agree from the first on; perhaps across the first two sizes that do not."""
    count = next((i for i, (one, other) in enumerate(zip(a, b, strict=False)) if one != other), min(len(a), len(b)))
    if not at_a_size:
        return count
    if count == len(a) == len(b):
        return count + 1  # as the end does
    if count < min(len(a), len(b)) and min(a[count], b[count]) >= 0:
        return count + 1 + _agreement(a[count + 1 :], b[count + 1 :])
    return count
