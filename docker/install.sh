#!/bin/sh
# The steps of docker/Dockerfile, in a file of their own that shellcheck reads.
set -eu

packages() {
    apt-get update
    DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends "$@"
    rm -rf /var/lib/apt/lists/*
}

case "${1-}" in
build-tools) # pip is for make, which gets uv with it
    packages make python3 python3-pip
    ;;
environment)
    make .venv/.locked CUDA="${CUDA-}"
    ;;
runtime) # gcc and the headers are for Triton, which builds its launchers when a kernel is first used
    packages gcc libc6-dev make python3 python3-dev
    useradd --uid 10001 recipe
    # for any user, so that whoever owns the mounted folders can be the one who runs
    install -d -m 1777 /home/recipe /home/recipe/.cache /home/recipe/.local /home/recipe/.local/share
    ;;
project)
    chmod -R a+rX ./* # a checkout may be closed to others
    touch .venv/.locked # of this very lock, whatever the times of the copies say
    UV_NO_CACHE=1 make setup
    .venv/bin/python -m compileall -q scripts
    # the working folder: all may write beside what is here, and nobody over it
    install -d -m 1777 . data runs variants
    ;;
*)
    echo "usage: $0 build-tools|environment|runtime|project" >&2
    exit 2
    ;;
esac
