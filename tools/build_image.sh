#!/usr/bin/env bash
# Build docker/Dockerfile on Debian, without a container engine, and use the image as its user does. Needs root,
# buildah and debootstrap, 35 GB of disk and a quarter of an hour; leaves nothing behind.
set -euo pipefail
cd "$(dirname "$0")/.."
place=$(mktemp -d)
trap 'buildah rm --all > /dev/null || true; rm -rf "$place"' EXIT
export TMPDIR="$place" # the package cache of the build too

buildah() {
    command buildah --root "$place/storage" --runroot "$place/run" "$@"
}
# limits as they are here, where buildah's own may not be allowed
limits=(--ulimit "nofile=$(ulimit -Hn)" --ulimit "nproc=$(ulimit -Hu)")

debootstrap --variant=minbase --include=ca-certificates trixie "$place/debian" > "$place/log"
# a proxy's certificate may be among those that are trusted here
certificates=/etc/ssl/certs/ca-certificates.crt
cp "$certificates" "$place/debian$certificates"
base=$(buildah from scratch)
buildah add --quiet "$base" "$place/debian" / > "$place/log"
buildah config --env SSL_CERT_FILE=$certificates --env PIP_CERT=$certificates "$base"
buildah commit --quiet --rm "$base" localhost/base > "$place/log"
rm -r "$place/debian"
base=localhost/base@$(buildah images --digests --format '{{.Digest}}' localhost/base)

buildah build --isolation chroot "${limits[@]}" --layers=false --build-arg "BASE=$base" -f docker/Dockerfile -t image .
buildah inspect --type image --format '{{.OCIv1.Config.Labels}}' image | grep -F "image.base.name:$base"
buildah images
container=$(buildah from "${limits[@]}" --isolation chroot image)
# what follows is run in the image, as its user
buildah run --isolation chroot -- "$container" sh -eux << 'END'
test "$(id -u)" = 10001
recipe --help
recipe list
if touch scripts/new; then exit 1; fi
touch variants/new
test -d scripts/__pycache__
make --question setup
make lint
make demo
END
