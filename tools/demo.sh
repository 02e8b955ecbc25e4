#!/usr/bin/env bash
# `make demo`: train, score, report and plan, on a CPU. Titles and times go to stderr, as the messages of `recipe` do.
set -euo pipefail
cd "$(dirname "$0")/.."

step() { # TITLE, then the words of a recipe command
    local start=$SECONDS
    printf '\n== %s\n$ recipe' "$1" >&2
    printf ' %q' "${@:2}" >&2
    printf '\n' >&2
    .venv/bin/recipe "${@:2}"
    echo "== done in $((SECONDS - start)) s" >&2
}

# bf16=false: with bf16, which not every processor has, two steps change the loss by half as much.
step "1 of 5: train (a minute)" run start/qlora --rehearse --set 'datasets.0.split=train[:14]' --set val_set_size=0.35 --set bf16=false
step "2 of 5: answer and score" evaluate latest --limit 4 --max-new-tokens 12 --metric bertscore:none > /dev/null
step "3 of 5: write a report" report latest
step "4 of 5: list the results" results latest
step "5 of 5: plan the real run" plan start/qlora --gpu T4 --gpu 3090 --gpu 4090
cat << END

SmolLM2-135M stood in for Llama 3.2 3B. It was trained in 4 bits on 9 rows, with
the recipe's own settings, in fp32. The loss of the 5 held-out rows is now lower.
The plans are for the real model. report.html has curves, settings and predictions.
The demo took $SECONDS s.
END
