#!/usr/bin/env bash
# What another release of Axolotl changes: `make upgrade AXOLOTL=x.y.z`. In a worktree, build/upgrade, of the last commit
# it moves the pin, makes lock, environment and schema, lists keys that scripts/config/keys.yaml lacks or has in vain, and
# compares snapshots of before and after.
set -euo pipefail
cd "$(dirname "$0")/.."
if [[ ! "$1" =~ ^([0-9]+)\.([0-9]+)\.[0-9]+(\.post[0-9]+)?$ ]]; then
    echo "AXOLOTL=$1: expected a release, like 0.21.0" >&2
    exit 2
fi
pin=">=$1,<${BASH_REMATCH[1]}.$((BASH_REMATCH[2] + 1))"
git worktree remove --force build/upgrade 2> /dev/null || true
git worktree add --quiet --detach build/upgrade
sed -i -E "s/(\"axolotl\[[a-z,]+\])[^\"]*\"/\1$pin\"/" build/upgrade/pyproject.toml
make -C build/upgrade lock "AXOLOTL=$1"
make -C build/upgrade setup
(cd build/upgrade && .venv/bin/python tools/schemas.py)
(cd build/upgrade && .venv/bin/pytest -q tests/config/test_keys.py) || true
.venv/bin/python tools/snapshot.py > build/before.txt &
build/upgrade/.venv/bin/python build/upgrade/tools/snapshot.py > build/after.txt
wait $!
git -C build/upgrade --no-pager diff
diff --unified=0 build/before.txt build/after.txt || true
if grep FAILED build/before.txt build/after.txt; then
    exit 1
fi
echo "\`git -C build/upgrade diff | git apply\` takes pin, lock and schema into the checkout; then \`make setup\`, keys.yaml, \`make generated\`, \`make test\`"
