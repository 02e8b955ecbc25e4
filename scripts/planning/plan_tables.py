"""Plans as they are printed."""

import json
from typing import Any

from .. import tables
from .planner import GIB

Plan = dict[str, Any]


def show(planned: Plan) -> None:
    """Print a plan."""
    batch = "{rows} x {tokens} tokens"
    of_batch = batch.format(**planned["micro_batch"])
    tables.print_text(f"{planned['model']}, {planned['adapter'] or 'all weights'}, {of_batch} a micro batch")
    print()
    tables.print_table(_parameters(planned))
    print(f"{planned['trainable_share']:.3%} trainable\n")
    tables.print_table(_memory(planned))
    if longest := planned.get("longest_batch"):
        needed = f"{longest['needed'] / GIB:.2f} GiB at the longest batch of the data"
        tables.print_text(f"{needed}, {batch.format(**longest)}")
    print()
    tables.print_table(_cards(planned), spare=["usable GiB"])
    for change in planned["changes"]:
        settings = " ".join(f"--set {key}={json.dumps(value)}" for key, value in change["set"].items())
        verdict = "then it fits" if change["fits"] else "not enough"
        tables.print_text(f"{verdict}, {change['needed'] / GIB:.2f} GiB: {settings} ({change['effect']})")
    if len(planned["cards"]) == 1 and not any(way["fits"] for way in (*planned["cards"], *planned["changes"])):
        print("no known change makes it fit: take a larger card or a smaller model")
    print()
    tables.print_table(_work(planned["work"]), below=[""])
    show_notes(planned["notes"])


def show_notes(notes: list[str], where: str = "") -> None:
    """What a plan leaves out."""
    for note in notes:
        tables.print_text(f"note: {f'{where}: ' if where else ''}{note}")


def summary(plans: dict[str, Plan]) -> None:
    """Several plans on stdout, a row each."""
    rows = [_summary(name, planned) for name, planned in plans.items()]
    spare = ["logits GiB", "reserved GiB", "allocated GiB", "trainable", "share", "micro batch"]
    tables.print_table(rows, spare=spare)
    for name, planned in plans.items():
        show_notes(planned["notes"], name)


def _parameters(planned: Plan) -> list[dict[str, Any]]:
    counts = planned["parameters"] | {"all": {key: planned[key] for key in ("frozen", "trainable")}}
    return [
        {"parameters": kind, "frozen": f"{count['frozen']:,}", "trainable": f"{count['trainable']:,}"}
        for kind, count in counts.items()
    ]


def _memory(planned: Plan) -> list[dict[str, Any]]:
    """What is allocated at the peak, and what that comes to on the card."""
    memory = planned["memory"]
    lines = sorted(memory["parts"].items(), key=lambda part: -part[1])
    lines += [
        ("allocated at the peak", memory["allocated"]),
        ("held back by the allocator", memory["reserved"] - memory["allocated"]),
        ("CUDA's own", memory["context"]),
        ("needed", memory["needed"]),
        ("paged optimizer state, not part of it", memory["paged"]),
        *((f"needed on each GPU with {method}", size) for method, size in planned["per_gpu"].items()),
    ]
    return [{"memory": name, "GiB": f"{size / GIB:.2f}"} for name, size in lines if size]


def _cards(planned: Plan) -> list[dict[str, Any]]:
    return [
        {
            "card": card["card"],
            "usable GiB": f"{card['usable'] / GIB:.2f}",
            "fits": "yes" if card["fits"] else "no",
            "free GiB": f"{card['free'] / GIB:.2f}",
        }
        for card in planned["cards"]
    ]


def _summary(name: str, planned: Plan) -> dict[str, Any]:
    memory = planned["memory"]
    cards = planned["cards"]
    if len(cards) == 1:
        verdict = {f"fits {cards[0]['card']}": "yes" if cards[0]["fits"] else "no"}
        verdict["free GiB"] = f"{cards[0]['free'] / GIB:.2f}"
    else:
        verdict = {"smallest card": next((card["card"] for card in cards if card["fits"]), "none")}
    sizes = {"logits": memory["parts"].get("logits", 0)} | {
        key: memory[key] for key in ("allocated", "reserved", "needed")
    }
    return {
        "recipe": name,
        "trainable": f"{planned['trainable']:,}",
        "share": f"{planned['trainable_share']:.2%}",
        "micro batch": "{rows} x {tokens}".format(**planned["micro_batch"]),
        **{f"{size} GiB": f"{value / GIB:.2f}" for size, value in sizes.items()},
        **verdict,
    }


def _work(work: dict[str, Any]) -> list[dict[str, Any]]:
    lines = [
        (
            "rows",
            f"{work['rows']:,} ({work['rows_are']})" if work["rows"] else "not known: the training data is not here",
        ),
        ("tokens in all epochs", f"{work['tokens']:,} ({work['tokens_are']})" if work["tokens"] else None),
        ("optimizer steps", f"{work['steps']:,}" if work["steps"] else None),
        ("operations a token", f"{work['flops_per_token']:.3g}"),
        ("operations", f"{work['flops']:.3g}" if work["flops"] else None),
        (
            "tokens a second",
            f"{work['tokens_per_second']:,.0f} ({work['rate_is']})" if work["tokens_per_second"] else None,
        ),
        (
            "hours",
            f"{work['hours']:,.{1 if work['hours'] >= 1 else 2}f} ({hours_are(work)})" if work["hours"] else None,
        ),
        ("cost", f"{work['cost']:,.2f} USD" if work["cost"] else None),
    ]
    return [{"work": name, "": text} for name, text in lines if text]


def hours_are(work: dict[str, Any]) -> str:
    """What an estimate of hours rests on."""
    return f"speed: {work['rate_is']}; tokens: {work['tokens_are'].replace(': ', ', ')}"
