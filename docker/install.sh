#!/bin/sh
# The steps of docker/Dockerfile, in a separate file so that shellcheck can read them.
set -eu

packages() {
    apt-get update
    DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends "$@"
    rm -rf /var/lib/apt/lists/*
}

case "${1-}" in
build-tools) # make installs uv with pip
    packages make python3 python3-pip
    ;;
environment)
    make .venv/.locked CUDA="${CUDA-}"
    ;;
runtime) # Triton needs gcc and the headers to build a launcher when a kernel is first used
    packages gcc libc6-dev make python3 python3-dev
    useradd --uid 10001 recipe
    # writable for all users, so that the container can run as the owner of the mounted folders
    install -d -m 1777 /home/recipe /home/recipe/.cache /home/recipe/.local /home/recipe/.local/share
    ;;
project)
    chmod -R a+rX ./* # a checkout may be unreadable for other users
    touch .venv/.locked # the environment is of this lock, even if the copied files are newer
    UV_NO_CACHE=1 make setup
    .venv/bin/python -m compileall -q scripts
    # the working folder: every user can create files in it, but not overwrite existing ones
    install -d -m 1777 . data runs variants
    ;;
*)
    echo "usage: $0 build-tools|environment|runtime|project" >&2
    exit 2
    ;;
esac
